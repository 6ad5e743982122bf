"""Make an AR checkpoint ready for adaptation: a mask token, and a block size."""

from typing import Any

import torch

from parablock.decoding.generate import warn_of_block_size
from parablock.settings import Model

MASK_TOKEN = "|<MASK>|"  # as in the published Fast-dLLM v2 checkpoints
DEFAULT_BLOCK_SIZE = 32
ROWS = 64  # new embedding rows come in multiples of this: matrix products like them


def prepare(model: Model, tokenizer: Any, block_size: int | None) -> str | None:
    """Record mask token and block size in the model's config, and the mask token in the tokenizer.

    A block-diffusion checkpoint names both: they are kept, with a warning when `block_size` differs. Otherwise the mask
    token is the tokenizer's own or a new one, whose embedding is an unused row where the matrix has one (Qwen's are
    padded) and a new row where it has none. Its input and output embeddings start as the mean of all tokens' rows: in
    the range of what the model knows, and never the most probable prediction.

    Returns what was added, in words; None if nothing was.
    """
    config = model.config
    added = None
    if getattr(config, "mask_token_id", None) is None:
        added = _add_mask_token(model, tokenizer)
    elif tokenizer.mask_token is None:
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(config.mask_token_id)
    own = getattr(config, "bd_size", None)
    if own is None:
        config.bd_size = block_size or DEFAULT_BLOCK_SIZE
        added = f"{added + ', ' if added else ''}block size {config.bd_size}"
    elif block_size not in (None, own):
        warn_of_block_size(own, block_size)
        config.bd_size = block_size
    return added


def _add_mask_token(model: Model, tokenizer: Any) -> str:
    """Choose a mask token, give it an embedding; returns which, in words."""
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
