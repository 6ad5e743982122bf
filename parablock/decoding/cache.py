"""The hierarchical K/V cache: one buffer per layer holds the committed prefix and the block being decoded.

Slots below a row's committed length hold the K/V of clean tokens. The next `block_size` slots hold the K/V of the block
being decoded; each denoising forward overwrites them in place, all of them or one sub-block's slice. Committing is the
clean forward that overwrites them once more, after which the length moves. Nothing is concatenated or copied: the block
cache and the sub-block cache of Fast-dLLM v2 (section 3.3) are one buffer.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class BlockCache(Cache):
    """K/V buffers `[rows, kv_heads, capacity + 1, head_dim]` per layer, for any stock transformers decoder.

    `place` says where the next forward writes and how far it sees. The slot after `capacity` takes what must not be
    written, so that a forward over a whole block can leave a part of a row's K/V as it is.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.rows = rows
        self.capacity = capacity
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self._start: int | None = 0
        self._slots: Tensor | None = None
        self._visible = 0

    def place(self, slots: np.ndarray, visible: int, device: torch.device) -> None:
        """The next forward writes its K/V to `slots [rows, q]` and attends to the first `visible` slots."""
        first = slots[0]
        contiguous = bool((slots == np.arange(first[0], first[0] + slots.shape[1])).all())
        self._start = int(first[0]) if contiguous else None  # one slice serves all rows
        self._slots = None if contiguous else torch.from_numpy(slots).to(device)[:, None, :, None]
        self._visible = visible

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by every attention layer: write `[rows, kv_heads, q, head_dim]`, return what is visible."""
        while len(self.buffers) <= layer_idx:
            self.buffers.append((self._buffer(key_states), self._buffer(value_states)))
        for buffer, new in zip(self.buffers[layer_idx], (key_states, value_states), strict=True):
            if self._start is not None:
                buffer[:, :, self._start : self._start + new.shape[2]] = new
            else:
                assert self._slots is not None
                buffer.scatter_(2, self._slots.to(new.device).expand_as(new), new)
        keys, values = self.buffers[layer_idx]
        return keys[:, :, : self._visible], values[:, :, : self._visible]

    def _buffer(self, states: Tensor) -> Tensor:
        return states.new_zeros(self.rows, states.shape[1], self.capacity + 1, states.shape[3])

    # transformers asks these when it makes masks. We pass our own mask or none, and none must stay none.
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Not used: every forward brings its own positions."""
        return 0

    def get_query_offset(self, layer_idx: int | None = 0) -> int:
        """As of a forward without a past."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As of a forward without a past: transformers then builds no causal mask of its own."""
        return query_length, 0
