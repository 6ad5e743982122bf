"""Which parts of the recipe matter: the bundled AR model adapted with and without each, same rows, several seeds.

    python benchmarks/recipe.py            # all variants and seeds, then the table and the plot
    python benchmarks/recipe.py --only ar_loss_0.5 --seed 1

Every run adapts the bundled AR model at block size 8 on packed rows of fresh training problems, then solves fresh test
problems in both modes. A run that is done is not done again (`benchmarks/results/recipe/`). "naive" is the token shift
alone; each variant of Fast-dLLM v2, table 2, adds one thing to the one before it; the others change one thing of
"isolated", which is what `parablock` does by default.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from common import RESULTS, setting, write

import parablock as pb
from parablock.data.word_problems import EncodedProblems
from parablock.evals.word_problems import MAX_NEW_TOKENS, evaluate, test_problems

STEPS, ROWS, PROBLEMS = 200, 16, 300
PLAIN = {"isolate_samples": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "naive": {**PLAIN, "block_padding": False, "complementary": False},
    "+ padding": {**PLAIN, "complementary": False},
    "+ complementary": PLAIN,
    "isolated": {},
    "clean first token": {"first_token_context": "clean"},
    "AR loss 0.5": {"ar_loss_weight": 0.5},
}
FOLDER = RESULTS / "recipe"


def run(variant: str, seed: int, steps: int) -> dict[str, Any]:
    """Adapt and evaluate; everything of the run depends on `variant` and `seed` alone."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, tokenizer = pb.load("bundled-ar", device="cpu")
    config = pb.TrainConfig(
        steps=steps, batch_size=ROWS, micro_batch_size=ROWS, context_length=256, block_size=8, optimizer="muon",
        lr=3e-3, muon_lr=1e-2, warmup_steps=10, log_every=20, seed=seed, **VARIANTS[variant],
    )  # fmt: skip
    samples = list(EncodedProblems(tokenizer, seed=100 + seed, count=steps * ROWS * 3))
    losses: list[float] = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        log = lambda step, logs: losses.append(logs["loss"]) if "loss" in logs else None  # noqa: E731
        pb.train(model, tokenizer, samples, config, scratch, progress=log)
    seconds = time.perf_counter() - start
    problems = test_problems(1000 + seed, PROBLEMS)
    report: dict[str, Any] = {"variant": variant, "seed": seed, "steps": steps, "seconds": seconds, "losses": losses}
    for mode in ("diffusion", "autoregressive"):
        score = evaluate(model, tokenizer, problems, pb.DecodeConfig(mode=mode, max_new_tokens=MAX_NEW_TOKENS))
        report[mode] = {"correct": score.correct, "problems": PROBLEMS, "tokens_per_forward": score.tokens_per_forward}
    return report


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean accuracy over seeds, its standard error over seeds, and the pooled binomial one."""
    row: dict[str, Any] = {"variant": runs[0]["variant"], "seeds": len(runs)}
    for mode in ("diffusion", "autoregressive"):
        shares = [r[mode]["correct"] / r[mode]["problems"] for r in runs]
        mean, count = statistics.mean(shares), sum(r[mode]["problems"] for r in runs)
        row[mode] = {
            "accuracy": mean,
            "seed_error": statistics.stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else None,
            "binomial_error": (mean * (1 - mean) / count) ** 0.5,
            "tokens_per_forward": statistics.mean(r[mode]["tokens_per_forward"] for r in runs),
        }
    row["seconds_per_step"] = statistics.median(r["seconds"] / r["steps"] for r in runs)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=VARIANTS)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for seed in range(given.seeds) if given.seed is None else [given.seed]:
        for variant in VARIANTS if given.only is None else [given.only]:
            file = FOLDER / f"{variant.replace('+ ', 'plus_').replace(' ', '_')}-{seed}.json"
            if file.exists():
                continue
            report = run(variant, seed, given.steps)
            file.write_text(json.dumps(report) + "\n")
            print(
                variant, seed, report["diffusion"], report["autoregressive"], f"{report['seconds']:.0f} s", flush=True
            )
    done = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    rows = [summary(runs) for v in VARIANTS if (runs := [r for r in done if r["variant"] == v])]
    print("\n| recipe | accuracy | tokens per forward | AR-mode accuracy | seconds per step |\n|---|---|---|---|---|")
    for row in rows:
        cells = []
        for mode in ("diffusion", "autoregressive"):
            error = max(row[mode]["seed_error"] or 0, row[mode]["binomial_error"])
            cells.append(f"{100 * row[mode]['accuracy']:.1f} ± {100 * error:.1f} %")
        forward = f"{row['diffusion']['tokens_per_forward']:.2f}"
        print(f"| {row['variant']} | {cells[0]} | {forward} | {cells[1]} | {row['seconds_per_step']:.2f} |")
    command = "python benchmarks/recipe.py"
    write("recipe", {**setting(command), "steps": STEPS, "rows": ROWS, "problems": PROBLEMS, "results": rows})


if __name__ == "__main__":
    main()
