"""The tables of Fast-dLLM v2 (arXiv 2509.26328) in miniature, and `docs/results.md` from them.

    python benchmarks/paper.py                                  # every part that has no results yet, then the page
    python benchmarks/paper.py cache strategies page            # these parts, anew
    python benchmarks/paper.py training --only naive --seed 1   # one training run; several can run beside one another

- training: the recipe with and without its parts (table 2), and the models that the other parts decode with;
- sub-blocks, block-sizes: sizes at inference (tables 3 and 4);
- thresholds: accuracy and speed against the threshold (figure 4);
- cache: the sub-block cache on and off (figure 6);
- strategies: threshold, factor and fixed number, at equal accuracy;
- staleness: the K/V that the sub-block cache keeps, against fresh ones.

Each part writes `benchmarks/results/paper-<part>.json`, whole or not at all; `page` turns them into the page and its
plots.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from common import PICTURES, RESULTS, setting, write_json
from paper_decoding import MODELS, PROBLEMS, REPEATS, block_sizes, cache, strategies, sub_blocks, thresholds
from paper_page import page
from paper_staleness import staleness
from paper_training import FOLDER, VARIANTS, run_variant, summary, train_model

from parablock.evals.files import write_text

DOCUMENT = PICTURES.parent / "results.md"
SEEDS = (0, 1, 2)
DECODING: dict[str, Callable[..., dict[str, Any]]] = {
    "sub-blocks": sub_blocks,
    "block-sizes": block_sizes,
    "thresholds": thresholds,
    "cache": cache,
    "strategies": strategies,
    "staleness": staleness,
}
PARTS = ("training", *DECODING)


def training() -> dict[str, Any]:
    """All runs that are not done yet, then what they came to."""
    for seed in SEEDS:
        for variant in VARIANTS:
            run_variant(variant, seed)
        train_model(seed)
    kept = ("variant", "seed", "steps", "commit", "diffusion", "autoregressive")
    runs = [json.loads(file.read_text()) for file in sorted(FOLDER.glob("*.json"))]
    return {"rows": summary(), "runs": [{name: run[name] for name in kept} for run in runs]}


def documents() -> None:
    """The page and its plots, from what has been measured."""
    files = {part: RESULTS / f"paper-{part}.json" for part in PARTS}
    PICTURES.mkdir(parents=True, exist_ok=True)
    measured = {part: json.loads(file.read_text()) for part, file in files.items() if file.exists()}
    if not measured:
        sys.exit("nothing has been measured yet; run some of " + ", ".join(PARTS))
    print(write_text(DOCUMENT, page(measured, PICTURES)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}, page")
    parser.add_argument("--problems", type=int, default=PROBLEMS, help="per model and setting")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of every throughput, per model")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS, metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--only", choices=VARIANTS, metavar="VARIANT", help="training: this variant alone")
    parser.add_argument("--seed", type=int, choices=SEEDS, help="training: this seed alone")
    args = parser.parse_args()
    for part in args.parts:
        if part not in (*PARTS, "page"):
            parser.error(f"{part} is no part; use {', '.join(PARTS)} or page")
    if args.only is not None or args.seed is not None:
        if args.parts != ["training"]:
            parser.error("--only and --seed choose runs of the part training")
        for seed in SEEDS if args.seed is None else (args.seed,):
            for variant in VARIANTS if args.only is None else (args.only,):
                run_variant(variant, seed)
            if args.only is None:
                train_model(seed)
        return
    for part in args.parts or [*PARTS, "page"]:
        file = RESULTS / f"paper-{part}.json"
        if part == "page":
            documents()
        elif not args.parts and file.exists():
            print(f"{part}: measured already, {file}")
        else:
            print(f"{part}:", flush=True)
            measure(part, args)


def measure(part: str, args: argparse.Namespace) -> None:
    options = "" if part == "training" else f" --problems {args.problems} --repeats {args.repeats}"
    options += "" if tuple(args.models) == MODELS else f" --models {' '.join(args.models)}"
    report: dict[str, Any] = {"setting": setting(f"python benchmarks/paper.py {part}{options}")}
    if part == "training":
        report |= training()
    else:
        report |= {"problems": args.problems, "repeats": args.repeats}
        report |= DECODING[part](args.models, args.problems, args.repeats)
    write_json(RESULTS / f"paper-{part}.json", report, indent=1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped; the parts that were done are kept")
