"""Means with their errors, what a claim comes to, and curves compared at equal accuracy.

A *group* holds the values of one training seed: one per problem (right or not) or one per repeat. All seeds count
alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Verdict = Literal["Agrees", "Disagrees", "Cannot tell"]
ERRORS = 2  # a difference counts when it exceeds so many standard errors


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds. `within`: its standard error from the problems (or repeats); `between`: from the seeds."""

    value: float
    within: float = 0.0
    between: float = 0.0

    @property
    def error(self) -> float:
        """The larger of the two."""
        return max(self.within, self.between)


def estimate(groups: Sequence[np.ndarray], step: float = 0.0) -> Estimate:
    """The mean of the groups' means; the values of a group are independent of each other.

    `step`: what one value may differ by (1: an answer is right or not). Values that are all alike do not prove a mean
    without error: `within` is at least that of one value that differs.
    """
    means = np.array([group.mean() for group in groups])
    variances = [group.var(ddof=1) / len(group) if len(group) > 1 else 0.0 for group in groups]
    between = means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else 0.0
    within = max(sum(variances) ** 0.5 / len(groups), step / sum(map(len, groups)))
    return Estimate(float(means.mean()), float(within), float(between))


def paired(first: Sequence[np.ndarray], second: Sequence[np.ndarray], step: float = 1.0) -> Estimate:
    """`first - second`, value by value: the same problem, or the same repeat, of the same seed."""
    return estimate([a.astype(float) - b for a, b in zip(first, second, strict=True)], step)


def paired_ratio(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> Estimate:
    """`first / second`, value by value."""
    return estimate([a / b for a, b in zip(first, second, strict=True)])


def rates(tops: Sequence[np.ndarray], bottoms: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Groups whose means are the ratios of the sums (tokens per forward), and whose spread gives their errors."""
    groups = []
    for top, bottom in zip(tops, bottoms, strict=True):
        ratio = top.sum() / bottom.sum()
        groups.append(ratio + (top - ratio * bottom) / bottom.mean())
    return groups


def by_seed(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> Estimate:
    """`first - second` of groups that pair up by seed alone: the values within a seed are taken as independent."""
    means = np.array([a.mean() - b.mean() for a, b in zip(first, second, strict=True)])
    within = np.hypot(estimate(first).within, estimate(second).within)
    return Estimate(float(means.mean()), float(within), estimate([np.array([mean]) for mean in means]).between)


def above(difference: Estimate, limit: float = 0.0) -> Verdict:
    """Of the claim that the true difference is above `limit`: two standard errors decide."""
    if difference.value - ERRORS * difference.error > limit:
        return "Agrees"
    return "Disagrees" if difference.value + ERRORS * difference.error < limit else "Cannot tell"


def within(difference: Estimate, margin: float) -> Verdict:
    """Of the claim that the true difference is smaller than `margin` in both directions."""
    mirrored = Estimate(-difference.value, difference.within, difference.between)
    return together([above(difference, -margin), above(mirrored, -margin)])


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """Of a claim with several parts: one that is wrong makes it wrong, and all must be right."""
    if "Disagrees" in verdicts:
        return "Disagrees"
    return "Agrees" if set(verdicts) == {"Agrees"} else "Cannot tell"


def falling(values: np.ndarray) -> np.ndarray:
    """The closest (least squares) sequence that never rises: neighbours that rise are averaged."""
    pools: list[list[float]] = []  # mean, count
    for value in values:
        pools.append([float(value), 1])
        while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
            (a, n), (b, m) = pools[-2:]
            pools[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    return np.concatenate([np.full(int(count), mean) for mean, count in pools])


def speed_at(accuracy: np.ndarray, speed: np.ndarray, wanted: float) -> float:
    """The highest speed at which a sweep still has the `wanted` accuracy, interpolated between its points.

    Accuracy is taken to fall with speed (`falling`). nan: the sweep never has it. Where even its highest speed has it,
    that is the answer.
    """
    order = np.argsort(speed, kind="stable")
    speed, accuracy = speed[order], falling(accuracy[order])
    if accuracy[0] < wanted:
        return float("nan")
    last = int((accuracy >= wanted).nonzero()[0][-1])
    if last == len(speed) - 1:
        return float(speed[last])
    share = (accuracy[last] - wanted) / (accuracy[last] - accuracy[last + 1])
    return float(speed[last] + share * (speed[last + 1] - speed[last]))


def resampled(
    sizes: Sequence[int], statistic: Callable[[list[np.ndarray]], np.ndarray], repeats: int, seed: int = 0
) -> np.ndarray:
    """`statistic` of the problems drawn again with replacement, `repeats` times: one array of indices per seed.

    Whoever uses the same indices for several settings compares them on the same problems.
    """
    generator = np.random.default_rng(seed)
    draws = ([generator.integers(0, size, size) for size in sizes] for _ in range(repeats))
    return np.stack([statistic(indices) for indices in draws])
