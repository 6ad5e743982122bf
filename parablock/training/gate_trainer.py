"""transformers' Trainer for a gate: checkpoints hold what is trained, losses are means over anchors."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer

from parablock.data.chat import IGNORE
from parablock.diffusion.gate import gate_of

WEIGHTS = "model.safetensors"  # the file by which the Trainer knows a checkpoint
ARGUMENTS = "training_args.bin"


class GateTrainer(Trainer):
    """Writes and reads the gate's weights alone; those of the base never change. (FSDP shards all of them.)"""

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        anchors = [torch.where(batch["anchors"], 0, IGNORE) for batch in batch_samples]
        counted = [
            {"labels": labels, "shift_labels": labels} for labels in anchors
        ]  # none is left out at a row's start
        items: Tensor | int | None = super()._get_num_items_in_batch(counted, device)
        return items

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            weights = self._gate().state_dict()
            save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / WEIGHTS)
            torch.save(self.args, folder / ARGUMENTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._gate().load_state_dict(load_file(Path(resume_from_checkpoint) / WEIGHTS))

    def _gate(self) -> Any:
        return gate_of(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
