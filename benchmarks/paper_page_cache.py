"""The sections of `docs/results.md` on the sub-block cache, and on the K/V that it keeps."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from paper_figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    Groups,
    Line,
    Panel,
    Part,
    accuracy,
    accuracy_line,
    claim,
    draw,
    has_bundled,
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
    paired_ratio,
    together,
    within,
)  # fmt: skip

SAME_ACCURACY, SAME_SPEED = 0.02, 0.1
CLOSE, FEW = 0.9, 0.02  # a cosine, a share of tokens


def cache_section(part: Part, pictures: Path) -> str:
    names, columns = trained(part), [["bundled"]] if has_bundled(part) else []
    batches = sorted({row["in_flight"] for row in part["by_batch"][names[0]]})
    sizes = sorted({int(key.split(",")[0]) for key in part["answers"][names[0]]})

    def speed(on: bool, in_flight: int, size: int, who: list[str], what: str = "tokens_per_second") -> Groups:
        field = "by_batch" if size == 8 else "by_sub_block"
        return speeds(part, field, who, what, mode="diffusion", in_flight=in_flight, sub_block=size, cache=on)

    def ratio(in_flight: int, size: int, who: list[str]) -> Estimate:
        return paired_ratio(speed(True, in_flight, size, who), speed(False, in_flight, size, who))

    def gap(size: int, who: list[str]) -> Groups:
        on, off = (right(part, f"{size}, {state}", who) for state in ("on", "off"))
        return [a - b for a, b in zip(on, off, strict=True)]

    harm = estimate([np.mean([gap(size, names)[i] for size in sizes], axis=0) for i in range(len(names))], step=1.0)
    one, many = ratio(1, 8, names), ratio(32, 8, names)
    baseline = [speeds(part, "by_batch", names, mode="autoregressive", in_flight=n) for n in batches]
    over_ar = [paired_ratio(speed(True, n, 8, names), ar) for n, ar in zip(batches, baseline, strict=True)]
    claims = [
        claim(within(harm, SAME_ACCURACY), "the sub-block cache leaves accuracy as it is",
              f"{points(harm, sign=True)} points with it, mean over sub-block sizes", "no observable effect (figure 6a)"),
        claim(within(Estimate(one.value - 1, one.within, one.between), SAME_SPEED),
              f"it brings nothing at batch 1 (less than {100 * SAME_SPEED:.0f} %)",
              plain(one, unit=" times the throughput without it"), "negligible (figure 6b)"),
        claim(above(many, 1), "it raises throughput at batch 32", plain(many, unit=" times the throughput without it"),
              "significantly, where computing is what limits (figure 6b)"),
        claim(together([above(r, 1) for r in over_ar]), f"block diffusion is faster than AR at every batch size up to {batches[-1]}",
              ", ".join(f"{r.value:.2f} times at {n}" for n, r in zip(batches, over_ar, strict=True)),
              "at every one, up to 1.5 times at 64 on an A100 (figure 5)"),
    ]  # fmt: skip
    by_batch = [
        [str(n), spread(speed(True, n, 8, names)), spread(speed(False, n, 8, names)), plain(ratio(n, 8, names), unit="x"),
         *(f"{estimate(speed(on, n, 8, names, 'queries_per_token')).value:.1f}" for on in (True, False)), plain(r, unit="x"),
         *(plain(ratio(n, 8, who), unit="x") for who in columns)]
        for n, r in zip(batches, over_ar, strict=True)
    ]  # fmt: skip
    by_size = [
        [str(size), *(percent(right(part, f"{size}, {state}", names)) for state in ("on", "off")),
         points(accuracy(gap(size, names)), sign=True), *(plain(ratio(n, size, names), unit="x") for n in (1, 32)),
         *(cell for who in columns for cell in
           (points(accuracy(gap(size, who)), sign=True), *(plain(ratio(n, size, who), unit="x") for n in (1, 32))))]
        for size in sizes
    ]  # fmt: skip
    level = (1.0, "no difference")
    panels = [
        Panel("requests in flight", "throughput, cache on / off",
              [Line("mean over seeds", batches, [ratio(n, 8, names) for n in batches], BLUE),
               *(Line("bundled", batches, [ratio(n, 8, who) for n in batches], GREY) for who in columns)],
              level=level, **sizes_axis(batches)),
        Panel("sub-block size", "throughput, cache on / off",
              [Line(f"{n} in flight", sizes, [ratio(n, s, names) for s in sizes], c) for n, c in ((1, BLUE), (32, ORANGE))],
              level=level, **sizes_axis(sizes)),
        Panel("sub-block size", "accuracy (%)",
              [accuracy_line(f"cache {state}", sizes, [right(part, f"{s}, {state}", names) for s in sizes], color, style)
               for state, color, style in (("on", BLUE, "o-"), ("off", ORANGE, "s--"))], **sizes_axis(sizes)),
    ]  # fmt: skip
    more = ["bundled: on / off"] if columns else []
    size_head = ["sub-block", "accuracy, on", "accuracy, off", "difference", "on / off at 1", "on / off at 32"]
    size_head += ["bundled: difference", "bundled: on / off at 1", "bundled: on / off at 32"] if columns else []
    return f"""## The sub-block cache (figure 6)

{chr(10).join(claims)}

{draw(pictures / "paper-cache.png", "Throughput and accuracy with the cache on and off", panels)}

{table(["in flight", "tokens/s, on", "tokens/s, off", "on / off", "queries/token, on", "off", "on, over AR", *more], by_batch)}

Sub-block size 8; median and range over models and repeats; the ratios are means over both. Queries per token: how many tokens the
forwards run for each response token, prompts included. They say how often a step runs a sub-block alone.

{table(size_head, by_size)}

With sub-blocks of 32 the cache has nothing to keep: both columns run the same forwards, and their ratio shows the noise. Engine,
not compiled, its own choice of threads; all cases in turns, {part["repeats"]} repeats per model.
"""


def staleness_section(part: Part, pictures: Path) -> str:
    names = trained(part)
    everything = part["staleness"]

    def share(threshold: str, what: str, of: str, who: Sequence[str]) -> Estimate:
        counts = [everything[name][threshold]["counts"] for name in who]
        groups = [(np.arange(c[of]) < c.get(what, 0)).astype(float) for c in counts if c.get(of)]
        return accuracy(groups or [np.full(1, np.nan)])

    def cell(value: Estimate) -> str:
        return "none" if np.isnan(value.value) else f"{points(value)} %"

    def mean(threshold: str, kind: str, by: str, at: int, what: str, who: Sequence[str]) -> Estimate:
        rows = [
            r
            for name in who
            for r in everything[name][threshold]["kv"]
            if (r["kind"], r["by"], r["at"]) == (kind, by, at)
        ]
        return estimate([np.array([row[what]]) for row in rows] or [np.full(1, np.nan)])

    def places(threshold: str, by: str) -> list[int]:
        return sorted({r["at"] for name in names for r in everything[name][threshold]["kv"] if r["by"] == by})

    def all_layers(kind: str) -> Estimate:
        layers = [
            [r["cosine"] for r in everything[n]["0.9"]["kv"] if (r["kind"], r["by"]) == (kind, "layer")] for n in names
        ]
        return estimate([np.array([np.mean(values)]) for values in layers if values] or [np.full(1, np.nan)])

    keys, values = all_layers("keys"), all_layers("values")
    differ = share("0.9", "revealed_differ", "revealed", names)
    claims = [
        claim(together([above(keys, CLOSE), above(values, CLOSE)]),
              f"kept K/V stay close to fresh ones (cosine above {CLOSE})",
              f"{plain(keys, '.3f')} for keys and {plain(values, '.3f')} for values at threshold 0.9, mean over layers",
              "DualCache rests on it, shown in figure 3 of Fast-dLLM (arXiv 2505.22618)"),
        claim(above(Estimate(-differ.value, differ.within, differ.between), -FEW),
              f"they change few tokens (less than {100 * FEW:.0f} % of those revealed in narrow steps)",
              f"{cell(differ)} at threshold 0.9 ({cell(share('1.0', 'revealed_differ', 'revealed', names))} at 1.0)", "caching has no observable effect on accuracy (figure 6a)"),
    ]  # fmt: skip
    who_of = {"seeds": names} | ({"bundled": ["bundled"]} if has_bundled(part) else {})
    thresholds = list(everything[names[0]])
    decisions = []
    for label, who in who_of.items():
        for threshold in thresholds:
            counts = [everything[name][threshold]["counts"] for name in who]
            shares = [share(threshold, f"{of}_differ", of, who) for of in ("tokens", "revealed")]
            sets = share(threshold, "sets_differ", "steps", who)
            narrow, steps = (sum(c.get(key, 0) for c in counts) for key in ("steps", "denoising"))
            decisions.append([label, threshold, f"{narrow} of {steps}",
                              *map(cell, (*shares, sets))])  # fmt: skip
    body = [
        [label, threshold, str(at), *(plain(mean(threshold, kind, by, at, what, names), ".3f")
                                      for kind in ("keys", "values") for what in ("cosine", "relative_l2")),
         *(f"{mean(threshold, kind, by, at, 'cosine', who).value:.3f}".replace("nan", "")
           for label, who in who_of.items() if label == "bundled" for kind in ("keys", "values"))]
        for by, label in (("layer", "layer"), ("distance", "sub-blocks away"), ("revealed", "tokens revealed since"))
        for threshold in thresholds for at in places(threshold, by)
    ]  # fmt: skip
    shades = {("keys", "0.9"): BLUE, ("values", "0.9"): ORANGE, ("keys", "1.0"): GREEN, ("values", "1.0"): GREY}
    panels = [
        Panel(x, "cosine, kept against fresh",
              [Line(f"{kind}, threshold {threshold}", places(threshold, by),
                    [mean(threshold, kind, by, at, "cosine", names) for at in places(threshold, by)], color)
               for (kind, threshold), color in shades.items()])
        for by, x in (("layer", "layer"), ("distance", "sub-blocks away"), ("revealed", "tokens revealed since"))
    ]  # fmt: skip
    return f"""## How stale the sub-block cache is

{chr(10).join(claims)}

{draw(pictures / "paper-staleness.png", "Cosine between kept and fresh K/V", panels)}

{table(["models", "threshold", "narrow of all denoising steps", "masked positions with another token", "revealed tokens that differ", "revealed sets that differ"], decisions)}

A narrow step runs its sub-block alone and reads the K/V of the block's other positions as the last forward over the whole block
left them. Beside each one, another forward over the whole block said what it would have decided with fresh K/V. {part["stale_problems"]}
problems per model, reference loop, sub-block size 8; at threshold 1.0 one token is revealed per step, the most that K/V can age.

{table(["by", "threshold", "", "keys: cosine", "keys: relative L2", "values: cosine", "values: relative L2", *(["bundled, keys: cosine", "values: cosine"] if has_bundled(part) else [])], body)}

At the last step of each sub-block; means over the models of this page, errors over their seeds. The first layer's K/V hold
nothing but a position's own token, so they cannot age. Tokens revealed since: since the last forward over the whole block.
"""
