"""System throughput of a whole batch: AR against block diffusion, all rows decoded together.

    python benchmarks/batch.py

Repeats alternate between the decoders. Prints a table, then one JSON line; writes `benchmarks/results/batch.json`.
"""

import argparse
import os
import statistics

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from common import setting, write

import parablock as pb
from parablock.data.chat import encode_prompt
from parablock.evals.word_problems import MAX_NEW_TOKENS, test_problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    diffusion, tokenizer = pb.load("bundled", device="cpu")
    ar, _ = pb.load("bundled-ar", device="cpu")
    prompts = [encode_prompt(tokenizer, p.messages()[:1]) for p in test_problems(5, args.batch)]
    decoders = {
        "autoregressive": (ar, pb.DecodeConfig(mode="autoregressive", max_new_tokens=MAX_NEW_TOKENS)),
        "block diffusion, 0.9": (diffusion, pb.DecodeConfig(max_new_tokens=MAX_NEW_TOKENS)),
        "block diffusion, 0.9, sub-block 32": (
            diffusion,
            pb.DecodeConfig(max_new_tokens=MAX_NEW_TOKENS, sub_block_size=32),
        ),
    }
    speeds: dict[str, list[float]] = {name: [] for name in decoders}
    for repeat in range(args.repeats + 1):
        for name, (model, config) in decoders.items():
            out = pb.generate(model, prompts, config)
            if repeat:  # the first round warms up
                speeds[name].append(out.tokens_per_second)
    print(
        f"batch {args.batch}, {torch.get_num_threads()} threads, float32; medians of {args.repeats} interleaved repeats"
    )
    report = {}
    for name, values in speeds.items():
        ratios = sorted(v / b for v, b in zip(values, speeds["autoregressive"], strict=True))
        report[name] = {
            "tokens_per_second": {"median": statistics.median(values), "min": min(values), "max": max(values)},
            "speed_up": {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]},
        }
        print(f"  {name:36s} {statistics.median(values):6.0f} tokens/s  {statistics.median(ratios):.2f}x")
    write("batch", {"setting": setting(f"python benchmarks/batch.py --batch {args.batch}"), "decoders": report})


if __name__ == "__main__":
    main()
