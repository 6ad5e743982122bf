"""The sections of `docs/results.md` on sizes and thresholds at inference."""

import itertools
from pathlib import Path

import numpy as np
from paper_figures import (
    BLUE,
    GREY,
    ORANGE,
    Line,
    Panel,
    Part,
    accuracy,
    accuracy_line,
    claim,
    draw,
    has_bundled,
    per_forward,
    percent,
    plain,
    points,
    right,
    sizes_axis,
    speeds,
    spread,
    table,
    trained,
)  # fmt: skip
from paper_statistics import (
    Estimate,
    above,
    estimate,
    paired,
    paired_ratio,
    together,
    within,
)  # fmt: skip

SAME = 0.02  # accuracies this close are called the same
BUNDLED = ["bundled"]
GSM8K = {2: "62.8", 4: "61.8", 8: "62.0", 16: "61.3", 32: "60.2"}  # table 3
GSM8K_BLOCKS = {2: "53.2", 4: "56.8", 8: "58.5", 16: "59.7", 32: "60.2"}  # table 4
HUMAN_EVAL = {2: "42.7", 4: "43.3", 8: "43.9", 16: "39.6", 32: "38.4"}  # table 3


def _columns(part: Part) -> list[str]:
    return BUNDLED if has_bundled(part) else []


def sub_blocks_section(part: Part, pictures: Path) -> str:
    names, sizes = trained(part), [int(size) for size in next(iter(part["answers"].values()))]
    solved = {size: right(part, str(size), names) for size in sizes}
    speed = {size: per_forward(part, str(size), names) for size in sizes}
    lead = {size: paired(solved[8], solved[size]) for size in sizes if size != 8}
    steps = [paired(speed[b], speed[a], step=0.0) for a, b in itertools.pairwise(sizes)]
    claims = [
        claim(together([above(lead[size]) for size in GSM8K if size != 8]), "8 is the most accurate sub-block size",
              "8 is ahead by " + ", ".join(f"{points(lead[s], sign=True)} of {s}" for s in GSM8K if s != 8),
              "the best on average over tasks (on GSM8K -0.8 against 2, +0.2 against 4, +0.7 against 16, +1.8 against 32)"),
        claim(above(lead[32]), "sub-blocks of 8 are more accurate than whole blocks of 32", f"{points(lead[32], sign=True)} points",
              "62.0 against 60.2 on GSM8K, 43.9 against 38.4 on HumanEval"),
        claim(together([above(step) for step in steps]), "larger sub-blocks give more tokens per forward",
              " to ".join(f"{estimate(speed[size]).value:.2f}" for size in (sizes[0], sizes[-1])) + f" from {sizes[0]} to {sizes[-1]}",
              "throughput grows with the size (figure 6b)"),
    ]  # fmt: skip
    body = [
        [str(size), percent(solved[size]), "" if size == 8 else points(lead[size], sign=True), plain(estimate(speed[size])),
         *[percent(right(part, str(size), [b])) for b in _columns(part)],
         *[plain(estimate(per_forward(part, str(size), [b]))) for b in _columns(part)],
         GSM8K.get(size, ""), HUMAN_EVAL.get(size, "")] for size in sizes
    ]  # fmt: skip
    head = ["sub-block", "accuracy", "8 is ahead by", "tokens per forward"]
    head += [f"bundled: {what}" for _ in _columns(part) for what in ("accuracy", "tokens per forward")]
    series = [("mean over seeds", names, BLUE), *((b, [b], GREY) for b in _columns(part))]
    lines = [accuracy_line(label, sizes, [right(part, str(s), who) for s in sizes], c) for label, who, c in series]
    speeds_ = [
        Line(label, sizes, [estimate(per_forward(part, str(s), who)) for s in sizes], c) for label, who, c in series
    ]
    panels = [
        Panel("sub-block size", "accuracy (%)", lines, **sizes_axis(sizes)),
        Panel("sub-block size", "tokens per forward", speeds_, zero=True, **sizes_axis(sizes)),
    ]
    return f"""## Sub-block sizes at inference (table 3)

{chr(10).join(claims)}

{draw(pictures / "paper-sub-blocks.png", "Accuracy and tokens per forward by sub-block size", panels)}

{table([*head, "paper, GSM8K", "paper, HumanEval"], body)}
"""


def block_sizes_section(part: Part, pictures: Path) -> str:
    names = trained(part)
    other = {size: right(part, f"block {size}", names) for size in GSM8K if size != 32}
    own = {size: right(part, f"sub-block {size}", names) for size in GSM8K}
    costs = {size: paired(own[size], other[size]) for size in other}

    def pooled_cost(who: list[str]) -> Estimate:
        solved = {
            key: right(part, f"{key[0]} {key[1]}", who) for key in itertools.product(("sub-block", "block"), other)
        }
        return estimate(
            [
                np.mean([solved["sub-block", s][i] - solved["block", s][i] for s in other], axis=0)
                for i in range(len(who))
            ],
            step=1.0,
        )

    pooled = pooled_cost(names)
    apart = {size: paired(own[size], own[8]) for size in own if size != 8}
    eight = right(part, "block 16, sub-block 8", names)
    claims = [
        claim(above(pooled), "smaller blocks than in training cost accuracy, against sub-blocks of the same size",
              f"{points(pooled, sign=True)} points, mean over block sizes {', '.join(map(str, other))} "
              f"({', '.join(f'{points(cost, sign=True)} at {size}' for size, cost in costs.items())})",
              "9.6, 5.0, 3.5 and 1.6 points on GSM8K"),
        claim(together([within(gap, SAME) for gap in apart.values()]),
              f"the sub-block size changes accuracy little (by less than {100 * SAME:.0f} points from that of 8)",
              ", ".join(f"{points(gap, sign=True)} at {size}" for size, gap in apart.items()),
              "+0.8 at 2, -0.2 at 4, -0.7 at 16, -1.8 at 32 on GSM8K"),
    ]  # fmt: skip
    columns = _columns(part)
    for name in columns:
        longer = pooled_cost([name])
        claims.insert(
            1,
            claim(above(longer), "they cost the bundled model accuracy, which was trained longer",
                  f"{points(longer, sign=True)} points", "as above"),
        )  # fmt: skip
    body = [
        [str(size), percent(other[size]) if size in other else "as trained", percent(own[size]),
         points(costs[size], sign=True) if size in other else "",
         *[percent(right(part, f"block {size}", [b])) if size in other else "" for b in columns],
         *[percent(right(part, f"sub-block {size}", [b])) for b in columns],
         GSM8K_BLOCKS[size], GSM8K[size]] for size in own
    ]  # fmt: skip
    head = ["size", "as block size", "as sub-block size, blocks of 32", "the block size costs"]
    head += ["bundled: as block size", "bundled: as sub-block size"] if columns else []
    sizes = list(own)
    lines = [
        accuracy_line("as sub-block size (blocks of 32, as trained)", sizes, list(own.values()), BLUE),
        accuracy_line("as block size (mismatch)", list(other), list(other.values()), ORANGE),
    ]
    return f"""## Another block size than in training (table 4)

{chr(10).join(claims)}

{draw(pictures / "paper-block-sizes.png", "Accuracy by block size and by sub-block size", [Panel("size", "accuracy (%)", lines, **sizes_axis(sizes))])}

{table([*head, "paper, block size", "paper, sub-block size"], body)}

All models are trained in blocks of 32. A row compares equal steps: blocks of that size, each revealed as a whole, against
sub-blocks of that size in blocks of 32 (the paper's table 4 read so: its block size 32 is its sub-block size 32). Blocks of 16
in sub-blocks of 8: {percent(eight)}, which is {points(paired(own[8], eight), sign=True)} points behind sub-blocks of 8 in blocks of 32.
"""


def thresholds_section(part: Part, pictures: Path) -> str:
    names, columns = trained(part), _columns(part)
    values = [float(key) for key in next(iter(part["answers"].values())) if key[0].isdigit()]

    def speed(value: float | None, who: list[str]) -> list[np.ndarray]:
        mode = "autoregressive" if value is None else "diffusion"
        return speeds(part, "speeds", who, mode=mode, threshold=value)

    faster, drop = (
        paired_ratio(speed(0.9, names), speed(1.0, names)),
        paired(*(right(part, k, names) for k in ("0.9", "1.0"))),
    )
    over_ar = paired_ratio(speed(0.9, names), speed(None, names))
    claims = [
        claim(above(faster, 1), "threshold 0.9 is faster than 1.0 (one token at a time)", plain(faster, unit=" times as fast"),
              "2.6 times, 39.1 to 101.7 tokens/s (7B, GSM8K, A100)"),
        claim(above(drop, -SAME), f"threshold 0.9 costs less than {100 * SAME:.0f} points of accuracy",
              f"{points(drop, sign=True)} points against 1.0", "a marginal drop (figure 4)"),
        claim(above(over_ar, 1), "block diffusion at threshold 0.9 is faster than AR", plain(over_ar, unit=" times as fast"),
              "2.54 times (7B against Qwen2.5-7B-Instruct, GSM8K, A100)"),
    ]  # fmt: skip

    def row(label: str, key: str, value: float | None) -> list[str]:
        cells = [label]
        for who in (names, *([b] for b in columns)):
            cells += [
                percent(right(part, key, who)),
                plain(estimate(per_forward(part, key, who))),
                spread(speed(value, who)),
            ]
            cells.append(plain(paired_ratio(speed(value, who), speed(None, who)), unit="x"))
        return cells

    body = [row(f"{value:g}", str(value), value) for value in values]
    body.append(row("AR, the bundled AR model", "bundled-ar", None))
    body.append(row("the same model in AR mode", "AR mode", None))
    for at in range(3, len(body[-1]), 4):  # its speed is that of the AR model: same shape, same loop
        body[-1][at] = body[-1][at + 1] = ""
    what = ["accuracy", "tokens per forward", "tokens/s", "over AR"]
    head = ["threshold", *what, *(f"bundled: {w}" for _ in columns for w in what)]
    series = [("mean over seeds", names, BLUE), *((b, [b], GREY) for b in columns)]
    ar = float(np.mean([group.mean() for group in speed(None, names)]))
    panels = [
        Panel("threshold", "accuracy (%)",
              [accuracy_line(label, values, [right(part, str(v), who) for v in values], c) for label, who, c in series],
              level=(100 * accuracy(right(part, "bundled-ar", names)).value, "bundled AR model")),
        Panel("threshold", "tokens per second, one request",
              [Line(label, values, [estimate(speed(v, who)) for v in values], c) for label, who, c in series],
              level=(ar, "AR"), zero=True),
    ]  # fmt: skip
    return f"""## The threshold (figure 4)

{chr(10).join(claims)}

{draw(pictures / "paper-thresholds.png", "Accuracy and speed by threshold", panels)}

{table(head, body)}

Speed: one request at a time in the engine, not compiled; all cases in turns, {part["repeats"]} repeats per model; median and range over models
and repeats.
"""
