"""Captured CUDA graphs: the forward of a shape, recorded once and replayed. All share one memory pool.

No more than `MOST` are kept; the one that was not used for the longest time makes room.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

MOST = 256


class Graphs:
    """The graphs of one runner on one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None
        self._kept: OrderedDict[Hashable, tuple[Any, Tensor, Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def run(self, key: Hashable, packed: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """`compute(packed)`, from the graph of `key`; the first time it is captured. Valid until the next call."""
        if key not in self._kept:
            while len(self._kept) >= MOST:
                self._kept.popitem(last=False)
            self._kept[key] = self._capture(packed.to(self.device), compute)
        self._kept.move_to_end(key)
        graph, static, result = self._kept[key]
        static.copy_(packed)
        graph.replay()
        return result

    def clear(self) -> None:
        """Free the graphs and what they hold."""
        self._kept.clear()
        self._pool = None

    def _capture(self, static: Tensor, compute: Callable[[Tensor], Tensor]) -> tuple[Any, Tensor, Tensor]:
        compute(static)  # what is made once must not be captured
        torch.cuda.synchronize(self.device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = compute(static)
        return graph, static, result
