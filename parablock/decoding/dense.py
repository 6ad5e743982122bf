"""Runs work on any stock model as it is, over one `BlockCache`: all rows in one padded forward.

Shapes: R rows, Q the width of the widest piece, V vocabulary, m predictions.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parablock.decoding.cache import BlockCache
from parablock.decoding.rows import Rows
from parablock.decoding.work import Work
from parablock.diffusion.gate import closed, gate_of
from parablock.diffusion.support import layer_masks, layer_windows
from parablock.settings import Model


@dataclass(frozen=True)
class Sights:
    """What each query sees of the first `visible` slots: those below its limit, within its layer's window from
    `sight_RQ` back, and those from `own_RQ` to below `end_RQ`.
    """

    sight_RQ: np.ndarray
    limit_RQ: np.ndarray
    own_RQ: np.ndarray
    end_RQ: np.ndarray
    visible: int


class Dense:
    """A model, and the K/V of a batch of rows."""

    def __init__(self, model: Model, rows: int, capacity: int) -> None:
        self.model = model
        self.cache = BlockCache(rows, capacity)
        self.gate = gate_of(model)
        self.windowed = any(layer_windows(model.config))
        self.last_device = last_device(model)

    def run(self, rows: Rows, work: Work) -> Tensor:
        """One forward; returns the logits `[m, V]` of the wanted predictions.

        A row that takes part in a wider forward than it needs repeats its last query, and only its own slots of the
        cache are written. So its tokens do not depend on its neighbours.
        """
        first_R1, width_R1, grain_R1 = self._columns(work)
        span_Q = np.arange(int(width_R1.max()))
        position_RQ = first_R1 + np.minimum(span_Q, np.maximum(width_R1 - 1, 0))
        slot_RQ = np.where(span_Q < width_R1, position_RQ, self.cache.capacity)
        ids_RQ = rows.ids_RC[np.arange(len(position_RQ))[:, None], position_RQ]
        # rows that begin alike see alike, so one mask serves all; what a repeated query sees does not matter
        sight_RQ = first_R1 + span_Q if (first_R1 == first_R1[0]).all() else position_RQ
        limit_RQ = (sight_RQ // grain_R1 + 1) * grain_R1
        own_RQ = end_RQ = np.zeros_like(limit_RQ)
        if (placed := work.placed) is not None:
            end_RQ, sight_RQ = end_RQ.copy(), position_RQ
            at = np.zeros_like(limit_RQ, dtype=bool)
            at[work.rows_n] = span_Q < work.width_n[:, None]
            whole = ids_RQ, position_RQ, limit_RQ, own_RQ, end_RQ
            for kept_RQ, placed_q in zip(whole, vars(placed).values(), strict=True):
                kept_RQ[at] = placed_q
        visible = min(int(max(limit_RQ.max(), end_RQ.max())), self.cache.capacity)
        asked_Q = np.zeros(len(span_Q), dtype=bool)
        asked_Q[work.query_m] = True
        if not len(work.query_m):  # the head needs something to run on
            asked_Q[0] = True
        keep, index_m = asked_Q.nonzero()[0], (asked_Q.cumsum() - 1)[work.query_m]
        self.cache.place(slot_RQ, visible, self.model.device)
        sights = Sights(sight_RQ, limit_RQ, own_RQ, end_RQ, visible)
        with closed(self.gate, unless=placed is not None):
            logits_RKV = self._forward(ids_RQ, position_RQ, self._masks(sights), keep)
        if len(index_m) == len(logits_RKV) * len(keep):  # every row asks for all of them
            return logits_RKV.flatten(0, 1)
        row, index = torch.from_numpy(np.stack([work.row_m, index_m])).to(logits_RKV.device, non_blocking=True)
        return logits_RKV[row, index]

    def _columns(self, work: Work) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First position, width and grain of every row, `[R, 1]`; rows without work run one query, to no effect."""
        columns = work.first_n, work.width_n, work.grain_n
        R = self.cache.rows
        if len(work.rows_n) < R:
            everywhere = np.array([[0], [0], [work.grain_n[0]]]).repeat(R, 1)
            everywhere[:, work.rows_n] = columns
            columns = tuple(everywhere)
        first_R, width_R, grain_R = columns
        return first_R[:, None], width_R[:, None], grain_R[:, None]

    def _forward(self, ids_RQ: np.ndarray, position_RQ: np.ndarray, masks: Any, keep: np.ndarray) -> Tensor:
        """Logits `[R, len(keep), V]`."""
        device = self.model.device
        logits: Tensor = self.model(
            input_ids=torch.from_numpy(ids_RQ).to(device),
            position_ids=torch.from_numpy(position_RQ).to(device),
            attention_mask=masks,
            past_key_values=self.cache,
            use_cache=True,
            is_causal=False,  # without a mask: attend to everything the cache shows
            # 0: all
            logits_to_keep=0 if len(keep) == ids_RQ.shape[1] else torch.from_numpy(keep).to(self.last_device),
        ).logits
        return logits

    def _masks(self, sights: "Sights") -> Any:
        """As the model takes them; None: every query sees all visible slots."""
        config = self.model.config
        if not self.windowed and (sights.limit_RQ >= sights.visible).all() and config._attn_implementation != "eager":
            return None
        return layer_masks(config, lambda window: self._mask(sights, window))

    def _mask(self, sights: "Sights", window: int) -> Tensor:
        """Of the layers with this window: `[1 or R, 1, Q, visible]`, as the model's attention reads it."""
        model, limit_RQ, own_RQ = self.model, sights.limit_RQ, sights.own_RQ
        low_RQ = sights.sight_RQ - window + 1 if window else np.zeros_like(limit_RQ)
        bounds = np.stack([low_RQ, limit_RQ])
        if sights.end_RQ.any():  # the K/V of masks lie in order of their positions, so a window reaches as far there
            bounds = np.stack([low_RQ, limit_RQ, np.maximum(own_RQ, sights.end_RQ - window) if window else own_RQ,
                               sights.end_RQ])  # fmt: skip
        if (bounds == bounds[:, :1]).all():
            bounds = bounds[:, :1]
        if (bounds == bounds[:, :, :1]).all():
            bounds = bounds[:, :, :1]
        low, limit, *own = torch.from_numpy(bounds).to(model.device)[:, :, None, :, None]
        slots = torch.arange(sights.visible, device=model.device)
        mask: Tensor = (slots >= low) & (slots < limit)
        if own:
            mask |= (slots >= own[0]) & (slots < own[1])
        mask = mask.expand(-1, -1, limit_RQ.shape[1], -1)
        if model.config._attn_implementation == "eager":  # reads a bool mask as zeros and ones
            lowest = torch.finfo(model.dtype).min
            return torch.zeros(mask.shape, dtype=model.dtype, device=model.device).masked_fill_(~mask, lowest)
        return mask


def last_device(model: Model) -> torch.device:
    """Where the decoder ends if its layers are spread over devices: what picks states for the head must lie there."""
    *_, last = model.get_decoder().parameters()
    device: torch.device = model.device if last.device.type == "meta" else last.device  # meta: offloaded, runs there
    return device
