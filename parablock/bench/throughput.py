"""`parablock bench`: autoregressive against block diffusion or speculative decoding in the same engine, under load.

Every case of the cross product is run in every repeat, in an order that rotates, so that whatever else the machine does
hits all alike. Speed-ups compare a case with the autoregressive one of the same repeat.
"""

import itertools
import json
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from parablock.bench.config import BenchConfig
from parablock.bench.load import Measured, run_load, share_equal
from parablock.decoding.config import DecodeConfig, Drafter, Mode
from parablock.engine.config import EngineConfig
from parablock.engine.engine import Engine
from parablock.evals.files import write_text
from parablock.evals.machine import machine


@dataclass(frozen=True)
class Case:
    """One line of the table. `prompt_tokens` None: the workload's own prompts."""

    mode: Mode
    concurrency: int
    prompt_tokens: int | None = None
    compile: bool = False
    threshold: float | None = None
    sub_block_size: int | None = None
    sub_block_cache: bool | None = None
    drafter: Drafter | None = None

    @property
    def load(self) -> tuple[int, int | None, bool]:
        """What it has in common with the cases that it is compared to."""
        return self.concurrency, self.prompt_tokens, self.compile

    @property
    def name(self) -> str:
        """What tells it apart from others at the same load."""
        parts = ["AR"]
        if self.mode == "diffusion":
            parts = ["diffusion", f"sub-block {self.sub_block_size}"]
            parts += [] if self.threshold is None else [f"threshold {self.threshold:g}"]
            parts += [] if self.sub_block_cache else ["no sub-block cache"]
        elif self.mode == "speculative":
            parts = ["speculative", *([self.drafter] if self.drafter else [])]
        return ", ".join([*parts, *(["compiled"] if self.compile else [])])


@dataclass(frozen=True)
class Workload:
    """The models, one per mode that is measured (they may be the same), and natural prompts, if there are any."""

    models: dict[Mode, Any]
    prompts: Sequence[list[int]]
    vocabulary: int


def cases(config: BenchConfig, modes: Collection[Mode]) -> list[Case]:
    """The cross product of the lists in `config`, for each of the modes: of what it has itself."""
    made: list[Case] = []
    thresholds: Sequence[float | None] = [None] if config.tokens_per_step else config.thresholds
    lengths: Sequence[int | None] = config.prompt_tokens or [None]
    drafters: Sequence[Any] = config.drafters or [None]
    for compiled, tokens, concurrency in itertools.product(config.compile, lengths, config.concurrency):
        load: dict[str, Any] = {"concurrency": concurrency, "prompt_tokens": tokens, "compile": compiled}
        variants = itertools.product(thresholds, config.sub_block_sizes, config.sub_block_cache)
        made += [
            Case("autoregressive", **load),
            *(Case("diffusion", **load, threshold=t, sub_block_size=s, sub_block_cache=c) for t, s, c in variants),
            *(Case("speculative", **load, drafter=drafter) for drafter in drafters),
        ]
    return [case for case in made if case.mode in modes]


def measure(
    workload: Workload, config: BenchConfig, *, progress: Callable[[int, int, Case], None] | None = None
) -> list[tuple[Case, list[Measured]]]:
    """Run every case `config.repeats` times, interleaved, after a warm-up each."""
    lines = cases(config, workload.models)
    results: list[list[Measured]] = [[] for _ in lines]
    total = (config.repeats + 1) * len(lines)
    with ExitStack() as open_engines:
        engines = {
            key: open_engines.enter_context(_engine(workload, config, *key))
            for key in sorted({(case.mode, case.compile) for case in lines})
        }
        done = 0
        for repeat in range(config.repeats + 1):
            answers: dict[Case, list[list[int]]] = {}
            for turn in range(len(lines)):
                number = (repeat + turn) % len(lines)
                case = lines[number]
                if progress:
                    progress(done, total, case)
                done += 1
                engine = engines[case.mode, case.compile]
                prompts = list(_prompts(workload, config, case, repeat))
                count = len(prompts) if repeat else min(len(prompts), case.concurrency)
                decoding = _decode_config(config, case)
                out, answers[case] = run_load(engine, prompts[:count], decoding, case.concurrency)
                engine.batch.pool.clear()
                if repeat:
                    results[number].append(out)
            if repeat:
                _compare(lines, results, answers)
    return list(zip(lines, results, strict=True))


def _compare(lines: Sequence[Case], results: list[list[Measured]], answers: dict[Case, list[list[int]]]) -> None:
    """Note of the latest speculative runs how far their answers are the autoregressive ones."""
    references = {case.load: answers[case] for case in lines if case.mode == "autoregressive"}
    for case, measured in zip(lines, results, strict=True):
        if case.mode == "speculative":
            measured[-1] = replace(measured[-1], equal=share_equal(answers[case], references[case.load]))


def _engine(workload: Workload, config: BenchConfig, mode: Mode, compiled: bool) -> Engine:
    longest = max([*config.prompt_tokens, *(len(p) for p in workload.prompts)])
    return Engine(
        workload.models[mode],
        EngineConfig(
            max_rows=max(config.concurrency),
            max_context=min(
                longest + config.new_tokens + 64, workload.models[mode].config.max_position_embeddings
            ),
            block_size=workload.models["diffusion"].config.bd_size if "diffusion" in workload.models else None,
            prefix_cache=False,  # every prompt is prefilled: what is repeated must not become faster
            compile=compiled,
            threads=config.threads,
        ),
    )  # fmt: skip


def _prompts(workload: Workload, config: BenchConfig, case: Case, repeat: int) -> Iterator[list[int]]:
    """As many prompts as the case answers; the same for all cases of a repeat."""
    import numpy as np

    count = max(config.requests, config.rounds * case.concurrency)
    if case.prompt_tokens is None:
        for i in range(count):
            yield workload.prompts[(repeat * count + i) % len(workload.prompts)]
        return
    generator = np.random.default_rng([repeat, case.prompt_tokens])
    for _ in range(count):
        yield generator.integers(0, workload.vocabulary, case.prompt_tokens).tolist()


def _decode_config(config: BenchConfig, case: Case) -> DecodeConfig:
    settings: dict[str, Any] = {"mode": case.mode, "max_new_tokens": config.new_tokens}
    if case.prompt_tokens is not None or config.tokens_per_step:
        settings["stop_token_ids"] = ()  # answers to random prompts have no end
    if case.mode == "diffusion":
        settings |= {"sub_block_size": case.sub_block_size, "sub_block_cache": case.sub_block_cache}
        if case.threshold is None:
            settings |= {"strategy": "fixed", "tokens_per_step": config.tokens_per_step}
        else:
            settings["threshold"] = case.threshold
    elif case.mode == "speculative":
        settings["drafter"] = case.drafter
    return DecodeConfig(**settings)


def summarise(results: list[tuple[Case, list[Measured]]]) -> list[dict[str, Any]]:
    """One row per case: medians over the repeats, their range, and the speed-up over AR at the same load."""
    rows = []
    for case, measured in results:
        baseline = next(m for c, m in results if c.mode == "autoregressive" and c.load == case.load)
        ratios = [a.tokens_per_second / b.tokens_per_second for a, b in zip(measured, baseline, strict=True)]
        names = Measured.__dataclass_fields__
        row: dict[str, Any] = {"name": case.name, **asdict(case)}
        row |= {name: statistics.median(getattr(m, name) for m in measured) for name in names if name != "equal"}
        row["equal"] = min((m.equal for m in measured if m.equal is not None), default=None)
        for name in ("tokens_per_second", "step"):
            values = [getattr(m, name) for m in measured]
            row[f"{name}_range"] = (min(values), max(values))
        row |= {"speed_up": statistics.median(ratios), "speed_up_range": (min(ratios), max(ratios))}
        rows.append(row)
    return rows


def report(config: BenchConfig, model: str, results: list[tuple[Case, list[Measured]]]) -> dict[str, Any]:
    """All of it, for JSON."""
    return {
        "model": model,
        "config": asdict(config),
        "setting": {"date": time.strftime("%Y-%m-%d"), **machine()},
        "rows": summarise(results),
        "repeats": [
            {"case": asdict(case), "measured": [m.as_dict() for m in measured]} for case, measured in results
        ],
    }  # fmt: skip


COLUMNS = (
    "decoder", "in flight", "prompt", "tokens/s", "over AR", "tokens/forward", "drafted", "accepted", "equal to AR",
    "TTFT ms", "ms/token", "ms/step", "queries/token", "tokens/s of one", "K/V MB", "memory MB",
)  # fmt: skip


def table(rows: list[dict[str, Any]], *, ranges: bool = True) -> list[list[str]]:
    """The lines under `COLUMNS`: medians, and in brackets the range over the repeats."""
    lines = []
    for row in rows:
        (low, high), (slow, fast) = row["tokens_per_second_range"], row["speed_up_range"]
        of_speed, of_ratio = (f" ({low:.0f} to {high:.0f})", f" ({slow:.2f} to {fast:.2f})") if ranges else ("", "")
        lines.append([
            row["name"], str(row["concurrency"]), str(row["prompt_tokens"] or "own"),
            f"{row['tokens_per_second']:.0f}{of_speed}", f"{row['speed_up']:.2f}x{of_ratio}",
            f"{row['tokens_per_forward']:.2f}",
            *((f"{row['drafted']:.0f}", f"{row['accepted']:.0f}", f"{100 * row['equal']:.2f} %")
              if row["mode"] == "speculative" else ("", "", "")),
            f"{1000 * row['ttft']:.1f}", f"{1000 * row['tpot']:.2f}", f"{1000 * row['step']:.2f}",
            f"{row['queries_per_token']:.2f}", f"{row['request_tokens_per_second']:.0f}",
            f"{row['kv_bytes'] / 1e6:.1f}", f"{row['memory_bytes'] / 1e6:.0f}",
        ])  # fmt: skip
    return lines


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, for a document; columns that say nothing are left out."""
    columns = [column for column in zip(COLUMNS, *table(rows), strict=True) if any(column[1:])]
    head, *body = zip(*columns, strict=True)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_report(folder: Path, content: dict[str, Any]) -> list[Path]:
    """`report.json`, `report.md` and the plots that the cases allow; returns what was written."""
    from parablock.bench.plots import plot_concurrency, plot_context, plot_over_ar

    rows = content["rows"]
    files = {"report.json": json.dumps(content, indent=1) + "\n", "report.md": markdown(rows)}
    written = [write_text(folder / name, text) for name, text in files.items()]
    for name, key, plot in (
        ("concurrency.png", "concurrency", plot_concurrency), ("over-ar.png", "concurrency", plot_over_ar),
        ("context.png", "prompt_tokens", plot_context)
    ):  # fmt: skip
        if len({row[key] for row in rows}) > 1:
            plot(folder / name, rows, f"{content['model']}, {content['setting']['processor']}")
            written.append(folder / name)
    return written
