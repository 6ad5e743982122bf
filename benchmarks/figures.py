"""What was measured as tables, means with their errors, and what a claim comes to.

A frame has one row per value, indexed by model and problem (or repeat), and one column per setting. All models count
alike.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import isotonic_regression

ERRORS = 2  # a difference counts when it exceeds so many standard errors
BELOW = (1, 2, 5)  # points below one token at a time: the accuracies at which strategies are compared
STRATEGIES = ("threshold", "factor", "fixed")
PAIRS = (("threshold", "fixed"), ("factor", "fixed"), ("factor", "threshold"))
DRAWS = 400  # of the bootstrap
FIELDS = ("right", "tokens", "forwards")


@dataclass(frozen=True)
class Estimate:
    """A mean over models, or one per setting. Its standard error `within` models (of problems), and `between` them."""

    value: Any
    within: Any = 0.0
    between: Any = 0.0

    @property
    def error(self) -> Any:
        """The larger of the two."""
        return np.maximum(self.within, self.between)

    def __getitem__(self, setting: int) -> "Estimate":
        return Estimate(self.value[setting], self.within[setting], self.between[setting])


def mean(values: pd.DataFrame | pd.Series, step: float = 0.0) -> Estimate:
    """Of the models' means, with the values of a model independent of each other.

    `step`: what one value may differ by (1: an answer is right or not). Values that are all alike do not prove a mean
    without error: `within` is at least that of one value that differs.
    """
    by_model = pd.DataFrame(values).groupby(level=0)
    means, counts = by_model.mean(), by_model.count()
    variances = (by_model.var() / counts).fillna(0.0)
    within = np.maximum(variances.sum() ** 0.5 / means.count(), step / counts.sum())
    found = Estimate(*map(np.array, (means.mean(), within, means.sem().fillna(0.0))))
    return found[0] if isinstance(values, pd.Series) else found


def share(values: pd.DataFrame | pd.Series) -> Estimate:
    """The mean of answers that are right or not, or of differences between such."""
    return mean(values, step=1.0)


def apart(values: pd.DataFrame, weights: dict[str, float]) -> Estimate:
    """A weighted sum of settings whose problems do not pair up: only their models do."""
    parts, weight = values[list(weights)], np.array(list(weights.values()))
    means = parts.groupby(level=0).mean() @ weight
    return Estimate(means.mean(), float(np.hypot.reduce(weight * mean(parts).within)), means.sem())


def above(difference: Estimate, limit: float = 0.0) -> str:
    """The verdict on the claim that the true difference, or every one that was measured, is above `limit`."""
    low, high = (np.ravel(difference.value + sign * ERRORS * difference.error) for sign in (-1, 1))
    if (high < limit).any():
        return "Disagrees"
    measured = low[~np.isnan(low)]
    return "Agrees" if measured.size and (measured > limit).all() else "Cannot tell"


def within(difference: Estimate, margin: float) -> str:
    """The verdict on the claim that every true difference is smaller than `margin` in both directions."""
    return above(Estimate(margin - np.abs(difference.value), difference.within, difference.between))


def answers(part: dict[str, Any], models: list[str]) -> dict[str, pd.DataFrame]:
    """By setting: `right` (1 or 0), `tokens` and `forwards` of every answer, and `rate`, tokens per forward."""

    def frame(field: str) -> pd.DataFrame:
        return pd.DataFrame({
            setting: pd.concat({
                model: pd.Series(list(text) if field == "right" else text.split()).astype(int)
                for model in models for text in [part["answers"][model][setting][field]]
            })
            for setting in part["answers"][models[0]]
        })  # fmt: skip

    found = {field: frame(field) for field in FIELDS}
    return {**found, "rate": rates(found["tokens"], found["forwards"])}


def rates(tops: pd.DataFrame, bottoms: pd.DataFrame) -> pd.DataFrame:
    """Values whose mean by model is the ratio of its sums (tokens per forward), and whose spread gives its error."""
    top, bottom = (frame.groupby(level=0).transform("mean") for frame in (tops, bottoms))
    return top / bottom + (tops - top / bottom * bottoms) / bottom


def beside(own: pd.DataFrame, longer: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The models of the page, and the bundled one, which is trained longer, as a plot calls them."""
    return {"mean over seeds": own, "bundled": longer}


def sizes(frame: pd.DataFrame, prefix: str = "", suffix: str = "") -> pd.DataFrame:
    """The settings with a number between `prefix` and `suffix`, by this number."""
    inside = {name: name.removeprefix(prefix).removesuffix(suffix) for name in frame}
    chosen = {k: v for k, v in inside.items() if k == prefix + v + suffix and v.replace(".", "", 1).isdigit()}
    return frame[list(chosen)].rename(columns=chosen)


def speeds(part: dict[str, Any], models: list[str], keys: list[str], what: str = "tokens_per_second") -> pd.DataFrame:
    """Every repeat, by what the measured cases hold under `keys`, as text ("None": AR, which has no such setting)."""
    rows = [
        {"model": model, "repeat": repeat, **{key: str(case[key]) for key in keys}, what: value}
        for field in ("speeds", "by_batch", "by_sub_block") for model in models
        for case in part.get(field, {}).get(model, []) for repeat, value in enumerate(case[what])
    ]  # fmt: skip
    once = pd.DataFrame(rows).drop_duplicates(["model", "repeat", *keys])
    return once.pivot(index=["model", "repeat"], columns=keys, values=what)


def speed_ups(sizes: dict[str, Any], requests: int, prompt_tokens: int) -> dict[str, pd.DataFrame]:
    """By size, how many times faster than the published loop each contender is."""
    return {
        size: pd.DataFrame({name: [found["over_published"]["median"]] for name, found in case["contenders"].items()})
        for size, cases in sizes.items() for case in cases
        if (case["requests"], case["prompt_tokens"]) == (requests, prompt_tokens)
    }  # fmt: skip


def by_kind(rows: list[dict[str, Any]], drafters: list[str]) -> dict[str, dict[str, pd.Series]]:
    """Tokens per forward of every answer, by kind of prompt, "all" last, and by drafter."""
    kinds = sorted({row["kind"] for row in rows})
    return {
        kind: {
            name: pd.Series(
                [row["tokens"] / row["forwards"][name] for row in rows if kind in (row["kind"], "all")], index=[0] * of
            )
            for name in drafters
        }
        for kind, of in [*((kind, sum(row["kind"] == kind for row in rows)) for kind in kinds), ("all", len(rows))]
    }


def over_ar(runs: dict[str, list[dict[str, Any]]], name: str) -> dict[str, float]:
    """How many times as many tokens per second as autoregressive decoding, prompt by prompt: median and quartiles."""
    rates = {which: np.array([run["tokens"] / run["seconds"] for run in runs[which]]) for which in ("AR", name)}
    median, low, high = quartiles(rates[name] / rates["AR"])
    return {"median": median, "low": low, "high": high}


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """The median, and the quartiles around it."""
    low, median, high = np.percentile(list(values), [25, 50, 75])
    return float(median), float(low), float(high)


def recipes(runs: list[dict[str, Any]], mode: str) -> pd.DataFrame:
    """Which problems the run of every seed solved, by variant of the recipe; their order is not known."""
    return pd.DataFrame({
        variant: counted({run["seed"]: run[mode].values() for run in runs if run["variant"] == variant})
        for variant in sorted({run["variant"] for run in runs})
    })  # fmt: skip


def counted(counts: dict[Any, Iterable[int]]) -> pd.Series:
    """By model, `some` ones among `of` values."""
    return pd.concat({name: pd.Series(np.arange(of) < some).astype(int) for name, (some, of, *_) in counts.items()})


def kept(part: dict[str, Any], models: list[str]) -> pd.DataFrame:
    """How K/V aged, by measure, "layer", "distance" or "revealed", threshold, kind and place; a row per model."""
    rows = [
        {"model": model, "threshold": threshold, **row}
        for model in models for threshold, found in part["staleness"][model].items() for row in found["kv"]
    ]  # fmt: skip
    return pd.DataFrame(rows).pivot(index="model", columns=["by", "threshold", "kind", "at"]).sort_index(axis=1)


def aging(kept: pd.DataFrame, by: str) -> dict[str, pd.DataFrame]:
    """The cosines of `kept`, by what a plot calls them."""
    found = kept["cosine"][by]
    return {f"{kind}, threshold {t}": found[t][kind] for t in ("0.9", "1.0") for kind in ("keys", "values")}


def decisions(part: dict[str, Any], models: list[str], threshold: str) -> dict[str, Any]:
    """What narrow steps decided otherwise, by `tokens`, `revealed` and `sets`; how many steps, `narrow` and `all`."""
    differ = {"tokens": "tokens", "revealed": "revealed", "sets": "steps"}
    counts = pd.DataFrame({model: part["staleness"][model][threshold]["counts"] for model in models})
    counts = counts.reindex(["denoising", *differ.values(), *(f"{what}_differ" for what in differ)]).fillna(0)
    found = {what: counted(counts.loc[[f"{what}_differ", of]].to_dict("list")) for what, of in differ.items()}
    return {**found, "narrow": counts.loc["steps"].sum(), "all": counts.loc["denoising"].sum()}


def sweep(answers: dict[str, pd.DataFrame], field: str) -> dict[str, pd.DataFrame]:
    """A field of the answers by strategy, from careful to all at once."""
    return {strategy: sizes(answers[field], f"{strategy} ") for strategy in STRATEGIES}


def at_equal_accuracy(answers: dict[str, pd.DataFrame]) -> Estimate:
    """Tokens per forward `[STRATEGIES and PAIRS of them, BELOW]`.

    nan where a sweep does not have the accuracy, or does not have it in a tenth of the draws. A draw takes the same
    problems for all settings.
    """
    found = np.stack([np.stack([f.to_numpy().T for f in sweep(answers, field).values()]) for field in FIELDS])
    models = answers["right"].index.get_level_values(0)
    generator, rows = np.random.default_rng(0), [np.flatnonzero(models == name) for name in models.unique()]
    draws = ([mine[generator.integers(0, len(mine), len(mine))] for mine in rows] for _ in range(DRAWS))
    value, drawn = _compared(found, rows), np.array([_compared(found, draw) for draw in draws])
    alone = pd.DataFrame([_compared(found, [mine]).ravel() for mine in rows])
    lost = np.isnan(value) | (np.isnan(drawn).mean(0) > 0.1)
    between = alone.sem().fillna(0.0).to_numpy().reshape(value.shape)
    return Estimate(np.where(lost, np.nan, value), np.nanstd(drawn, axis=0, ddof=1), between)


def _compared(found: np.ndarray, rows: list[np.ndarray]) -> np.ndarray:
    """`at_equal_accuracy` of `found` `[FIELDS, STRATEGIES, settings, answers]` at some `rows` of every model."""
    right, tokens, forwards = (np.array([field[..., mine].mean(-1) for mine in rows]) for field in found)
    accuracy, speed = right.mean(0), (tokens / forwards).mean(0)  # means over models: [STRATEGIES, settings]
    careful = accuracy[STRATEGIES.index("fixed"), 0]  # one token at a time
    speeds = {
        name: np.array([speed_at(accuracy[i], speed[i], careful - below / 100) for below in BELOW])
        for i, name in enumerate(STRATEGIES)
    }
    return np.array([*speeds.values(), *(speeds[a] / speeds[b] for a, b in PAIRS)])


def speed_at(accuracy: np.ndarray, speed: np.ndarray, wanted: float) -> float:
    """The highest speed at which a sweep still has the `wanted` accuracy, interpolated between its points.

    Accuracy is taken to fall with speed: its closest sequence that never rises. nan: the sweep never has it. Where even
    its highest speed has it, that is the answer.
    """
    order = np.argsort(speed, kind="stable")
    accuracy = isotonic_regression(accuracy[order], increasing=False).x
    return float(np.interp(-wanted, -accuracy, speed[order], left=np.nan))
