"""How many drafts would be accepted, on held-out samples, while a gate is trained."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from parablock.data.chat import Sample
from parablock.data.packing import pad_to_block
from parablock.diffusion.drafting import accepted_drafts
from parablock.settings import Model
from parablock.training.config import AdaptConfig
from parablock.training.rows import collate, draw_anchors

ROWS = 4  # held-out samples at a time


class DraftCheck(TrainerCallback):
    """Every `check_every` steps: drafts accepted behind places in held-out answers, by position in their block.

    Teacher-forced: a draft counts as accepted where it and all before it are what the model itself would say behind the
    given text. So it is an estimate of what decoding accepts, in two forwards.
    """

    def __init__(
        self, model: Model, samples: list[Sample], config: AdaptConfig, padding: int,
        log: Callable[[int, dict[str, float]], None],
    ) -> None:  # fmt: skip
        self.model, self.config, self.log = model, config, log
        rows = []
        for number, sample in enumerate(samples):
            padded = pad_to_block(sample, config.block_size, padding)
            anchors = draw_anchors([padded], config.anchors, config.seed, 0, number, ahead=config.draft_tokens + 1)
            if anchors.any():  # else the answer is shorter than a block of drafts
                rows.append({"input_ids": torch.tensor(padded.input_ids), "anchors": anchors})
        self.batches = [collate(rows[i : i + ROWS], padding) for i in range(0, len(rows), ROWS)]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Every `check_every` steps."""
        if state.global_step % self.config.check_every or not self.batches:
            return
        training = self.model.training
        self.model.eval()
        shares = torch.cat([self._accepted(batch) for batch in self.batches]).float().mean(0).tolist()
        self.model.train(training)
        by_place = {f"accepted_{place}": share for place, share in enumerate(shares, start=1)}
        self.log(state.global_step, {"accepted": sum(shares), **by_place})

    def _accepted(self, batch: dict[str, Tensor]) -> Tensor:
        """Within a call of the model, so that FSDP has its weights together."""
        forward = self.model.forward
        self.model.forward = lambda **rows: accepted_drafts(self.model, **rows, block_size=self.config.block_size)
        try:
            accepted: Tensor = self.model(**{name: value.to(self.model.device) for name, value in batch.items()})
        finally:
            self.model.forward = forward
        return accepted
