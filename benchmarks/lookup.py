"""Drafts that are looked up, without any training, on a pretrained chat model: tokens per forward, and speed over AR.

    python benchmarks/lookup.py MODEL GSM8K_TEST.jsonl HUMANEVAL.jsonl.gz

GSM8K questions behind five worked examples, HumanEval's functions to complete; greedy, one request at a time, the same
prompts in turns by autoregressive decoding, by lookup as it pays, and by lookup with 3 drafts in every forward. Writes
`benchmarks/results/lookup.json`.
"""

import argparse
import gzip
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import numpy as np

import parablock as pb
from parablock.data.chat import encode_prompt

AR = pb.DecodeConfig(mode="autoregressive", max_new_tokens=128)
LOOKUP = replace(AR, mode="speculative", drafter="lookup")
DECODERS = {"AR": AR, "lookup": LOOKUP, "lookup, 3 drafts": replace(LOOKUP, draft_tokens=3)}


def gsm8k(path: Path, count: int) -> list[str]:
    """Questions, each behind the same five examples with their answers."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    shots = "\n\n".join(f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows[-5:])
    return [f"{shots}\n\nQuestion: {row['question']}\nAnswer:" for row in rows[:count]]


def human_eval(path: Path, count: int) -> list[str]:
    """Functions to complete."""
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    return [f"Complete this Python function:\n\n```python\n{row['prompt']}```" for row in rows[:count]]


def measure(model: Any, prompts: list[list[int]], repeats: int) -> dict[str, Any]:
    """Every prompt by every decoder in turn: a figure per decoder, with quartiles of the ratio to AR by prompt."""
    seen: dict[str, list[tuple[float, Any]]] = {name: [] for name in DECODERS}
    with pb.Engine(model, pb.EngineConfig(max_rows=1, prefix_cache=True)) as engine:
        for decode in DECODERS.values():
            engine.generate(prompts[0], decode)  # and the examples' K/V are kept from here on
        for prompt in prompts * repeats:
            for name, decode in DECODERS.items():
                began = time.perf_counter()
                out = engine.generate(prompt, decode)
                seen[name].append((time.perf_counter() - began, out))
            equal = [seen[name][-1][1].tokens == seen["AR"][-1][1].tokens for name in DECODERS]
            print(len(seen["AR"]), equal, flush=True)
    report = {}
    for name, runs in seen.items():
        tokens, seconds = sum(out.new_tokens for _, out in runs), sum(took for took, _ in runs)
        equal = [ar[1].tokens == own[1].tokens for ar, own in zip(seen["AR"], runs, strict=True)]
        ratios = [ar[0] / own[0] for ar, own in zip(seen["AR"], runs, strict=True)]
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        report[name] = {
            "tokens_per_forward": tokens / sum(out.decode_forwards[0] for _, out in runs),
            "tokens_per_second": tokens / seconds, "over_ar": [low, middle, high],
            "drafted": sum(out.drafted[0] for _, out in runs), "accepted": sum(out.accepted[0] for _, out in runs),
            "equal_answers": float(np.mean(equal)),
        }  # fmt: skip
        print(name, json.dumps(report[name]), flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("gsm8k", type=Path)
    parser.add_argument("human_eval", type=Path)
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--dtype", default=None)
    args = parser.parse_args()
    model, tokenizer = pb.load(args.model, device="cpu", dtype=args.dtype)
    texts = {
        "GSM8K, 5 examples": gsm8k(args.gsm8k, args.prompts),
        "HumanEval": human_eval(args.human_eval, args.prompts),
    }
    tasks = {}
    for task, prompts in texts.items():
        print(task, flush=True)
        ids = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in prompts]
        tasks[task] = measure(model, ids, args.repeats)
    size = {
        "prompts": args.prompts,
        "repeats": args.repeats,
        "dtype": str(model.dtype),
        "model": "SmolLM2-135M-Instruct",
    }
    command = f"python benchmarks/lookup.py MODEL GSM8K HUMANEVAL --prompts {args.prompts} --repeats {args.repeats}"
    setting = {"command": command, "commit": common.commit(), **common.machine()}
    name = "lookup" if args.dtype is None else f"lookup-{args.dtype}"
    common.write(name, {"setting": setting, **size, "tasks": tasks})


if __name__ == "__main__":
    main()
