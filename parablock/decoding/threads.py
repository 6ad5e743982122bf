"""How many threads of a CPU a forward gets: one, where sharing it out takes longer than it saves."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from parablock.settings import Model

# multiplications of a forward up to which one thread is the fastest (measured: docs/performance.md); threads that wait
# passively have to be woken for every operator
PASSIVE, ACTIVE = 4e9, 5e7


class Threads:
    """The threads for a model's forwards: `asked`, or by their size one or `all` that torch has now."""

    def __init__(self, model: Model, asked: int | None = None) -> None:
        self.on_cpu = torch.device(model.device).type == "cpu"
        self.asked, self.all = asked, torch.get_num_threads()
        self.passive = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
        self.weights = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()

    @contextmanager
    def for_tokens(self, tokens: int) -> Iterator[None]:
        """Within: as many as suit a forward over so many tokens. Other threads of the process keep their own number."""
        before = torch.get_num_threads()
        if self.on_cpu:
            few = self.weights * tokens < (PASSIVE if self.passive else ACTIVE)
            torch.set_num_threads(self.asked or (1 if few else self.all))
        try:
            yield
        finally:
            torch.set_num_threads(before)
