"""The tables of Fast-dLLM v2 (arXiv 2509.26328) in miniature: measures what `page.py results` shows.

    python benchmarks/paper.py                       # every part that has no results yet, some hours
    python benchmarks/paper.py cache strategies      # these parts, anew

- training: the recipe with and without its parts (table 2), and the models that the other parts decode with;
- sub-blocks, block-sizes: sizes at inference (tables 3 and 4);
- thresholds: accuracy and speed against the threshold (figure 4);
- cache: the sub-block cache on and off (figure 6);
- strategies: threshold, factor and fixed number, at equal accuracy;
- staleness: the K/V that the sub-block cache keeps, against fresh ones.

Each part writes `benchmarks/results/paper-<part>.json`, whole or not at all.
"""

from common import RESULTS, options, setting, write
from paper_decoding import block_sizes, cache, strategies, sub_blocks, thresholds
from paper_staleness import staleness
from paper_training import training

PARTS = {
    "training": training, "sub-blocks": sub_blocks, "block-sizes": block_sizes, "thresholds": thresholds,
    "cache": cache, "strategies": strategies, "staleness": staleness,
}  # fmt: skip


def main() -> None:
    args = options(__doc__, PARTS, problems=300, repeats=3)
    for part in args.parts or [part for part in PARTS if not (RESULTS / f"paper-{part}.json").exists()]:
        print(f"{part}:", flush=True)
        size = {"problems": args.problems, "repeats": args.repeats}
        write(f"paper-{part}", {"setting": setting(args, part), **size, **PARTS[part](**size)}, indent=1)


if __name__ == "__main__":
    main()
