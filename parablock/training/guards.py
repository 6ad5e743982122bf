"""What keeps a long training safe: whole checkpoints, an orderly stop, no step further once the numbers are lost."""

import math
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

WHOLE = "whole"  # this file in a checkpoint says that all of it was written


class TrainingStoppedError(RuntimeError):
    """The training was asked to stop (SIGTERM) and has written a checkpoint to resume from."""


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run that are whole, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if (path / WHOLE).is_file()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def remove_broken(folder: Path) -> int:
    """Delete what interrupted writes have left; returns how many."""
    broken = [path for path in folder.glob("checkpoint-*") if not (path / WHOLE).is_file()]
    for path in broken:
        shutil.rmtree(path, ignore_errors=True)  # another process may be at it
    return len(broken)


class Guards(TrainerCallback):
    """Marks a checkpoint when all processes have written it; stops on SIGTERM; refuses to go on with lost numbers."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.model = model
        self.folder = folder
        self.asked_to_stop = False
        self.stopped_at: int | None = None
        self._before: Any = None

    def listen(self) -> None:
        """Take SIGTERM as a request to stop after the step (in the main thread; elsewhere signals stay as they are)."""
        try:
            self._before = signal.signal(signal.SIGTERM, self._stop)
        except ValueError:
            self._before = None

    def deafen(self) -> None:
        """Give SIGTERM back."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _stop(self, *_: Any) -> None:
        self.asked_to_stop = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """After every step: has anyone been asked to stop, and are the weights to be saved still numbers?"""
        if _any_process(self.asked_to_stop, args.device):
            self.stopped_at = state.global_step
            control.should_save = args.save_strategy != "no"
            control.should_training_stop = True
        if control.should_save:
            finite = all(bool(torch.isfinite(p).all()) for p in self.model.parameters() if p.requires_grad)
            if _any_process(not finite, args.device):
                raise ValueError(self._lost(f"the weights are no longer finite after step {state.global_step}"))
        return control

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """A loss that is not a number ends the run."""
        loss = state.log_history[-1].get("loss", 0.0)
        if not math.isfinite(loss):
            raise ValueError(self._lost(f"the loss is {loss} at step {state.global_step}"))
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """All processes have written their part: the checkpoint is whole."""
        if distributed.is_initialized():
            distributed.barrier()
        if state.is_world_process_zero:
            (self.folder / f"checkpoint-{state.global_step}" / WHOLE).touch()
        return control

    def _lost(self, what: str) -> str:
        return f"{what}; lower the learning rate or raise warmup_steps. {last_good(self.folder)}"


def last_good(folder: Path) -> str:
    """Where to resume from, in words."""
    whole = checkpoints(folder)
    return f"The last good checkpoint is {whole[-1]}" if whole else "No checkpoint was written before"


def _any_process(flag: bool, device: torch.device) -> bool:
    if not distributed.is_initialized():
        return flag
    agreed = torch.tensor(int(flag), device=device)
    distributed.all_reduce(agreed, op=distributed.ReduceOp.MAX)
    return bool(agreed.item())
