"""What the tables of `paper.py` train: the recipe with and without each of its parts, and one model per seed.

A run that is done is not done again: figures lie in `benchmarks/results/recipe/`, models in `runs/paper/`. Everything
of a run depends on its variant and its seed alone. Each uses one thread, so several can run beside one another
(`paper.py training --only VARIANT --seed N`).
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, setting, write_json

import parablock as pb
from parablock.data.word_problems import EncodedProblems
from parablock.evals.word_problems import MAX_NEW_TOKENS, evaluate, test_problems

STEPS, ROWS, CONTEXT, PROBLEMS = 200, 16, 256, 300
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
FOLDER = RESULTS / "recipe"
MODELS = Path(__file__).parents[1] / "runs" / "paper"


def _adapt(model: Any, tokenizer: Any, seed: int, steps: int, losses: list[float], **settings: Any) -> None:
    config = pb.TrainConfig(
        steps=steps, batch_size=ROWS, micro_batch_size=ROWS, context_length=CONTEXT, optimizer="muon",
        lr=3e-3, muon_lr=1e-2, warmup_steps=10, log_every=20, seed=seed, **settings,
    )  # fmt: skip
    samples = list(EncodedProblems(tokenizer, seed=100 + seed, count=steps * ROWS * 3))
    with tempfile.TemporaryDirectory() as scratch:
        log = lambda step, logs: losses.append(logs["loss"]) if "loss" in logs else None  # noqa: E731
        pb.train(model, tokenizer, samples, config, scratch, progress=log)


def _start() -> tuple[Any, Any]:
    torch.set_num_threads(1)
    return pb.load("bundled-ar", device="cpu")


def run_variant(variant: str, seed: int) -> None:
    """Adapt the bundled AR model at block size 8, then solve fresh problems in both modes."""
    file = FOLDER / f"{variant.replace('+ ', 'plus_').replace(' ', '_')}-{seed}.json"
    if file.exists():
        return
    model, tokenizer = _start()
    losses: list[float] = []
    start = time.perf_counter()
    _adapt(model, tokenizer, seed, STEPS, losses, block_size=8, **VARIANTS[variant])
    seconds = time.perf_counter() - start
    problems = test_problems(1000 + seed, PROBLEMS)
    report: dict[str, Any] = {"variant": variant, "seed": seed, "steps": STEPS, "seconds": seconds, "losses": losses}
    report["commit"] = setting("")["commit"]
    for mode in ("diffusion", "autoregressive"):
        score = evaluate(model, tokenizer, problems, pb.DecodeConfig(mode=mode, max_new_tokens=MAX_NEW_TOKENS))
        report[mode] = {"correct": score.correct, "problems": PROBLEMS, "tokens_per_forward": score.tokens_per_forward}
    write_json(file, report)
    print(variant, seed, report["diffusion"], report["autoregressive"], f"{seconds:.0f} s", flush=True)


def train_model(seed: int) -> Path:
    """A block-diffusion model of block size 32 for the tables of decoding; its folder."""
    folder = MODELS / f"seed-{seed}"
    if folder.exists():
        return folder
    model, tokenizer = _start()
    losses: list[float] = []
    _adapt(model, tokenizer, seed, STEPS, losses, block_size=8, ar_loss_weight=0.5, decay_share=0.0)
    print("model", seed, "block size 8", losses[-1], flush=True)
    _adapt(model, tokenizer, 50 + seed, MODEL_STEPS, losses, block_size=32, ar_loss_weight=0.5)
    print("model", seed, "block size 32", losses[-1], flush=True)
    pb.save(model, tokenizer, folder)
    return folder


def summary() -> list[dict[str, Any]]:
    """For every variant that has runs: mean accuracy over seeds, its standard error, and the pooled binomial one."""
    done = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    rows = []
    for variant in VARIANTS:
        runs = [run for run in done if run["variant"] == variant]
        if not runs:
            continue
        row: dict[str, Any] = {"variant": variant, "seeds": len(runs)}
        for mode in ("diffusion", "autoregressive"):
            shares = [run[mode]["correct"] / run[mode]["problems"] for run in runs]
            mean, count = statistics.mean(shares), sum(run[mode]["problems"] for run in runs)
            row[mode] = {
                "accuracy": mean,
                "seed_error": statistics.stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else None,
                "binomial_error": (mean * (1 - mean) / count) ** 0.5,
                "tokens_per_forward": statistics.mean(run[mode]["tokens_per_forward"] for run in runs),
            }
        row["seconds_per_step"] = statistics.median(run["seconds"] / run["steps"] for run in runs)
        rows.append(row)
    return rows
