"""Captured CUDA graphs: the forward of a shape, recorded once and replayed. All of a runner share one memory pool.

No more than `MOST` are kept; the one that was not used for the longest time makes room.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

MOST = 256
_capturing = threading.Lock()  # a process captures one graph at a time, whatever engines it runs


class Graphs:
    """The graphs of one runner on one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None
        self._stream: Any = None  # one for all captures: their memory is shared by stream
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
        static.copy_(packed, non_blocking=True)
        graph.replay()
        return result

    def clear(self) -> None:
        """Free the graphs and what they hold."""
        self._kept.clear()
        self._pool = self._stream = None

    def _capture(self, static: Tensor, compute: Callable[[Tensor], Tensor]) -> tuple[Any, Tensor, Tensor]:
        compute(static)  # what is made once must not be captured
        torch.cuda.synchronize(self.device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        graph = torch.cuda.CUDAGraph()
        # thread_local: the engines of other threads go on meanwhile
        capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        # a thread's current device need not be this one, and kernels elsewhere would run instead of being captured
        try:
            with _capturing, torch.cuda.device(self.device), capture:
                result = compute(static)
        except RuntimeError as error:
            reason = str(error.__context__ or error).partition("\n")[0]
            raise RuntimeError(
                f"the model's forward cannot be captured as a CUDA graph ({reason}); use cuda_graphs=False"
            ) from error
        return graph, static, result
