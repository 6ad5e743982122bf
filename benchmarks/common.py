"""What the benchmarks share: options, turns, spreads, processes, and what stands beside every figure."""

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported
warnings.simplefilter("ignore", UserWarning)  # an AR checkpoint, another block size than trained: these are measured

from parablock.data.chat import encode_prompt
from parablock.data.word_problems import Problem
from parablock.evals.files import write_text
from parablock.evals.machine import machine

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parent.parent / "docs" / "images"
WORKERS = 2  # processes at the same time, each on one thread

T = TypeVar("T")


def options(doc: str | None, parts: Iterable[str] = (), **defaults: float) -> argparse.Namespace:
    """The options of a script, one for each default, and which of its `parts` to run."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if parts:
        parser.add_argument("parts", nargs="*", help=f"some of {', '.join(parts)}")
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    args = parser.parse_args()
    if unknown := set(getattr(args, "parts", ())) - set(parts):
        parser.error(f"{', '.join(unknown)} is no part; use {', '.join(parts)}")
    return args


def measure_parts(doc: str | None, *functions: Callable[..., dict[str, Any]], problems: int, repeats: int) -> None:
    """Runs the parts of a script (all, unless some are named); each writes `results/SCRIPT-PART.json`."""
    parts = {function.__name__.replace("_", "-"): function for function in functions}
    args = options(doc, parts, problems=problems, repeats=repeats)
    for part in args.parts or parts:
        print(f"{part}:", flush=True)
        size = {"problems": args.problems, "repeats": args.repeats}
        report = parts[part](**size)
        write(f"{Path(sys.argv[0]).stem}-{part}", {"setting": setting(args, part), **size, **report})


def setting(args: argparse.Namespace, *parts: str) -> dict[str, Any]:
    """The command that measures `parts` again, the commit, the machine, the versions."""
    chosen = [f"--{name.replace('_', '-')} {value:g}" for name, value in vars(args).items() if name != "parts"]
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *parts, *chosen])
    return {"command": command, "commit": commit(), **machine()}


def commit() -> str:
    out = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return out.stdout.strip()


def write(name: str, report: dict[str, Any]) -> None:
    """`results/NAME.json`, whole or not at all."""
    print(write_text(RESULTS / f"{name}.json", json.dumps(report, indent=1) + "\n"))


def questions(tokenizer: Any, problems: Sequence[Problem]) -> list[list[int]]:
    """The prompts of the bundled task."""
    return [encode_prompt(tokenizer, problem.messages()[:1]) for problem in problems]


def in_turns(contenders: dict[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """What each contender returns, in an order that rotates, after a warm-up."""
    seen: dict[str, list[T]] = {name: [] for name in contenders}
    names = list(contenders)
    for repeat in range(repeats + 1):
        for turn in range(len(names)):
            name = names[(repeat + turn) % len(names)]
            seen[name].append(contenders[name]())
    return {name: values[1:] for name, values in seen.items()}


def in_processes(function: Callable[..., T], jobs: Iterable[tuple[Any, ...]]) -> list[T]:
    """`function` of every job, `WORKERS` at a time; Ctrl-C ends them all."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(WORKERS, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        return pool.starmap(function, jobs, chunksize=1)


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median, the quartiles and the ends."""
    low, _, high = statistics.quantiles(values, n=4)
    return {"median": statistics.median(values), "low": low, "high": high, "min": min(values), "max": max(values)}


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The spread of the quotients, turn by turn."""
    return spread([a / b for a, b in zip(above, below, strict=True)])
