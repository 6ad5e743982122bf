"""Batch-1 decoding speed at its accuracy: AR against block diffusion, each in its fastest dtype.

    python benchmarks/decoding.py

Every problem is solved by every decoder in turn (see `parablock/bench/compare.py`). Prints a table and where the time
goes; writes `benchmarks/results/decoding.json` and `docs/images/thresholds.png`, `denoising.png`.
"""

import time
from typing import Any

import common
import pandas as pd
from rich.console import Console

import parablock as pb
from parablock.bench.compare import compare
from parablock.demo.puzzles import CHOSEN, contenders, draw_pictures, name_of, print_table
from parablock.evals.word_problems import test_problems


def where_time_goes(contender: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Milliseconds per forward by query length, and the share of the time spent inside the model."""
    model, rows, forward = contender.model, [], {}

    def began(module: Any, args: Any, kwargs: Any) -> None:
        forward.update(tokens=kwargs["input_ids"].shape[1], began=time.perf_counter())

    hooks = (
        model.register_forward_pre_hook(began, with_kwargs=True),
        model.register_forward_hook(lambda *_: forward.update(inside=time.perf_counter() - forward["began"])),
    )
    for prompt in prompts:
        last = time.perf_counter()
        for step in pb.stream(model, prompt, contender.config):
            kind = f"{forward['tokens']} tokens" if step.decode_forwards[0] else "prefill"
            now = time.perf_counter()
            rows.append({"kind": kind, "seconds": now - last, "inside": forward["inside"]})
            last = now
    for hook in hooks:
        hook.remove()
    steps = pd.DataFrame(rows)
    total, by_kind = steps.seconds.sum(), steps.groupby("kind").seconds
    forwards = pd.DataFrame({
        "count_per_answer": (by_kind.count() / len(prompts)).round(2),
        "median_ms": (1000 * by_kind.median()).round(2),
        "share_of_time": (by_kind.sum() / total).round(3),
    })  # fmt: skip
    print(f"{contender.name}: {steps.inside.sum() / total:.0%} of the time inside the model\n{forwards}")
    return {"model_share": steps.inside.sum() / total, "forwards": forwards.to_dict("index")}


def main() -> None:
    args = common.options(__doc__, problems=200, seed=11)
    console = Console(highlight=False)
    problems = test_problems(args.seed, args.problems)
    diffusion, tokenizer = pb.load("bundled", device="cpu")
    ar, _ = pb.load("bundled-ar", device="cpu")
    decoders = contenders(ar, diffusion, tokenizer, problems[0], console)
    results = compare(decoders, tokenizer, problems)
    print_table(results, console)
    prompts = common.questions(tokenizer, problems[:30])
    chosen = [decoders[0], *(decoder for decoder in decoders if decoder.name == name_of(CHOSEN))]
    breakdown = {decoder.name: where_time_goes(decoder, prompts) for decoder in chosen}
    common.PICTURES.mkdir(parents=True, exist_ok=True)
    draw_pictures(common.PICTURES, results, diffusion, tokenizer, problems[0])
    rows = [result.as_dict() for result in results]
    common.write("decoding", {"setting": common.setting(args), "results": rows, "where_time_goes": breakdown})


if __name__ == "__main__":
    main()
