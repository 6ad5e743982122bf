"""Adapt an AR checkpoint to block diffusion on chats of your own, save it, and decode with it.

    python examples/adapt.py [STEPS]

Here the AR checkpoint is the bundled one and the chats are the bundled task; put your own in their place. A model of
billions of parameters wants `optimizer="adamw"`, a small learning rate (1e-5 to 2e-5) and a GPU with `bf16=True`.
"""

import sys
import tempfile
from pathlib import Path

import parablock as pb
from parablock.data.chat import encode_chat, encode_prompt
from parablock.data.word_problems import word_problem

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
model, tokenizer = pb.load("bundled-ar")  # of your AR model: a directory or a hub id

chats = [word_problem("train", 1, i).messages() for i in range(32 * steps)]  # [{"role": ..., "content": ...}, ...]
samples = [encode_chat(tokenizer, chat) for chat in chats]
config = pb.TrainConfig(
    steps=steps, batch_size=32, micro_batch_size=32, context_length=256, block_size=32, packing=False,
    optimizer="muon", lr=3e-3, muon_lr=1e-2, warmup_steps=10, log_every=max(1, steps // 10),
)  # fmt: skip

with tempfile.TemporaryDirectory() as scratch:
    log = lambda step, logs: "loss" in logs and print(f"step {step:4d}  loss {logs['loss']:.3f}", flush=True)  # noqa: E731
    pb.train(model, tokenizer, samples, config, scratch, progress=log)
    pb.save(model, tokenizer, Path(scratch) / "adapted")
    model, tokenizer = pb.load(Path(scratch) / "adapted")

question = word_problem("test", 1, 0).question
prompt = encode_prompt(tokenizer, [{"role": "user", "content": question}])
out = pb.generate(model, prompt)
print(question, tokenizer.decode(out.tokens[0]), f"{out.tokens_per_forward:.1f} tokens per forward", sep="\n")
