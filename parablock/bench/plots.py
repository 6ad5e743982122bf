"""Plots of comparisons and runs: thresholds, decoders, the order in which one answer was revealed, losses, loads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parablock.bench.compare import Result, Solved
from parablock.decoding.generate import Step
from parablock.settings import require_library

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#a0aec0"


def plot_thresholds(path: Path, thresholds: Sequence[float], results: Sequence[Solved], baseline: Solved) -> None:
    """Accuracy (with standard errors) and tokens per second against the threshold, AR as dashed lines."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.errorbar(
        thresholds,
        [100 * r.accuracy for r in results],
        yerr=[100 * r.standard_error for r in results],
        fmt="o-",
        color=BLUE,
        capsize=3,
        label="block diffusion",
    )
    left.axhline(100 * baseline.accuracy, color=GREY, ls="--", label="autoregressive")
    left.set(xlabel="threshold", ylabel="accuracy (%)", title="Accuracy")
    lowest = min(r.accuracy - r.standard_error for r in [*results, baseline])
    left.set_ylim(max(0.0, 100 * lowest - 15), 101)
    right.plot(thresholds, [r.tokens_per_second for r in results], "o-", color=ORANGE, label="block diffusion")
    right.axhline(baseline.tokens_per_second, color=GREY, ls="--", label="autoregressive")
    for x, r in zip(thresholds, results, strict=True):
        right.annotate(f"{r.speed_up:.1f}x", (x, r.tokens_per_second), textcoords="offset points", xytext=(0, 6))
    right.set(xlabel="threshold", ylabel="tokens per second (batch 1)", title="Speed")
    right.set_ylim(bottom=0, top=1.15 * max(r.tokens_per_second for r in [*results, baseline]))
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.legend(loc="lower left", frameon=False)
    _write(figure, path)


def plot_denoising(path: Path, tokenizer: Any, prompt_length: int, steps: Sequence[Step], title: str) -> None:
    """One answer, token by token, each coloured by the forward that revealed it and labelled with its number."""
    plt = _pyplot()
    order: dict[int, int] = {}
    for number, step in enumerate(steps, start=1):
        for column in step.revealed[0].nonzero()[0]:
            order.setdefault(int(step.start[0] + column) - prompt_length, number)
    tokens = steps[-1].tokens()
    words = [tokenizer.decode([token]).replace("\n", "\\n").strip(" <|>") or "_" for token in tokens]
    columns = 12
    rows = -(-len(words) // columns)
    figure, axis = plt.subplots(figsize=(columns * 0.85, 0.62 * rows + 0.9), layout="constrained")
    shades = plt.get_cmap("viridis")(np.linspace(0.15, 0.95, max(order.values()) + 1))
    for i, word in enumerate(words):
        x, y = i % columns, -(i // columns)
        shade = shades[order[i]]
        axis.add_patch(plt.Rectangle((x, y), 0.96, 0.9, color=shade))
        dark = shade[:3] @ (0.3, 0.6, 0.1) < 0.55
        ink = {"color": "w" if dark else "k", "parse_math": False}
        axis.text(x + 0.48, y + 0.52, word[:9], ha="center", va="center", fontsize=9, **ink)
        axis.text(x + 0.92, y + 0.08, order[i], ha="right", va="bottom", fontsize=6, **ink)
    axis.set(xlim=(0, columns), ylim=(1 - rows, 1), title=title)
    axis.axis("off")
    _write(figure, path)


def plot_decoders(
    path: Path, results: Sequence[Result], kinds: Sequence[str], by_kind: Sequence[Sequence[float]]
) -> None:
    """Speed of every decoder, with its quartiles over the questions; tokens per forward by kind of question."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", width_ratios=(2, 3))
    shades = [*(GREY, "#90cdf4", BLUE)[: len(results) - 1], ORANGE]
    for place, (r, shade) in enumerate(zip(results, shades, strict=True)):
        low, high = r.speed_up_range
        spread = [[max(0.0, r.speed_up - low)], [max(0.0, high - r.speed_up)]]
        left.barh(-place, r.speed_up, color=shade, xerr=spread if place else None, capsize=3)
        left.text(0.04, -place, f"{r.tokens_per_second:.0f} tokens/s", va="center", color="w" if shade == BLUE else "k")
        middle = (place - (len(results) - 1) / 2) * 0.8 / len(results)
        places = [number + middle for number in range(len(kinds))]
        right.bar(places, by_kind[place], 0.8 / len(results), color=shade, label=r.name)
    left.set_yticks([-place for place in range(len(results))], [r.name for r in results])
    left.set(xlabel="times as fast as AR (median, quartiles)", title="Speed, the same answers")
    right.set_xticks(range(len(kinds)), kinds, rotation=20)
    right.set(ylabel="tokens per forward", title="By question")
    right.set_ylim(top=1.3 * max(max(mine) for mine in by_kind))
    right.legend(loc="upper left", ncols=2, frameon=False, fontsize=8)
    _write(figure, path)


def plot_losses(path: Path, log: Sequence[dict[str, float]], title: str) -> None:
    """The loss of every logged step, and what the checks found where there are any."""
    plt = _pyplot()
    figure, left = plt.subplots(figsize=(6, 3.4), layout="constrained")
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    left.plot(*zip(*losses, strict=True), color=BLUE)
    left.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    left.grid(alpha=0.25)
    for found, name in (("tokens_per_forward", "tokens per forward"), ("accepted", "accepted drafts per cycle")):
        if checks := [(entry["step"], entry[found]) for entry in log if found in entry]:
            right = left.twinx()
            right.plot(*zip(*checks, strict=True), "o-", color=ORANGE)
            right.set_ylabel(name, color=ORANGE)
    _write(figure, path)


def plot_concurrency(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """System tokens per second, and tokens per second of one request, against the requests in flight."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    shades = plt.get_cmap("tab10")
    variants = list(dict.fromkeys(_plain(row["name"]) for row in rows if row["mode"] != "autoregressive"))
    fields = (("tokens_per_second", "tokens per second, all requests"), ("request_tokens_per_second", "of one request"))
    for axis, (field, label) in zip(axes, fields, strict=True):
        for name, mine in _lines(rows).items():
            ar = mine[0]["mode"] == "autoregressive"
            axis.plot(
                [row["concurrency"] for row in mine], [row[field] for row in mine],
                "o--" if mine[0]["compile"] else "o-", label=name,
                color=GREY if ar else shades(variants.index(_plain(name))),
            )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="requests in flight", ylabel=label)
        ticks = sorted({row["concurrency"] for row in rows})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title, fontsize=10)
    _write(figure, path)


def plot_over_ar(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """How many times as many tokens per second as AR at the same load, against the requests in flight, with ranges."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axis.axhline(1, color=GREY, ls="--", label="AR")
    for name, mine in _lines([row for row in rows if row["mode"] != "autoregressive"]).items():
        places = [row["concurrency"] for row in mine]
        [line] = axis.plot(places, [row["speed_up"] for row in mine], "o-", label=name)
        low, high = zip(*(row["speed_up_range"] for row in mine), strict=True)
        axis.fill_between(places, low, high, color=line.get_color(), alpha=0.15)
    axis.set(xscale="log", xlabel="requests in flight", ylabel="tokens per second over AR", title=title)
    axis.title.set_fontsize(10)
    ticks = sorted({row["concurrency"] for row in rows})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    _write(figure, path)


def plot_context(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Milliseconds per engine step against the prompt's length."""
    kinds = {
        name: {
            "lengths": [row["prompt_tokens"] for row in mine],
            "milliseconds": [1000 * row["step"] for row in mine],
        }
        for name, mine in _lines(rows).items()
    }  # fmt: skip
    plot_steps(path, kinds, title)


def plot_steps(path: Path, kinds: dict[str, dict[str, Any]], title: str, x: str = "tokens of context") -> None:
    """Milliseconds per step against `x` (`lengths`, `milliseconds` of every kind of step)."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, kind in kinds.items():
        axis.plot(kind["lengths"], kind["milliseconds"], "o-", label=name)
    axis.set(xlabel=x, ylabel="milliseconds per step", title=title)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    _write(figure, path)


def _plain(name: str) -> str:
    return name.removesuffix(", compiled")


def _lines(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(row["name"], []).append(row)
    return lines


def _pyplot() -> Any:
    require_library("matplotlib", "plot")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _write(figure: Any, path: Path) -> None:
    """Write the PNG whole or not at all."""
    scratch = path.with_suffix(".part.png")
    figure.savefig(scratch, dpi=130)
    scratch.replace(path)
    _pyplot().close(figure)
