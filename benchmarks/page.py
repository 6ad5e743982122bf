"""Writes a page of `docs/` and its plots from what the benchmarks measured.

    python benchmarks/page.py results          # docs/results.md, from results/paper-*.json
    python benchmarks/page.py performance      # docs/performance.md, from results/engine-*.json and official.json

`pages/NAME.md.j2` holds the words, the tables and the plots; every figure and verdict is computed from the results.
"""

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import figures
import jinja2
import numpy as np
import pandas as pd
from common import PICTURES, RESULTS

from parablock.bench import plots
from parablock.bench.throughput import markdown
from parablock.evals.files import write_text

PAGES: dict[str, dict[str, Sequence[str]]] = {  # the scripts that a page is made of, with their parts if they have any
    "results": {
        "paper": ("training", "sub-blocks", "block-sizes", "thresholds", "cache", "strategies", "staleness"),
    },
    "performance": {
        "official": (),
        "steps": ("kinds", "shares", "answers", "memory", "threads"),
        "engine": ("batch-one", "load", "context"),
        "smollm2": ("held-out", "alone", "in-flight", "others"),
    },
}
LINES = ((plots.BLUE, "o-"), (plots.ORANGE, "s--"), ("#2f855a", "^-"), (plots.GREY, "d--"))


def measured(scripts: dict[str, Sequence[str]]) -> dict[str, Any]:
    """What the scripts wrote, by part, or by script where that has no parts."""
    files = {script: {part: RESULTS / f"{script}-{part}.json" for part in parts} or {script: RESULTS / f"{script}.json"}
             for script, parts in scripts.items()}  # fmt: skip
    for script, of in files.items():
        if missing := [part for part, file in of.items() if not file.exists()]:
            named = " ".join(["", *missing]) if scripts[script] else ""
            raise SystemExit(f"not measured yet; run: python benchmarks/{script}.py{named}")
    return {part: json.loads(file.read_text()) for of in files.values() for part, file in of.items()}


def render(name: str, parts: dict[str, Any], pictures: Path) -> str:
    """The text of a page; its plots are written to `pictures`."""
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "pages"), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    page.filters |= {function.__name__: function for function in (points, percent, plain, spread, markdown)}
    page.globals |= {name: what for name, what in vars(figures).items() if callable(what) or name.isupper()}
    page.globals |= {"picture": functools.partial(picture, pictures), "panels": panels, "plots": plots, "zip": zip}
    return page.get_template(f"{name}.md.j2").render(parts=parts)


def picture(folder: Path, name: str, shows: str, plot: Callable[..., None], *figures: Any) -> str:
    """Draws a plot; the line that shows it on the page."""
    folder.mkdir(parents=True, exist_ok=True)
    plot(folder / name, *figures)
    return f"![{shows}](images/{name})"


def plain(values: Any, unit: str = "", digits: int = 2, sign: str = "", scale: float = 1, step: float = 0) -> str:
    """A mean with its error, where there is one to be had."""
    found = values if isinstance(values, figures.Estimate) else figures.mean(values, step)
    if np.isnan(found.value):
        return "none"
    error = f" ± {scale * found.error:.{digits}f}" if found.error else ""
    return f"{scale * found.value:{sign}.{digits}f}{error}{unit}"


def points(values: Any, unit: str = "", sign: str = "+") -> str:
    return plain(values, unit, digits=1, sign=sign, scale=100, step=1)


def percent(values: Any) -> str:
    return points(values, " %", sign="")


def spread(values: pd.Series) -> str:
    """The median of all repeats, and their range."""
    return f"{values.median():.0f} ({values.min():.0f} to {values.max():.0f})"


def panels(path: Path, *shown: dict[str, Any]) -> None:
    """Panels side by side: `x`, `y` (in points if it says "%"), and by name the `lines`: frames over what they vary.

    `across`: frames that say where a line's settings lie. `names`: settings are no numbers; `sizes`: they double;
    `zero`: y begins there; `level`: a height by its name.
    """
    plt = plots._pyplot()
    width = 4.9 * len(shown) if len(shown) > 1 else 6.5
    figure, axes = plt.subplots(1, len(shown), figsize=(width, 3.9), layout="constrained", squeeze=False)
    for axis, panel in zip(axes[0], shown, strict=True):
        names, across = panel.get("names", False), panel.get("across", {})
        step, scale = (1, 100) if "%" in panel["y"] else (0, 1)
        for (label, frame), (color, style) in zip(panel["lines"].items(), LINES, strict=False):
            if not (names or across):
                frame = frame.rename(columns=float).sort_index(axis=1)
            y, where = figures.mean(frame, step), figures.mean(across[label]) if across else None
            axis.errorbar(
                where.value if where else frame.columns, scale * y.value, scale * y.error,
                where.error if where else None, color=color, fmt=style[0] if names else style, label=label, capsize=3,
                markersize=5, linewidth=1.5,
            )  # fmt: skip
        for label, height in panel.get("level", {}).items():
            axis.axhline(height, color="k", ls=":", linewidth=1, label=label)
        axis.set(xlabel=panel["x"], ylabel=panel["y"])
        if panel.get("zero"):
            axis.set_ylim(bottom=0)
        if panel.get("sizes"):
            ticks = sorted({int(size) for frame in panel["lines"].values() for size in frame})
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, map(str, ticks))
            axis.minorticks_off()
        if names:
            plt.setp(axis.get_xticklabels(), rotation=30, ha="right", rotation_mode="anchor")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    plots._write(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", default=list(PAGES), help=f"some of {', '.join(PAGES)}")
    for name in parser.parse_args().pages:
        print(write_text(PICTURES.parent / f"{name}.md", render(name, measured(PAGES[name]), PICTURES)))


if __name__ == "__main__":
    main()
