"""What one training step of causal context costs, against an autoregressive one of the same rows.

    python benchmarks/draft_training_cost.py

Forward and backward over 4 rows of 512 tokens, three quarters of them learned, 64 anchors a row with 7 masks each, in
turns, on one thread, in seconds of the processor: the drafts' loss with a frozen base (packed, in float32 and in
bfloat16), and the AR loss where all weights are trained (float32, and bfloat16 under autocast) or a LoRA adapter of the
same rank is. On the bundled AR model; with `--large-repeats`, also on random weights in the shape of SmolLM2-135M (some
minutes, 12 GB). Prints a table and writes `benchmarks/results/draft_training_cost.json`.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import parablock as pb
from parablock.bench.shapes import random_model
from parablock.data.chat import IGNORE, Sample
from parablock.diffusion.gate import attach, new_gate
from parablock.diffusion.objective import autoregressive_loss
from parablock.training.rows import draw_anchors

ROWS, LENGTH, PROMPT, ANCHORS, DRAFTS, RANK = 4, 512, 128, 64, 7, 32
BASE = "AR, all weights, float32"


def batch(vocabulary: int) -> dict[str, Tensor]:
    """Random tokens; the first quarter of every row is prompt."""
    ids = torch.randint(0, vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :PROMPT] = IGNORE
    samples = [Sample(i, of) for i, of in zip(ids.tolist(), labels.tolist(), strict=True)]
    anchors = [draw_anchors([sample], ANCHORS, row) for row, sample in enumerate(samples)]
    return {"input_ids": ids, "labels": labels, "anchors": torch.stack(anchors)}


def drafting(model: Any, dtype: torch.dtype) -> Any:
    model = model.to(dtype)
    attach(model, new_gate(model, draft_tokens=DRAFTS, rank=RANK, alpha=RANK))
    pb.pack(model)
    return model.train()


def with_lora(model: Any) -> Any:
    model = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    pb.pack(model)
    return model.train()


def step(model: Any, rows: dict[str, Tensor], *, drafts: bool, autocast: bool) -> float:
    """The processor's seconds of a forward and a backward: neighbours on the machine disturb them little."""
    model.zero_grad(set_to_none=True)
    started = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if drafts:
            loss = pb.draft_loss(model, **rows, block_size=32)
        else:
            loss = autoregressive_loss(model, rows["input_ids"], rows["labels"], block_size=32)
    loss.backward()
    return time.process_time() - started


def measure(make: Callable[[], Any], repeats: int) -> dict[str, Any]:
    plain = make().train()
    rows = batch(plain.config.vocab_size)
    runs = {
        BASE: partial(step, plain, rows, drafts=False, autocast=False),
        "AR, all weights, bfloat16": partial(step, plain, rows, drafts=False, autocast=True),
        "AR, LoRA, float32": partial(step, with_lora(make()), rows, drafts=False, autocast=False),
        "drafts, float32": partial(step, drafting(make(), torch.float32), rows, drafts=True, autocast=False),
        "drafts, bfloat16": partial(step, drafting(make(), torch.bfloat16), rows, drafts=True, autocast=False),
    }
    took = common.in_turns(runs, repeats)
    return {
        "seconds": {name: {"median": statistics.median(times), "all": times} for name, times in took.items()},
        "share_of_ar": {name: common.ratios(times, took[BASE]) for name, times in took.items()},
    }


def main() -> None:
    args = common.options(__doc__, repeats=5, large_repeats=0)
    torch.set_num_threads(1)
    cases: dict[str, tuple[Callable[[], Any], int]] = {
        "bundled-ar": (lambda: pb.load("bundled-ar", device="cpu", dtype="float32", packed=False)[0], args.repeats),
        "135m": (lambda: random_model("135m", block_size=32, dtype=torch.float32, device="cpu"), args.large_repeats),
    }
    shape = {"rows": ROWS, "length": LENGTH, "prompt": PROMPT, "anchors": ANCHORS, "draft_tokens": DRAFTS, "rank": RANK}
    report: dict[str, Any] = {"setting": common.setting(args), **shape}
    for name, (make, repeats) in cases.items():
        if repeats:
            report[name] = found = measure(make, repeats)
            medians = {run: times["median"] for run, times in found["seconds"].items()}
            shares = {run: share["median"] for run, share in found["share_of_ar"].items()}
            print(f"{name}, {repeats} repeats\n{pd.DataFrame({'seconds': medians, 'of AR': shares})}", flush=True)
    common.write("draft_training_cost", report)


if __name__ == "__main__":
    main()
