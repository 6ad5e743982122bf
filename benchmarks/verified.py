"""Verified block diffusion beside the threshold: accuracy and tokens per forward on the bundled task.

    python benchmarks/verified.py bundled seed-0

`seed-N` is a model of the ablation (`paper_training.train_model`), which is trained if it is not there: not for long,
and with an autoregressive loss beside. Each model writes `benchmarks/results/verified-MODEL.json`.

For every sub-block size all of them answer the same fresh test problems; the sizes have problems of their own.
Answers come from the engine on one thread. Errors: of an accuracy binomial, of a ratio the spread of 400 draws of the
problems. `queries_per_token`: tokens that the decode forwards ran over, per token of the answers. `accepted`: of
drafted tokens. `alike`: the share of answers that are those of the threshold 0.9, token for token.
"""

from typing import Any

import numpy as np
import torch
from common import options, questions, setting, write
from paper_training import SEEDS, train_model

import parablock as pb
from parablock.data.word_problems import Problem
from parablock.evals.word_problems import MAX_NEW_TOKENS, is_correct, test_problems

SUB_BLOCKS = (4, 8, 16, 32)
CONTENDERS: dict[str, dict[str, Any]] = {
    "threshold 0.9": {"threshold": 0.9}, "threshold 0.5": {"threshold": 0.5}, "verified": {"strategy": "verified"}
}  # fmt: skip
ROWS, DRAWS = 16, 400


def measure(model: Any, tokenizer: Any, problems: list[Problem], config: pb.DecodeConfig) -> dict[str, Any]:
    """One setting: its figures, and the tokens and forwards of every answer."""
    prompts = questions(tokenizer, problems)
    prefill = sum(len(p) // model.config.bd_size * model.config.bd_size for p in prompts)
    with pb.Engine(model, pb.EngineConfig(max_rows=ROWS, prefix_cache=False, threads=1)) as engine:
        before = engine.runner.queries
        out = engine.generate(prompts, config)
        queries = engine.runner.queries - before - prefill
    right = np.array([is_correct(tokenizer, t, p) for t, p in zip(out.tokens, problems, strict=True)])
    lengths, forwards = np.array([len(t) for t in out.tokens]), np.array(out.decode_forwards)
    drawn = np.random.default_rng(0).integers(0, len(problems), (DRAWS, len(problems)))
    return {
        "accuracy": round(float(right.mean()), 4),
        "accuracy_error": round(float(np.sqrt(right.mean() * (1 - right.mean()) / len(right))), 4),
        "tokens_per_forward": round(out.tokens_per_forward, 3),
        "tokens_per_forward_error": round(float((lengths[drawn].sum(1) / forwards[drawn].sum(1)).std()), 3),
        "queries_per_token": round(queries / out.new_tokens, 3),
        "accepted": round(sum(out.accepted) / max(1, sum(out.drafted)), 4),
        "answers": out.tokens,
    }


def main() -> None:
    args = options(__doc__, ["bundled", *(f"seed-{seed}" for seed in SEEDS)], problems=300)
    torch.set_num_threads(1)
    for name in args.parts or ["bundled"]:
        path = name if name == "bundled" else train_model(int(name.removeprefix("seed-")))
        figures = compare(path, args.problems)
        write(f"verified-{name}", {"setting": setting(args, name), "model": name, "figures": figures})


def compare(path: Any, count: int) -> list[dict[str, Any]]:
    """The contenders at every sub-block size."""
    model, tokenizer = pb.load(path, device="cpu", dtype="float32")
    figures = []
    for place, size in enumerate(SUB_BLOCKS):
        problems = test_problems(3000 + place, count)
        found = {
            name: measure(
                model, tokenizer, problems,
                pb.DecodeConfig(max_new_tokens=MAX_NEW_TOKENS, sub_block_size=size, **settings),
            )
            for name, settings in CONTENDERS.items()
        }  # fmt: skip
        first, *others = (figure.pop("answers") for figure in found.values())
        for name, answers in zip(list(found)[1:], others, strict=True):
            found[name]["alike"] = round(sum(a == b for a, b in zip(first, answers, strict=True)) / count, 4)
        figures.append({"sub_block_size": size, **found})
        print(figures[-1], flush=True)
    return figures


if __name__ == "__main__":
    main()
