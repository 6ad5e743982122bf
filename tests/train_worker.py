"""Run by torchrun in test_training.py: a short training; process 0 saves the weights."""

import os
import sys
from dataclasses import replace
from pathlib import Path

from conftest import small_model
from safetensors.torch import save_file
from test_training import CONFIG, samples
from transformers import AutoTokenizer

import parablock as pb
from parablock.checkpoints.load import BUNDLED

if __name__ == "__main__":
    model = small_model(initializer_range=0.05)
    config = replace(CONFIG, steps=3, optimizer=sys.argv[2], packing=False)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "diffusion")
    pb.train(model, tokenizer, samples(60), config, Path(sys.argv[1]) / "run")
    if os.environ["RANK"] == "0":
        save_file(model.state_dict(), Path(sys.argv[1]) / "weights.safetensors")
