"""What the sections of `docs/results.md` are made of: results read back, table cells, sentences, plots."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from paper_statistics import Estimate, Verdict, estimate, rates

from parablock.bench.plots import BLUE, GREY, ORANGE, _pyplot, _write

GREEN = "#2f855a"
COLOURS = (BLUE, ORANGE, GREEN, GREY)
LEADS: dict[Verdict, str] = {
    "Agrees": "Agrees that",
    "Disagrees": "Disagrees that",
    "Cannot tell": "Cannot tell whether",
}
Part = dict[str, Any]
Groups = list[np.ndarray]


def trained(part: Part) -> list[str]:
    """The models trained for this page, one per seed (without any, in a trial: the bundled one)."""
    names = list(part.get("answers") or part["staleness"])
    return [name for name in names if name != "bundled"] or names


def has_bundled(part: Part) -> bool:
    return "bundled" in (part.get("answers") or part["staleness"])


def right(part: Part, setting: str, names: Sequence[str]) -> Groups:
    """Which answers are right, by model."""
    return [np.array([float(c) for c in part["answers"][name][setting]["right"]]) for name in names]


def numbers(part: Part, setting: str, names: Sequence[str], field: str) -> Groups:
    """`tokens` or `forwards` of every answer, by model."""
    return [np.array(part["answers"][name][setting][field].split(), dtype=float) for name in names]


def per_forward(part: Part, setting: str, names: Sequence[str]) -> Groups:
    """Tokens per forward, by model."""
    return rates(numbers(part, setting, names, "tokens"), numbers(part, setting, names, "forwards"))


def speeds(part: Part, field: str, names: Sequence[str], what: str = "tokens_per_second", **case: Any) -> Groups:
    """A measured case's repeats, by model."""
    found = []
    for name in names:
        rows = [row for row in part[field][name] if all(row[key] == value for key, value in case.items())]
        assert len(rows) == 1, case
        found.append(np.array(rows[0][what]))
    return found


def accuracy(groups: Groups) -> Estimate:
    return estimate(groups, step=1.0)


def percent(groups: Groups) -> str:
    return points(accuracy(groups)) + " %"


def points(value: Estimate, *, sign: bool = False) -> str:
    if np.isnan(value.value):
        return "no figure"
    return f"{100 * value.value:{'+' if sign else ''}.1f} ± {100 * value.error:.1f}"


def plain(value: Estimate, form: str = ".2f", unit: str = "", missing: str = "no figure") -> str:
    return missing if np.isnan(value.value) else f"{value.value:{form}} ± {value.error:{form}}{unit}"


def spread(groups: Groups, form: str = ".0f") -> str:
    """The median of all repeats, and their range."""
    values = np.concatenate(groups)
    return f"{np.median(values):{form}} ({values.min():{form}} to {values.max():{form}})"


def claim(verdict: Verdict, what: str, here: str, paper: str) -> str:
    """One sentence, whichever the verdict is."""
    return f"- {LEADS[verdict]} {what}: here {here}; paper: {paper}."


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass(frozen=True)
class Line:
    """Points with their errors; `style` as matplotlib's."""

    label: str
    x: Sequence[float]
    y: Sequence[Estimate]
    color: str
    style: str = "o-"
    scale: float = 1.0
    x_error: Sequence[float] | None = None


@dataclass(frozen=True)
class Panel:
    """One plot. `ticks`: where the x axis is named, and how; `level`: a named line at a height; `zero`: y from 0."""

    x: str
    y: str
    lines: Sequence[Line]
    ticks: tuple[Sequence[float], Sequence[str]] | None = None
    log: bool = False
    level: tuple[float, str] | None = None
    zero: bool = False


def accuracy_line(label: str, x: Sequence[float], groups: Sequence[Groups], color: str, style: str = "o-") -> Line:
    return Line(label, x, [accuracy(g) for g in groups], color, style, scale=100)


def sizes_axis(sizes: Sequence[int]) -> dict[str, Any]:
    """For a panel over sizes that double."""
    return {"ticks": (sizes, [str(size) for size in sizes]), "log": True}


def draw(path: Path, shows: str, panels: Sequence[Panel]) -> str:
    """The panels side by side as a PNG; returns the line that shows it on the page."""
    plt = _pyplot()
    width = 4.9 * len(panels) if len(panels) > 1 else 6.5
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 3.9), layout="constrained", squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        if panel.log:
            axis.set_xscale("log", base=2)
        for line in panel.lines:
            axis.errorbar(
                line.x, [line.scale * e.value for e in line.y], [line.scale * e.error for e in line.y], line.x_error,
                fmt=line.style, color=line.color, label=line.label, capsize=3, markersize=5, linewidth=1.5,
            )  # fmt: skip
        if panel.level:
            axis.axhline(panel.level[0], color="k", ls=":", linewidth=1, label=panel.level[1])
        axis.set(xlabel=panel.x, ylabel=panel.y)
        if panel.zero:
            axis.set_ylim(bottom=0)
        if panel.ticks:
            axis.set_xticks(*panel.ticks)
            axis.minorticks_off()
            if max(map(len, panel.ticks[1])) > 5:
                axis.tick_params("x", rotation=20)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    _write(figure, path)
    return f"![{shows}](images/{path.name})"
