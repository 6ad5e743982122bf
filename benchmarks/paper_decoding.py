"""The parts of `paper.py` that decode: which settings each one compares, and what it keeps of every answer.

For one model all settings answer the same fresh test problems; every model has problems of its own. Answers come from
the engine, whose tokens are those of the reference loop, on one thread, so that they depend on nothing else. Per
setting and model a part keeps a line of ones and zeros (which answers are right) and the tokens and decode forwards of
every answer.
"""

import multiprocessing
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from paper_training import train_model
from transformers.utils import logging

import parablock as pb
from parablock.bench.config import BenchConfig
from parablock.bench.throughput import Workload, measure
from parablock.data.chat import encode_prompt
from parablock.data.word_problems import Problem
from parablock.evals.word_problems import MAX_NEW_TOKENS, is_correct, test_problems

MODELS = ("seed-0", "seed-1", "seed-2", "bundled")
PROBLEMS = 300  # per model and setting
BLOCK, ROWS = 32, 64
WORKERS = 2  # models that answer at the same time, each on one thread
REPEATS = 3  # of every throughput, per model
REQUESTS = 12  # or twice the number in flight, whichever is more
SUB_BLOCKS = (1, 2, 4, 8, 16, 32)
BLOCKS = (2, 4, 8, 16, 32)
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
BATCHES = (1, 4, 16, 32, 64)
CACHE_SUB_BLOCKS = (2, 4, 8, 16, 32)
# every strategy from careful to all at once; in whole blocks, where there is most to choose from
SWEEPS: dict[str, tuple[str, tuple[float, ...]]] = {
    "threshold": ("threshold", (0.999, 0.99, 0.95, 0.9, 0.8, 0.65, 0.5, 0.35, 0.2)),
    "factor": ("factor", (0.01, 0.1, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0, 16.0)),
    "fixed": ("tokens_per_step", (1, 2, 3, 4, 6, 8, 12, 16, 32)),
}
STRATEGY_SUB_BLOCK = 32

Answers = dict[str, str]  # of one model with one setting
Settings = dict[str, pb.DecodeConfig]


def load(name: str) -> tuple[Any, Any]:
    """`seed-N` is trained if it does not lie there yet."""
    logging.disable_progress_bar()
    where: str | Path = train_model(int(name.removeprefix("seed-"))) if name.startswith("seed-") else name
    return pb.load(str(where), device="cpu", dtype="float32")


def questions(name: str, count: int) -> list[Problem]:
    """The problems of a model: fresh, and its own."""
    return test_problems(2000 + MODELS.index(name), count)


def prompts_of(tokenizer: Any, problems: Sequence[Problem]) -> list[list[int]]:
    return [encode_prompt(tokenizer, p.messages()[:1]) for p in problems]


def decode(**settings: Any) -> pb.DecodeConfig:
    return pb.DecodeConfig(max_new_tokens=MAX_NEW_TOKENS, **settings)


def answer(model: Any, tokenizer: Any, problems: Sequence[Problem], config: pb.DecodeConfig) -> Answers:
    """Which problems are solved with `config`, in how many tokens and decode forwards each."""
    size = pb.EngineConfig(
        max_rows=ROWS, block_size=config.block_size or BLOCK, prefix_cache=False, threads=1,
    )  # fmt: skip
    with warnings.catch_warnings(), pb.Engine(model, size) as engine:
        warnings.simplefilter("ignore")  # another block size than in training: that is the question
        out = engine.generate(prompts_of(tokenizer, problems), config)
    return {
        "right": "".join(str(int(is_correct(tokenizer, t, p))) for t, p in zip(out.tokens, problems, strict=True)),
        "tokens": " ".join(str(len(t)) for t in out.tokens),
        "forwards": " ".join(map(str, out.decode_forwards)),
    }


def over_models(function: Callable[[str], dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """`function` of every model, `WORKERS` at a time; Ctrl-C ends them all."""
    for name in names:
        load(name)  # trained here, if it has to be
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(min(WORKERS, len(names)), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        return dict(zip(names, pool.map(function, names, chunksize=1), strict=True))


def answers(names: Sequence[str], count: int, settings: Settings, *, ar_model: bool = False) -> dict[str, Any]:
    """By model and setting; `ar_model`: the bundled AR model answers the same problems beside."""
    return over_models(partial(_answers, count=count, settings=settings, ar_model=ar_model), names)


def _answers(name: str, count: int, settings: Settings, ar_model: bool) -> dict[str, Answers]:
    torch.set_num_threads(1)
    (model, tokenizer), problems = load(name), questions(name, count)
    contenders = [(key, model, config) for key, config in settings.items()]
    if ar_model:
        contenders.append(("bundled-ar", load("bundled-ar")[0], decode(mode="autoregressive")))
    found = {}
    for key, which, config in contenders:
        started = time.perf_counter()
        found[key] = answer(which, tokenizer, problems, config)
        share = found[key]["right"].count("1") / count
        print(f"{name:8s} {key:24s} {100 * share:5.1f} %  {time.perf_counter() - started:5.1f} s", flush=True)
    return found


def speeds(names: Sequence[str], config: BenchConfig) -> dict[str, list[dict[str, Any]]]:
    """By model the cases of `config`, AR by the bundled AR model among them: what every repeat measured."""
    found = {}
    ar, _ = load("bundled-ar")
    for name in names:
        model, tokenizer = load(name)
        prompts = prompts_of(tokenizer, questions(name, 256))
        workload = Workload({"diffusion": model, "autoregressive": ar}, prompts, 600)
        started = time.perf_counter()
        results = measure(workload, config)
        print(f"{name:8s} {len(results)} speeds  {time.perf_counter() - started:5.1f} s", flush=True)
        found[name] = [
            {
                "mode": case.mode, "in_flight": case.concurrency, "threshold": case.threshold,
                "sub_block": case.sub_block_size, "cache": case.sub_block_cache,
                **{
                    field: [round(getattr(m, field), 4) for m in measured]
                    for field in ("tokens_per_second", "tokens_per_forward", "queries_per_token")
                },
            }
            for case, measured in results
        ]  # fmt: skip
    return found


def _bench(repeats: int, **lists: Any) -> BenchConfig:
    return BenchConfig(new_tokens=MAX_NEW_TOKENS, requests=REQUESTS, repeats=repeats, **lists)


def sub_blocks(names: Sequence[str], count: int, repeats: int) -> dict[str, Any]:
    """Table 3: sub-block sizes in blocks of the trained size."""
    return {"answers": answers(names, count, {str(size): decode(sub_block_size=size) for size in SUB_BLOCKS})}


def block_sizes(names: Sequence[str], count: int, repeats: int) -> dict[str, Any]:
    """Table 4: other block sizes than in training, and the trained one in sub-blocks of these sizes."""
    settings = {f"block {size}": decode(block_size=size, sub_block_size=size) for size in BLOCKS if size < BLOCK}
    settings["block 16, sub-block 8"] = decode(block_size=16, sub_block_size=8)
    settings |= {f"sub-block {size}": decode(sub_block_size=size) for size in BLOCKS}
    return {"answers": answers(names, count, settings)}


def thresholds(names: Sequence[str], count: int, repeats: int) -> dict[str, Any]:
    """Figure 4: accuracy, tokens per forward and speed (one request at a time), with AR beside."""
    settings = {str(value): decode(threshold=value) for value in THRESHOLDS}
    settings["AR mode"] = decode(mode="autoregressive")
    return {
        "answers": answers(names, count, settings, ar_model=True),
        "speeds": speeds(names, _bench(repeats, concurrency=(1,), thresholds=THRESHOLDS)),
    }


def cache(names: Sequence[str], count: int, repeats: int) -> dict[str, Any]:
    """Figure 6: the sub-block cache on and off, by batch size and by sub-block size."""
    settings = {
        f"{size}, {'on' if on else 'off'}": decode(sub_block_size=size, sub_block_cache=on)
        for size in CACHE_SUB_BLOCKS
        for on in (True, False)
    }
    both = {"sub_block_cache": (True, False)}
    others = tuple(size for size in CACHE_SUB_BLOCKS if size != 8)
    return {
        "answers": answers(names, count, settings),
        "by_batch": speeds(names, _bench(repeats, concurrency=BATCHES, sub_block_sizes=(8,), **both)),
        "by_sub_block": speeds(names, _bench(repeats, concurrency=(1, 32), sub_block_sizes=others, **both)),
    }


def strategies(names: Sequence[str], count: int, repeats: int) -> dict[str, Any]:
    """The three ways to choose what is revealed, each from slow to fast."""
    settings = {
        f"{strategy} {value:g}": decode(strategy=strategy, sub_block_size=STRATEGY_SUB_BLOCK, **{parameter: value})
        for strategy, (parameter, values) in SWEEPS.items()
        for value in values
    }
    return {"answers": answers(names, count, settings)}
