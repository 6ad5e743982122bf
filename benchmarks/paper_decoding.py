"""The parts of `paper.py` that decode: which settings each one compares, and what it keeps of every answer.

For one model all settings answer the same fresh test problems; every model has problems of its own. Answers come from
the engine, whose tokens are those of the reference loop, on one thread, so that they depend on nothing else. Per
setting and model a part keeps a line of ones and zeros (which answers are right) and the tokens and decode forwards of
every answer.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import in_processes, questions
from paper_training import SEEDS, train_model
from transformers.utils import logging

import parablock as pb
from parablock.bench.config import BenchConfig
from parablock.bench.throughput import Workload, measure
from parablock.data.word_problems import Problem
from parablock.evals.word_problems import MAX_NEW_TOKENS, is_correct, test_problems

MODELS = (*(f"seed-{seed}" for seed in SEEDS), "bundled")
BLOCK, ROWS = 32, 64
REQUESTS = 12  # of a measured speed, or twice the number in flight, whichever is more
MEASURED = ("tokens_per_second", "tokens_per_forward", "queries_per_token")
SUB_BLOCKS = (1, 2, 4, 8, 16, 32)
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
# every strategy from careful to all at once; in whole blocks, where there is most to choose from
SWEEPS: dict[str, tuple[str, tuple[float, ...]]] = {
    "threshold": ("threshold", (0.999, 0.99, 0.95, 0.9, 0.8, 0.65, 0.5, 0.35, 0.2)),
    "factor": ("factor", (0.01, 0.1, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0, 16.0)),
    "fixed": ("tokens_per_step", (1, 2, 3, 4, 6, 8, 12, 16, 32)),
}

decode = partial(pb.DecodeConfig, max_new_tokens=MAX_NEW_TOKENS)


def load(name: str) -> tuple[Any, Any]:
    """`seed-N` is trained if it does not lie there yet."""
    logging.disable_progress_bar()
    where: str | Path = train_model(int(name.removeprefix("seed-"))) if name.startswith("seed-") else name
    return pb.load(str(where), device="cpu", dtype="float32")


def problems_of(name: str, count: int) -> list[Problem]:
    """A model's problems: fresh, and its own."""
    return test_problems(2000 + MODELS.index(name), count)


def of_models(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """`function` of every model, by its name."""
    return dict(zip(MODELS, in_processes(function, [(name, *arguments) for name in MODELS]), strict=True))


def answer(model: Any, tokenizer: Any, problems: list[Problem], config: pb.DecodeConfig) -> dict[str, str]:
    """Which problems are solved with `config`, in how many tokens and decode forwards each."""
    size = pb.EngineConfig(max_rows=ROWS, block_size=config.block_size or BLOCK, prefix_cache=False, threads=1)
    with pb.Engine(model, size) as engine:
        out = engine.generate(questions(tokenizer, problems), config)
    return {
        "right": "".join(str(int(is_correct(tokenizer, t, p))) for t, p in zip(out.tokens, problems, strict=True)),
        "tokens": " ".join(str(len(t)) for t in out.tokens),
        "forwards": " ".join(map(str, out.decode_forwards)),
    }


def answers(name: str, count: int, settings: dict[str, pb.DecodeConfig]) -> dict[str, dict[str, str]]:
    """What a model answers, by setting; with the setting "bundled-ar" the AR model answers the same problems."""
    torch.set_num_threads(1)
    (model, tokenizer), problems, found = load(name), problems_of(name, count), {}
    for key, config in settings.items():
        found[key] = answer(load(key)[0] if key == "bundled-ar" else model, tokenizer, problems, config)
        print(f"{name:8s} {key:24s} {found[key]['right'].count('1') / count:6.1%}", flush=True)
    return found


def speeds(repeats: int, **lists: Any) -> dict[str, list[dict[str, Any]]]:
    """By model what every repeat measured of every case, AR by the bundled AR model among them."""
    config = BenchConfig(new_tokens=MAX_NEW_TOKENS, requests=REQUESTS, repeats=repeats, **lists)
    found, (ar, _) = {}, load("bundled-ar")
    for name in MODELS:
        model, tokenizer = load(name)
        prompts = questions(tokenizer, problems_of(name, 256))
        found[name] = [
            {
                "mode": case.mode, "in_flight": case.concurrency, "threshold": case.threshold,
                "sub_block": case.sub_block_size, "cache": case.sub_block_cache,
                **{field: [round(getattr(repeat, field), 4) for repeat in measured] for field in MEASURED},
            }
            for case, measured in measure(Workload({"diffusion": model, "autoregressive": ar}, prompts, 600), config)
        ]  # fmt: skip
        print(f"{name:8s} {len(found[name])} speeds", flush=True)
    return found


def sub_blocks(problems: int, repeats: int) -> dict[str, Any]:
    """Table 3: sub-block sizes in blocks of the trained size."""
    return {"answers": of_models(answers, problems, {str(n): decode(sub_block_size=n) for n in SUB_BLOCKS})}


def block_sizes(problems: int, repeats: int) -> dict[str, Any]:
    """Table 4: other block sizes than in training, and the trained one in sub-blocks of these sizes."""
    settings = {f"block {n}": decode(block_size=n, sub_block_size=n) for n in SUB_BLOCKS[1:] if n < BLOCK}
    settings["block 16, sub-block 8"] = decode(block_size=16, sub_block_size=8)
    settings |= {f"sub-block {n}": decode(sub_block_size=n) for n in SUB_BLOCKS[1:]}
    return {"answers": of_models(answers, problems, settings)}


def thresholds(problems: int, repeats: int) -> dict[str, Any]:
    """Figure 4: accuracy, tokens per forward and speed (one request at a time), with AR beside."""
    settings = {str(value): decode(threshold=value) for value in THRESHOLDS}
    settings |= dict.fromkeys(("AR mode", "bundled-ar"), decode(mode="autoregressive"))
    return {
        "answers": of_models(answers, problems, settings),
        "speeds": speeds(repeats, concurrency=(1,), thresholds=THRESHOLDS),
    }


def cache(problems: int, repeats: int) -> dict[str, Any]:
    """Figure 6: the sub-block cache on and off, by batch size and by sub-block size."""
    both = {"on": True, "off": False}
    settings = {
        f"{n}, {state}": decode(sub_block_size=n, sub_block_cache=on)
        for n in SUB_BLOCKS[1:] for state, on in both.items()
    }  # fmt: skip
    lists = {"sub_block_cache": tuple(both.values())}
    return {
        "answers": of_models(answers, problems, settings),
        "by_batch": speeds(repeats, concurrency=(1, 4, 16, 32, 64), sub_block_sizes=(8,), **lists),
        "by_sub_block": speeds(repeats, concurrency=(1, 32), sub_block_sizes=(2, 4, 16, 32), **lists),
    }


def strategies(problems: int, repeats: int) -> dict[str, Any]:
    """The three ways to choose what is revealed, each from slow to fast."""
    settings = {
        f"{strategy} {value:g}": decode(strategy=strategy, sub_block_size=BLOCK, **{parameter: value})
        for strategy, (parameter, values) in SWEEPS.items() for value in values
    }  # fmt: skip
    return {"answers": of_models(answers, problems, settings)}
