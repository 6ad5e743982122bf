"""A short training in a process of its own, or in several; its recipe is given as JSON. Writes model and losses."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from conftest import small_model
from safetensors.torch import save_file
from transformers import AutoTokenizer

import parablock as pb
from parablock.checkpoints.named import BUNDLED
from parablock.data.chat import Sample
from parablock.diffusion.gate import attach, new_gate

CONFIG = pb.TrainConfig(
    steps=30, batch_size=8, micro_batch_size=4, context_length=32, block_size=8, optimizer="muon", lr=5e-3,
    muon_lr=2e-2, warmup_steps=2, log_every=10,
)  # fmt: skip


def samples(count: int) -> list[Sample]:
    """Prompts of five tokens, answers that count on from the last: learnable at once."""
    made = []
    for i in range(count):
        ids = [(7 * i + j) % 60 for j in range(5)] + [(7 * i + 5 + j) % 60 for j in range(6)] + [62]
        made.append(Sample(ids, [-100] * 5 + ids[5:]))
    return made


def main(arguments: list[str]) -> None:
    folder, changes, resume = Path(arguments[0]), json.loads(arguments[1]), "--resume" in arguments
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "diffusion")
    config = replace(CONFIG, **changes)
    model = small_model(initializer_range=0.05)
    if config.context == "causal":
        attach(model, new_gate(model, draft_tokens=config.draft_tokens, rank=4, alpha=8))
    losses: dict[int, float] = {}

    def progress(step: int, logs: dict[str, float]) -> None:
        losses.update({step: logs["loss"]} if "loss" in logs else {})
        os.write(1, f"STEP {step}\n".encode())  # one piece: other processes write to the same file

    pb.train(model, tokenizer, samples(60), config, folder / "run", progress=progress, resume=resume)
    if config.context == "causal":
        write_gate(model, folder / "model")
    else:
        pb.save(model, tokenizer, folder / "model")
    (folder / "losses.json").write_text(json.dumps(losses))


def write_gate(model: Any, folder: Path) -> None:
    """The gate's weights, whole where they are sharded, and what the base's have become."""
    weights = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
    if int(os.environ.get("RANK", "0")) == 0:
        folder.mkdir()
        save_file({name: p.detach().contiguous() for name, p in weights.items()}, folder / "model.safetensors")


if __name__ == "__main__":
    main(sys.argv[1:])
