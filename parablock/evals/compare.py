"""Two evaluations side by side: the same questions, paired."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from parablock.evals.results import Sample, interval, read
from parablock.evals.tables import print_table

RESAMPLES = 10_000
SHOWN = ("model", "evaluation", "decoding", "machine", "parablock", "lm_eval")


@dataclass(frozen=True)
class Comparison:
    """One metric of one task on the questions that both evaluations asked.

    `difference` is the second's mean minus the first's, `low` and `high` its 95 % interval (paired bootstrap). `p`: of
    the hypothesis that there is none (McNemar's exact test where all scores are 0 or 1, else a paired permutation
    test). `only_first`, `only_second`: questions that one alone got right (None: not a matter of right or wrong).
    """

    task: str
    metric: str
    questions: int
    first: tuple[float, float, float]
    second: tuple[float, float, float]
    difference: float
    low: float
    high: float
    p: float
    only_first: int | None
    only_second: int | None


def paired(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """The interval of the mean difference (second - first) and the test's p."""
    import numpy as np
    from scipy import stats

    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    differences = b - a
    if not differences.any():
        return 0.0, 0.0, 1.0
    if len(a) < 2:
        return -math.inf, math.inf, 1.0
    draws = np.random.default_rng(0)
    found = stats.bootstrap((differences,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=draws)
    low, high = float(found.confidence_interval.low), float(found.confidence_interval.high)
    if set(first) | set(second) <= {0, 1}:
        gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
        return low, high, float(stats.binomtest(gained, gained + lost).pvalue)
    test = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, rng=np.random.default_rng(0)
    )
    return low, high, float(test.pvalue)


def compare(first: Sequence[Sample], second: Sequence[Sample]) -> list[Comparison]:
    """Every metric that both have, on the questions that both have.

    Raises:
        ValueError: there is none.
    """
    found = []
    other = {_key(sample): sample for sample in second}
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for sample in first:
        match = other.get(_key(sample))
        for name in sample.scores.keys() & match.scores.keys() if match else ():
            assert match is not None
            pairs.setdefault((sample.task, f"{name},{sample.filter}"), []).append(
                (sample.scores[name], match.scores[name])
            )
    if not pairs:
        raise ValueError("the two evaluations share no question; compare runs of the same tasks and seed")
    for (task, metric), scores in sorted(pairs.items()):
        a, b = [x for x, _ in scores], [y for _, y in scores]
        low, high, p = paired(a, b)
        binary = set(a) | set(b) <= {0, 1}
        found.append(
            Comparison(
                task, metric, len(scores), (fmean(a), *interval(a)), (fmean(b), *interval(b)), fmean(b) - fmean(a),
                low, high, p, sum(x > y for x, y in scores) if binary else None,
                sum(y > x for x, y in scores) if binary else None,
            )
        )  # fmt: skip
    return found


def run_compare(first: Path, second: Path, console: Console) -> list[Comparison]:
    """Print how two evaluations differ, in their figures and in their settings.

    Raises:
        ValueError: a folder without an evaluation, or no common question.
    """
    (report_a, samples_a), (report_b, samples_b) = read(first), read(second)
    found = compare(samples_a, samples_b)
    table = Table("task", "metric", "n", "A", "B", "B - A", "only A", "only B", "p", title=f"A: {first}   B: {second}")
    for c in found:
        table.add_row(
            c.task, c.metric.removesuffix(",none"), str(c.questions),
            _with_interval(*c.first), _with_interval(*c.second),
            f"{c.difference:+.3f} ({c.low:+.3f} to {c.high:+.3f})", _count(c.only_first), _count(c.only_second),
            f"{c.p:.3g}",
        )  # fmt: skip
    print_table(console, table)
    console.print(
        "brackets: 95 % intervals; p: exact McNemar test for right or wrong, paired permutation test otherwise"
        + (f"; {len(found)} tests: expect {0.05 * len(found):.1f} below 0.05 by chance" if len(found) > 1 else "")
    )
    _print_speeds(report_a, report_b, console)
    hashes = {_key(sample): sample.prompt_hash for sample in samples_a}
    changed = sum(hashes.get(_key(s), s.prompt_hash) != s.prompt_hash for s in samples_b)
    if changed:
        console.print(f"{changed} questions were put in other words (prompts differ)")
    for line in differences({k: report_a.get(k) for k in SHOWN}, {k: report_b.get(k) for k in SHOWN}):
        console.print(f"  {line}", soft_wrap=True)
    return found


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Where two nested settings differ, a line each."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = list(dict.fromkeys([*a, *b]))
        return [line for k in keys for line in differences(a.get(k), b.get(k), f"{name}.{k}" if name else k)]
    return [] if a == b else [f"{name}: {a} | {b}"]


def _print_speeds(a: dict[str, Any], b: dict[str, Any], console: Console) -> None:
    for task, report in a["tasks"].items():
        one, other = report["speed"], b["tasks"].get(task, {}).get("speed")
        if not one or not other:
            continue
        text = f"{task}: tokens per forward {one['tokens_per_forward']:.2f} | {other['tokens_per_forward']:.2f}"
        if a["machine"] == b["machine"] and one["tokens_per_second"] and other["tokens_per_second"]:
            text += f", tokens/s {one['tokens_per_second']:.0f} | {other['tokens_per_second']:.0f}"
        console.print(text)


def _key(sample: Sample) -> tuple[str, str, int, str]:
    return sample.task, sample.filter, sample.number, sample.question_hash


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _count(value: int | None) -> str:
    return "" if value is None else str(value)
