"""The published form of the training loss: two sequences `[xt ; x0]` of 2 L tokens, the head at every position.

What Fast-dLLM v2 (arXiv 2509.26328, section 3.1) describes, on a stock model, as plainly as possible: the reference of
the tests and the baseline of `training_cost.py`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from parablock.diffusion.masks import block_diffusion_mask
from parablock.diffusion.noise import complementary_views


def additive(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A bool mask `[q, k]` (True: attend) as the additive `[1, 1, q, k]` that every attention of transformers reads."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)[None, None]


def masks_of(model: Any, attends: Tensor, positions: Tensor) -> Any:
    """The rule `attends [q, k]` for tokens at `positions [k]`, as the model's layers take it.

    A layer with a sliding window sees those keys alone whose position is less than a window behind the query's.
    """
    config, dtype = model.config, model.dtype
    types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if window is None or types == {"full_attention"}:
        return additive(attends, dtype)
    sliding = additive(attends & (positions[:, None] - positions[None, :] < window), dtype)
    return {"full_attention": additive(attends, dtype), "sliding_attention": sliding} if len(types) > 1 else sliding


def official_loss(
    model: Any, input_ids: Tensor, labels: Tensor, noise_mask: Tensor, *, block_size: int, mask_token_id: int
) -> Tensor:
    """Mean cross-entropy over all masked positions of both views; arguments as of `parablock.diffusion_loss`."""
    length = input_ids.shape[1]
    positions = torch.arange(length).repeat(2)
    mask = masks_of(model, block_diffusion_mask(length, block_size), positions)
    losses, counts = [], []
    for view in complementary_views(noise_mask, labels):
        doubled = torch.cat([input_ids.masked_fill(view, mask_token_id), input_ids], 1)
        logits = model(input_ids=doubled, attention_mask=mask, position_ids=positions[None]).logits[:, :length]
        targets = input_ids[:, 1:].masked_fill(~view[:, 1:], -100)
        losses.append(F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, ignore_index=-100, reduction="sum"))
        counts.append((targets != -100).sum())
    return torch.stack(losses).sum() / torch.stack(counts).sum()
