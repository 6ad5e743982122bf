"""What the tables of `paper.py` train: the recipe with and without each of its parts, and one model per seed.

A run that is done is not done again: figures lie in `benchmarks/results/recipe/`, models in `runs/paper/`. Everything
of a run depends on its variant and its seed alone.
"""

import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, commit, in_processes, write

import parablock as pb
from parablock.data.word_problems import EncodedProblems
from parablock.evals.word_problems import MAX_NEW_TOKENS, evaluate, test_problems

SEEDS = (0, 1, 2)
STEPS, ROWS, PROBLEMS = 200, 16, 300
MODEL_STEPS = 500  # at block size 32, after STEPS at block size 8
PLAIN = {"isolate_samples": False}
# "naive" is the token shift alone; each variant of Fast-dLLM v2, table 2, adds one thing to the one before it; the
# others change one thing of "isolated", which is what `parablock` does by default
VARIANTS: dict[str, dict[str, Any]] = {
    "naive": {**PLAIN, "block_padding": False, "complementary": False},
    "+ padding": {**PLAIN, "complementary": False},
    "+ complementary": PLAIN,
    "isolated": {},
    "clean first token": {"first_token_context": "clean"},
    "AR loss 0.5": {"ar_loss_weight": 0.5},
}
MODELS = Path(__file__).parents[1] / "runs" / "paper"


def training(problems: int, repeats: int) -> dict[str, Any]:
    """Table 2: all runs that are not done yet, then what they came to; also the models of the other parts."""
    in_processes(run_variant, itertools.product(VARIANTS, SEEDS))
    in_processes(train_model, [(seed,) for seed in SEEDS])
    return {"runs": [json.loads(file.read_text()) for file in sorted((RESULTS / "recipe").glob("*.json"))]}


def _adapt(model: Any, tokenizer: Any, seed: int, steps: int, **settings: Any) -> list[float]:
    config = pb.TrainConfig(
        steps=steps, batch_size=ROWS, micro_batch_size=ROWS, context_length=256, optimizer="muon", lr=3e-3,
        muon_lr=1e-2, warmup_steps=10, log_every=20, seed=seed, **settings,
    )  # fmt: skip
    samples = list(EncodedProblems(tokenizer, seed=100 + seed, count=steps * ROWS * 3))
    logs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        pb.train(model, tokenizer, samples, config, scratch, progress=lambda step, log: logs.append(log))
    return [log["loss"] for log in logs if "loss" in log]


def _start() -> tuple[Any, Any]:
    torch.set_num_threads(1)
    return pb.load("bundled-ar", device="cpu")


def run_variant(variant: str, seed: int) -> None:
    """Adapt the bundled AR model at block size 8, then solve fresh problems in both modes."""
    name = f"recipe/{variant.replace('+ ', 'plus_').replace(' ', '_')}-{seed}"
    if (RESULTS / f"{name}.json").exists():
        return
    model, tokenizer = _start()
    started = time.perf_counter()
    losses = _adapt(model, tokenizer, seed, STEPS, block_size=8, **VARIANTS[variant])
    report = {"variant": variant, "seed": seed, "steps": STEPS, "losses": losses, "commit": commit()}
    report["seconds"] = time.perf_counter() - started
    for mode in ("diffusion", "autoregressive"):
        config = pb.DecodeConfig(mode=mode, max_new_tokens=MAX_NEW_TOKENS)
        score = evaluate(model, tokenizer, test_problems(1000 + seed, PROBLEMS), config)
        report[mode] = {"correct": score.correct, "problems": PROBLEMS, "tokens_per_forward": score.tokens_per_forward}
    write(name, report)


def train_model(seed: int) -> Path:
    """A block-diffusion model of block size 32 for the tables of decoding; its folder."""
    folder = MODELS / f"seed-{seed}"
    if not folder.exists():
        model, tokenizer = _start()
        _adapt(model, tokenizer, seed, STEPS, block_size=8, ar_loss_weight=0.5, decay_share=0.0)
        _adapt(model, tokenizer, 50 + seed, MODEL_STEPS, block_size=32, ar_loss_weight=0.5)
        pb.save(model, tokenizer, folder)
    return folder
