"""The section of `docs/results.md` on the strategies, compared at equal accuracy."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from paper_decoding import SWEEPS
from paper_figures import (
    COLOURS,
    Line,
    Panel,
    Part,
    accuracy,
    claim,
    draw,
    has_bundled,
    numbers,
    per_forward,
    plain,
    right,
    table,
    trained,
)
from paper_statistics import Estimate, Verdict, above, estimate, resampled, speed_at, together

BELOW = (1, 2, 5)  # points below one token at a time: the accuracies at which the strategies are compared
DRAWS = 400  # of the bootstrap
NO = "not reached"


def _read(part: Part, names: Sequence[str]) -> dict[str, list[np.ndarray]]:
    """By strategy and model `[3, settings, problems]`: right or not, tokens, forwards."""
    found: dict[str, list[np.ndarray]] = {}
    for strategy, (_, values) in SWEEPS.items():
        keys = [f"{strategy} {value:g}" for value in values]
        of = [
            [[right(part, key, [name])[0] for key in keys],
             *([numbers(part, key, [name], field)[0] for key in keys] for field in ("tokens", "forwards"))]
            for name in names
        ]  # fmt: skip
        found[strategy] = [np.array(arrays) for arrays in of]
    return found


def _curves(answers: dict[str, list[np.ndarray]], indices: Sequence[np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """By strategy accuracy and tokens per forward `[2, settings]`, means over models, of all problems or those drawn."""
    curves = {}
    for strategy, models in answers.items():
        drawn = models if indices is None else [m[..., i] for m, i in zip(models, indices, strict=True)]
        sums = [(m.sum(-1), m.shape[-1]) for m in drawn]
        curves[strategy] = np.mean([(s[0] / count, s[1] / s[2]) for s, count in sums], axis=0)
    return curves


def _at_equal_accuracy(curves: dict[str, np.ndarray]) -> np.ndarray:
    """Tokens per forward `[BELOW, strategies]`."""
    careful = curves["fixed"][0, 0]  # one token at a time
    return np.array([[speed_at(*curve, wanted=careful - below / 100) for curve in curves.values()] for below in BELOW])


def _compared(part: Part, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`_at_equal_accuracy` of all problems, of the problems drawn again `[DRAWS]`, and of every model alone `[models]`."""
    answers = _read(part, names)
    sizes = [model.shape[-1] for model in answers["fixed"]]
    drawn = resampled(sizes, lambda indices: _at_equal_accuracy(_curves(answers, indices)), DRAWS)
    alone = np.stack([_at_equal_accuracy(_curves({k: [v[m]] for k, v in answers.items()})) for m in range(len(names))])
    return _at_equal_accuracy(_curves(answers)), drawn, alone


def _error(value: float, drawn: np.ndarray, alone: np.ndarray) -> Estimate:
    """nan where the sweep does not have the accuracy, or does not have it in a tenth of the draws."""
    if np.isnan(value) or np.isnan(drawn).mean() > 0.1:
        return Estimate(float("nan"))
    seen = alone[~np.isnan(alone)]
    between = float(seen.std(ddof=1) / len(seen) ** 0.5) if len(seen) > 1 else 0.0
    return Estimate(float(value), float(np.nanstd(drawn, ddof=1)), between)


def strategies_section(part: Part, pictures: Path) -> str:
    names = trained(part)
    groups = {"mean over seeds": names} | ({"bundled": ["bundled"]} if has_bundled(part) else {})
    body, panels, leads = [], [], {}
    order = list(SWEEPS)
    for label, who in groups.items():
        value, drawn, alone = _compared(part, who)
        pairs = {
            (a, b): (order.index(a), order.index(b))
            for a, b in (("threshold", "fixed"), ("factor", "fixed"), ("factor", "threshold"))
        }
        lead = {pair: [_error(value[i, a] / value[i, b], drawn[:, i, a] / drawn[:, i, b], alone[:, i, a] / alone[:, i, b])
                       for i in range(len(BELOW))] for pair, (a, b) in pairs.items()}  # fmt: skip
        leads.setdefault("first", lead)
        for i, below in enumerate(BELOW):
            cells = [plain(_error(value[i, j], drawn[:, i, j], alone[:, i, j]), missing=NO) for j in range(len(order))]
            body.append([label, str(below), *cells, *(plain(lead[pair][i], unit="x", missing=NO) for pair in pairs)])
        panels.append(Panel(
            "tokens per forward", f"accuracy (%), {label}",
            [Line(strategy, [estimate(per_forward(part, f"{strategy} {v:g}", who)).value for v in values],
                  [accuracy(right(part, f"{strategy} {v:g}", who)) for v in values], color, scale=100,
                  x_error=[estimate(per_forward(part, f"{strategy} {v:g}", who)).error for v in values])
             for (strategy, (_, values)), color in zip(SWEEPS.items(), COLOURS, strict=False)],
        ))  # fmt: skip
    first = leads["first"]
    claims = [
        claim(_all_above(first[pair]), f"{pair[0]} gives more tokens per forward than a fixed number at equal accuracy",
              _at(first[pair]), f"the curve of Fast-dLLM (arXiv 2505.22618), {figure}, lies above that of fixed numbers")
        for pair, figure in ((("threshold", "fixed"), "figure 5"), (("factor", "fixed"), "figure 8"))
    ]  # fmt: skip
    last = _all_above(first["factor", "threshold"])
    words = {"Agrees": "gives more than threshold", "Disagrees": "gives less than threshold",
             "Cannot tell": "differs from threshold by less than these problems can show"}  # fmt: skip
    return f"""## Threshold, factor and fixed number, at equal accuracy

{chr(10).join(claims)}

Beyond the paper: at equal accuracy factor {words[last]}: {_at(first["factor", "threshold"])}.

{draw(pictures / "paper-strategies.png", "Accuracy against tokens per forward, by strategy", panels)}

{table(["models", "points below one at a time", *order, "threshold / fixed", "factor / fixed", "factor / threshold"], body)}

Tokens per forward at so many points below the accuracy of one token at a time, interpolated on each strategy's sweep; accuracy
is taken to fall with speed, and a sweep ends with its fastest setting. Errors: {DRAWS} draws of the problems, the same for all strategies, or the spread of the seeds if that is
larger. Blocks of 32 revealed as a whole (sub-block size 32): in sub-blocks of 8 there is little to choose from. The sweeps:
{"; ".join(f"{s} {', '.join(f'{v:g}' for v in values)}" for s, (_, values) in SWEEPS.items())}.
"""


def _all_above(leads: Sequence[Estimate]) -> Verdict:
    """Of the accuracies that both reach."""
    reached = [lead for lead in leads if not np.isnan(lead.value)]
    return together([above(lead, 1) for lead in reached])


def _at(leads: Sequence[Estimate]) -> str:
    cells = [f"{plain(lead, unit=' times', missing=NO)} at {below}" for below, lead in zip(BELOW, leads, strict=True)]
    return ", ".join(cells) + " points below one token at a time"
