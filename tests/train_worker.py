"""A short training in a process of its own, or in several; its recipe is given as JSON. Writes model and losses."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from conftest import small_model
from test_training import CONFIG, samples
from transformers import AutoTokenizer

import parablock as pb
from parablock.checkpoints.look import BUNDLED

if __name__ == "__main__":
    folder, changes, resume = Path(sys.argv[1]), json.loads(sys.argv[2]), "--resume" in sys.argv
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "diffusion")
    model = small_model(initializer_range=0.05)
    losses: dict[int, float] = {}

    def progress(step: int, logs: dict[str, float]) -> None:
        losses.update({step: logs["loss"]} if "loss" in logs else {})
        os.write(1, f"STEP {step}\n".encode())  # one piece: other processes write to the same pipe

    config = replace(CONFIG, **changes)
    pb.train(model, tokenizer, samples(60), config, folder / "run", progress=progress, resume=resume)
    pb.save(model, tokenizer, folder / "model")
    (folder / "losses.json").write_text(json.dumps(losses))
