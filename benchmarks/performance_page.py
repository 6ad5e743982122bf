"""Writes `docs/performance.md` from the stored results of `benchmarks/engine.py`."""

from collections.abc import Callable
from typing import Any

Rows = list[dict[str, Any]]


def page(parts: dict[str, dict[str, Any]], table: Callable[[Rows], str]) -> str:
    one, load, context, large = (parts[name] for name in ("batch-one", "load", "context", "large"))
    where = one["setting"]
    return f"""# Performance

Written by `python benchmarks/engine.py documents` from [benchmarks/results](../benchmarks/results). {where["processor"]}, 2
cores, torch {where["torch"]}, transformers {where["transformers"]}; commits {", ".join(sorted({p["setting"]["commit"] for p in parts.values()}))}.
Contenders take turns within one run; brackets hold the quartiles or, in the load table, the range over the repeats. Nothing
here ran on a GPU.

## One request at a time

{_one_at_a_time(one)}
## Under load

The bundled AR model against the bundled block-diffusion model, threshold 0.9, in the same engine, each at the engine's own
choice of threads; prompts of about 45 tokens, answers of about 40.

![System and request speed against the requests in flight](images/load.png)

{_crossing(load["rows"])}

{table(load["rows"])}
## Against the context

{_context(context)}
## A 0.5B shape

{_large(large)}
"""


def _one_at_a_time(one: dict[str, Any]) -> str:
    lines = [
        "The bundled models, float32, one thread; the same tokens from all three.", "",
        "| | reference loop | engine | engine, compiled | start-up | pays off after |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for mode, name in (("diffusion", "block diffusion"), ("autoregressive", "AR")):
        part = one[mode]
        cells = []
        for which, ms in part["milliseconds_per_answer"].items():
            ratio = part["speed_up"][which]
            how = "" if which == "reference loop" else f", {ratio['median']:.2f}x ({_range(ratio)})"
            cells.append(f"{ms:.1f} ms{how}")
        start_up = f"{part['start_up_seconds']:.0f} s | {part['pays_off_after_requests']} requests"
        lines.append(f"| {name} | {' | '.join(cells)} | {start_up} |")
    text = (
        "Milliseconds per answer and how many times faster than the reference loop (`pb.generate`). At this size a forward is "
        "mostly Python and small operations, which the engine cannot remove from a stock model without compiling it; with "
        "`compile` it does. Start-up is the first eight answers with a warm compiler cache; a cold one takes about twice as "
        "long."
    )
    return "\n".join([*lines, "", text, ""])


def _crossing(rows: Rows) -> str:
    """Up to how many requests block diffusion is ahead, and why not further."""
    parts = []
    for compiled in (False, True):
        mine = [row for row in rows if row["compile"] is compiled]
        best = {}
        for row in mine:
            if row["mode"] == "diffusion":
                best[row["concurrency"]] = max(best.get(row["concurrency"], 0.0), row["speed_up"])
        ahead = [n for n, ratio in best.items() if ratio > 1]
        behind = [n for n, ratio in best.items() if ratio <= 1]
        how = "Compiled" if compiled else "Not compiled"
        said = f"{how}, the better sub-block size is ahead of AR up to {max(ahead)} requests in flight"
        said += f" and behind at {min(behind)}" if behind else ""
        ratios = ", ".join(f"{ratio:.2f}x at {n}" for n, ratio in sorted(best.items()))
        parts.append(f"{said} ({ratios}).")
    ar, diffusion = (
        [r for r in rows if r["mode"] == mode and r["compile"]] for mode in ("autoregressive", "diffusion")
    )
    widest = max(diffusion, key=lambda row: row["tokens_per_forward"])
    most = max(r["concurrency"] for r in rows)
    ar_last = next(r for r in ar if r["concurrency"] == most)
    parts.append(
        f"Why it cannot stay ahead: with few requests a forward costs its fixed share and its weights' way through memory, "
        f"whatever its width, so {widest['tokens_per_forward']:.1f} tokens per forward are that many times fewer forwards. "
        f"With many, a forward costs its arithmetic, and block diffusion runs a block of 32 for each "
        f"{widest['tokens_per_forward']:.1f} tokens, and its commit, where AR runs one query per token: AR's steps take "
        f"{1000 * ar_last['step']:.1f} ms with {most} in flight and {1000 * ar[0]['step']:.1f} ms with one."
    )
    return "\n\n".join(parts)


def _context(context: dict[str, Any]) -> str:
    kinds = context["kinds"]
    lines = [
        "The bundled model's shape with random weights and a longer context, one request, one thread, float32.", "",
        "![Step time against context](images/context.png)", "",
        "| step | " + " | ".join(str(n) for n in next(iter(kinds.values()))["lengths"]) + " | slope | attention alone | R² |",
        "|---" * (len(next(iter(kinds.values()))["lengths"]) + 4) + "|",
    ]  # fmt: skip
    alone = list(context["attention_alone_ns_per_token"].values())
    for (name, kind), slope in zip(kinds.items(), alone, strict=True):
        times = " | ".join(f"{ms:.2f} ms" for ms in kind["milliseconds"])
        lines.append(
            f"| {name} | {times} | {kind['slope_ns_per_token']:.0f} ns | {slope:.0f} ns | {kind['r_squared']:.4f} |"
        )
    predicted = context["predicted_ns_per_token"]
    text = (
        f"A context token holds {context['kv_bytes_per_token']} bytes of K/V; at the {context['bytes_per_second'] / 1e9:.1f} "
        f"GB/s that one thread reads from memory that predicts {predicted:.0f} ns per token and step. One query comes near "
        "it; with 8 and 32 queries per step the products with K and V take longer than reading them, and the slope is that of "
        'torch\'s attention on K/V that lie ready ("attention alone").'
    )
    return "\n".join([*lines, "", text, ""])


def _large(large: dict[str, Any]) -> str:
    lines = [
        "Qwen2.5-0.5B's shape with random weights, one request behind 128 tokens, two threads.", "",
        "| dtype | step | ms | over a bare forward of the same matrices | over an AR step |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for dtype in ("bfloat16", "float32"):
        for kind, row in large[dtype].items():
            bare, ar = row["over_bare_forward"], row["over_ar_step"]
            lines.append(
                f"| {dtype} | {kind} | {row['milliseconds']['median']:.0f} ({_range(row['milliseconds'], '.0f')}) | "
                f"{bare['median']:.2f}x ({_range(bare)}) | {ar['median']:.2f}x ({_range(ar)}) |"
            )
    text = (
        "The bare forward runs the model's matrix products alone, at the sizes of the step and with the head at the wanted "
        "positions. This processor has no bfloat16 arithmetic: its products are slow there as soon as they are wider than one "
        "row, so float32 is the better choice for block diffusion on it."
    )
    return "\n".join([*lines, "", text, ""])


def _range(ratio: dict[str, float], form: str = ".2f") -> str:
    return f"{ratio['low']:{form}} to {ratio['high']:{form}}"
