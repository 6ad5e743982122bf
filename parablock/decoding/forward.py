"""One call of a stock model over the block cache: a prefill, or whatever the loop asks for."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from parablock.decoding.cache import BlockCache
from parablock.settings import Model


def forward_prompts(
    model: Model, cache: BlockCache, ids_RQ: np.ndarray, last_R: np.ndarray, mask: Tensor | None
) -> Tensor:
    """Prefill: run `ids_RQ` from position 0 and return the logits `[R, 1, V]` of each row's position `last_R`.

    Shorter rows ride along: what is computed past their own end is overwritten before anything can see it.
    """
    rows, length = ids_RQ.shape
    keep, which = np.unique(last_R, return_inverse=True)
    start, visible = np.zeros(rows, dtype=np.int64), np.full(rows, length)
    logits = forward(model, cache, ids_RQ, start_R=start, visible_R=visible, mask=mask, keep=keep)
    row = torch.arange(rows, device=logits.device)
    return logits[row, torch.from_numpy(which).to(logits.device)][:, None]


def forward(
    model: Model,
    cache: BlockCache,
    ids_RQ: np.ndarray,
    *,
    start_R: np.ndarray,
    slots_RQ: np.ndarray | None = None,
    visible_R: np.ndarray,
    mask: Tensor | None = None,
    keep: np.ndarray | None = None,
) -> Tensor:
    """Run `ids_RQ` at positions `start_R ..` and write their K/V; returns logits `[R, Q or len(keep), V]`.

    Every query of row r attends to the first `visible_R[r]` slots of the cache, both directions; `mask`
    (`[1, 1, Q, slots]` bool, True: attend) narrows that. `slots_RQ` redirects where K/V are written; by default a
    token's slot is its position. `keep`: the query indices (the same for all rows) whose logits are wanted.
    """
    device = model.device
    span = np.arange(ids_RQ.shape[1])
    positions = start_R[:, None] + span
    visible = int(visible_R.max())
    cache.place(positions if slots_RQ is None else slots_RQ, visible, device)
    if mask is None and (visible_R != visible).any():
        mask = (torch.arange(visible) < torch.from_numpy(visible_R)[:, None])[:, None, None, :]
        mask = mask.expand(-1, -1, ids_RQ.shape[1], -1)
    implementation = model.config._attn_implementation
    if mask is None and implementation == "eager":
        mask = torch.ones(1, 1, ids_RQ.shape[1], visible, dtype=torch.bool)
    if mask is not None:
        mask = mask.to(device)
        if implementation == "eager":  # reads a bool mask as zeros and ones
            mask = torch.zeros(mask.shape, dtype=model.dtype, device=device).masked_fill_(
                ~mask, torch.finfo(model.dtype).min
            )
    more: dict[str, Any] = {} if keep is None else {"logits_to_keep": torch.from_numpy(keep).to(device)}
    logits: Tensor = model(
        input_ids=torch.from_numpy(ids_RQ).to(device),
        position_ids=torch.from_numpy(positions).to(device),
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        is_causal=False,  # without a mask: attend to everything the cache shows
        **more,
    ).logits
    return logits
