"""Make an AR model ready for adaptation: a mask token, and a block size."""

from typing import Any

import torch

from parablock.packed import unpack
from parablock.settings import Model

MASK_TOKEN = "|<MASK>|"  # as in the published Fast-dLLM v2 checkpoints
ROWS = 64  # new embedding rows come in multiples of this: matrix products like them


def prepare(model: Model, tokenizer: Any, block_size: int = 32) -> str | None:
    """Record block size and mask token in the model's config, and the mask token in the tokenizer.

    `train` does it by itself; a training loop of your own calls it before it wraps the model (LoRA) or makes rows.

    A mask token that the config names is kept. Otherwise it is the tokenizer's own or a new one, whose embedding is an
    unused row where the matrix has one (Qwen's are padded) and a new row where it has none. Its input and output
    embeddings start as the mean of all tokens' rows: in the range of what the model knows, and never the most probable
    prediction. All other rows stay bit for bit.

    Returns which mask token was added, in words; None if none was.
    """
    model.config.bd_size = block_size
    mask = getattr(model.config, "mask_token_id", None)
    if mask is None:
        return _add_mask_token(model, tokenizer)
    if tokenizer.mask_token is None:
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(mask)
    return None


def _add_mask_token(model: Model, tokenizer: Any) -> str:
    """Choose a mask token, give it an embedding; returns which, in words."""
    unpack(model)  # the head may grow
    weight = model.get_input_embeddings().weight
    if weight.device.type == "meta":
        raise ValueError("the embeddings are offloaded, so no mask token can be added; load them on a device")
    rows, known = weight.shape[0], len(tokenizer)
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    mask = int(tokenizer.mask_token_id)
    model.config.mask_token_id = mask
    if mask < min(known, rows):
        return f"mask token {tokenizer.mask_token!r} (id {mask}, which the tokenizer had)"
    if mask < rows:
        added, where = slice(mask, mask + 1), "an unused row of the embeddings"
    else:
        model.resize_token_embeddings(mask + 1, pad_to_multiple_of=ROWS, mean_resizing=False)
        now = model.get_input_embeddings().weight.shape[0]
        added, where = slice(rows, now), f"a new row: the embeddings grew from {rows} to {now}"
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    with torch.no_grad():
        for matrix in {id(m.weight): m.weight for m in modules if m is not None}.values():  # one if they are tied
            matrix[added] = matrix[: min(known, rows)].mean(0, dtype=torch.float32).to(matrix.dtype)
    return f"mask token {tokenizer.mask_token!r} (id {mask}, {where})"
