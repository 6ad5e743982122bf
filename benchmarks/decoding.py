"""Batch-1 decoding speed at its accuracy: AR against block diffusion, each in its fastest dtype and thread count.

    python benchmarks/decoding.py

Every problem is solved by every decoder in turn (see `parablock/bench/compare.py`). Prints a table and where the time
goes, then one JSON line; writes `benchmarks/results/decoding.json` and `docs/images/thresholds.png`, `denoising.png`.
"""

import argparse
import os
import statistics
import time
from collections import defaultdict
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from common import PICTURES, setting, write
from rich.console import Console

import parablock as pb
from parablock.bench.compare import compare
from parablock.data.chat import encode_prompt
from parablock.demo import CHOSEN, contenders, draw_pictures, name_of, print_table
from parablock.evals.word_problems import test_problems


def where_time_goes(contender: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Milliseconds per forward by kind and query length, and the share of the time spent inside the model."""
    import torch

    torch.set_num_threads(contender.threads)
    inside: list[tuple[int, float]] = []
    plain = contender.model.forward

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        out = plain(*args, **kwargs)
        inside.append((kwargs["input_ids"].shape[1], time.perf_counter() - started))
        return out

    contender.model.forward = timed
    try:
        total = 0.0
        by_kind: dict[str, list[float]] = defaultdict(list)
        for prompt in prompts:
            started = last = time.perf_counter()
            for step in pb.stream(contender.model, prompt, contender.config):
                now = time.perf_counter()
                kind = "prefill" if step.kind == "prefill" else f"{step.kind}, {inside[-1][0]} tokens"
                by_kind[kind].append(now - last)
                last = now
            total += time.perf_counter() - started
    finally:
        del contender.model.forward
    return {
        "model_share": sum(seconds for _, seconds in inside) / total,
        "forwards": {
            kind: {
                "count_per_answer": round(len(times) / len(prompts), 2),
                "median_ms": round(1000 * statistics.median(times), 2),
                "share_of_time": round(sum(times) / total, 3),
            }
            for kind, times in sorted(by_kind.items())
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    console = Console(highlight=False)
    problems = test_problems(args.seed, args.problems)
    diffusion, tokenizer = pb.load("bundled", device="cpu")
    ar, _ = pb.load("bundled-ar", device="cpu")
    decoders = contenders(ar, diffusion, None, tokenizer, problems[0], console)
    results = compare(decoders, tokenizer, problems)
    print_table(results, console)
    chosen = [d.name for d in decoders].index(name_of(CHOSEN))
    prompts = [encode_prompt(tokenizer, p.messages()[:1]) for p in problems[:30]]
    breakdown = {decoders[i].name: where_time_goes(decoders[i], prompts) for i in (0, chosen)}
    for name, parts in breakdown.items():
        print(f"{name}: {100 * parts['model_share']:.0f} % of the time inside the model")
        for kind, row in parts["forwards"].items():
            print(
                f"  {kind:28s} {row['count_per_answer']:6.2f} per answer  {row['median_ms']:6.2f} ms  "
                f"{100 * row['share_of_time']:4.1f} % of the time"
            )
    PICTURES.mkdir(parents=True, exist_ok=True)
    draw_pictures(PICTURES, results, diffusion, tokenizer, problems[0])
    write(
        "decoding",
        {
            "setting": setting(f"python benchmarks/decoding.py --problems {args.problems} --seed {args.seed}"),
            "results": [r.as_dict() for r in results],
            "where_time_goes": breakdown,
        },
    )


if __name__ == "__main__":
    main()
