"""Put trained weights into the package: bfloat16 checkpoints, evaluated as shipped, and the model card.

    python scripts/bundle_model.py --out runs/bundled

Reads what the stages of `recipes/bundled/` have written (see `start_bundled.py`); writes `parablock/bundled/` and, for
the card, evaluates both checkpoints on fresh test problems.
"""

import argparse
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
from start_bundled import VOCABULARY
from transformers import AutoModelForCausalLM, AutoTokenizer

from parablock.checkpoints.load import load
from parablock.checkpoints.named import BUNDLED
from parablock.checkpoints.save import save
from parablock.data.chat import encode_chat
from parablock.data.word_problems import word_problem
from parablock.decoding.config import DecodeConfig
from parablock.evals.word_problems import MAX_NEW_TOKENS, Accuracy, evaluate, test_problems
from parablock.training.recipe import make_config, read_recipe

RECIPES = Path(__file__).parents[1] / "recipes" / "bundled"
STAGES = ("ar-flat", "ar", "diffusion-8", "diffusion-early", "diffusion-flat", "diffusion")
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)


def bundle(out: Path, stage: str, target: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(out / stage / "model", dtype="bfloat16")
    path = BUNDLED / target
    shutil.rmtree(path, ignore_errors=True)
    save(model, AutoTokenizer.from_pretrained(out / stage / "model"), path)


def calibration(score: Accuracy) -> list[tuple[str, int, float, float]]:
    """Rows of (confidence range, tokens, mean confidence, share that equals the worked solution)."""
    edges = [0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.01]
    rows = []
    for low, high in itertools.pairwise(edges):
        inside = (score.confidence >= low) & (score.confidence < high)
        if inside.any():
            name = f"{low:g} to {min(high, 1.0):g}"
            rows.append(
                (name, int(inside.sum()), float(score.confidence[inside].mean()), float(score.hit[inside].mean()))
            )
    return rows


def training_table(out: Path, tokenizer: Any) -> str:
    """One line per stage: problems seen, tokens, steps, minutes."""
    per_problem = np.mean(
        [len(encode_chat(tokenizer, word_problem("train", 0, i).messages()).input_ids) for i in range(500)]
    )
    lines = ["| stage | block size | steps | problems seen | million tokens | minutes |", "|---|---|---|---|---|---|"]
    for name in STAGES:
        recipe = make_config(read_recipe(RECIPES / f"{name}.yaml"))
        seen = recipe.steps * recipe.batch_size
        minutes = json.loads((out / name / "report.json").read_text())["seconds"] / 60
        block = recipe.block_size if recipe.mode == "diffusion" else "AR"
        lines.append(f"| {name} | {block} | {recipe.steps} | {seen} | {seen * per_problem / 1e6:.1f} | {minutes:.1f} |")
    return "\n".join(lines)


def percent(score: Accuracy) -> str:
    return f"{100 * score.accuracy:.1f} ± {100 * score.standard_error:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bundled"))
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=2026, help="of the test problems")
    parser.add_argument("--hardware", default="2 cores of an AMD EPYC (Zen 3), float32")
    parser.add_argument("--diffusion-stage", default="diffusion", help="an earlier stage to ship instead")
    args = parser.parse_args()
    bundle(args.out, "ar", "ar")
    bundle(args.out, args.diffusion_stage, "diffusion")

    problems = test_problems(args.seed, args.problems)
    ar, tokenizer = load("bundled-ar")
    model, _ = load("bundled")
    baseline = evaluate(ar, tokenizer, problems, DecodeConfig(mode="autoregressive", max_new_tokens=MAX_NEW_TOKENS))
    print("AR", percent(baseline), flush=True)
    table = [
        "| decoder | accuracy | tokens per forward |",
        "|---|---|---|",
        f"| AR checkpoint | {percent(baseline)} | 1 |",
    ]
    scores = {}
    for threshold in THRESHOLDS:
        config = DecodeConfig(max_new_tokens=MAX_NEW_TOKENS, threshold=threshold)
        scores[threshold] = score = evaluate(model, tokenizer, problems, config)
        table.append(f"| block diffusion, threshold {threshold} | {percent(score)} | {score.tokens_per_forward:.2f} |")
        print(table[-1], flush=True)
    for size in (16, 32):
        score = evaluate(model, tokenizer, problems, DecodeConfig(max_new_tokens=MAX_NEW_TOKENS, sub_block_size=size))
        name = f"block diffusion, threshold 0.9, sub-block {size}"
        table.append(f"| {name} | {percent(score)} | {score.tokens_per_forward:.2f} |")
        print(table[-1], flush=True)
    calibrated = ["| confidence | tokens | mean confidence | equal to the worked solution |", "|---|---|---|---|"]
    for name, count, mean, share in calibration(scores[0.9]):
        calibrated.append(f"| {name} | {count} | {mean:.3f} | {share:.3f} |")

    size = sum(f.stat().st_size for f in BUNDLED.rglob("*.safetensors")) / 2**20
    card = (Path(__file__).parent / "model_card.md").read_text()
    values = {
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}",
        "vocabulary": VOCABULARY,
        "size": f"{size:.1f}",
        "problems": args.problems,
        "seed": args.seed,
        "hardware": args.hardware,
        "training": training_table(args.out, tokenizer),
        "results": "\n".join(table),
        "calibration": "\n".join(calibrated),
    }
    for name, value in values.items():
        card = card.replace("{{" + name + "}}", str(value))
    scratch = BUNDLED / "README.part"
    scratch.write_text(card)
    scratch.replace(BUNDLED / "README.md")
    shutil.copy(Path(__file__).parent.parent / "LICENSE", BUNDLED / "LICENSE")


if __name__ == "__main__":
    main()
