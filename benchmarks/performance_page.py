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
choice of threads, compiled; prompts of about 45 tokens, answers of about 40.

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
        "`compile` it does. Start-up is the first eight answers with an empty compiler cache."
    )
    return "\n".join([*lines, "", text, ""])


def _crossing(rows: Rows) -> str:
    """Up to how many requests block diffusion is ahead, and why the lead shrinks."""
    parts = []
    by_size = {size: [r for r in rows if r["sub_block_size"] == size] for size in (8, 32)}
    for size, mine in by_size.items():
        behind = [row["concurrency"] for row in mine if row["speed_up"] <= 1]
        where = f"falls behind AR at {min(behind)} in flight" if behind else "is ahead of AR at every load measured"
        ratios = ", ".join(f"{row['speed_up']:.2f}x at {row['concurrency']}" for row in mine)
        parts.append(f"Sub-block {size} {where}: {ratios}.")
    most = max(row["concurrency"] for row in rows)
    last = {size: next(r for r in mine if r["concurrency"] == most) for size, mine in by_size.items()}
    ar = next(r for r in rows if r["mode"] == "autoregressive" and r["concurrency"] == most)
    parts.append(
        "With few requests a forward costs its fixed share whatever its width, so fewer forwards are faster answers. With many, a "
        "forward costs what it computes, and block diffusion computes more: for each response token its forwards run "
        f"{last[8]['queries_per_token']:.1f} queries with sub-block 8 and {last[32]['queries_per_token']:.1f} with sub-block 32, "
        f"AR's {ar['queries_per_token']:.1f} (prompts included, which cost both alike). By arithmetic alone AR would end up "
        f"{last[8]['queries_per_token'] / ar['queries_per_token']:.1f} and {last[32]['queries_per_token'] / ar['queries_per_token']:.1f} "
        f"times as fast. It does not get there on this machine because its queries are dearer: {_per_query(ar)} each with {most} "
        f"in flight, against {_per_query(last[8])} and {_per_query(last[32])}, in part since every one of them reads K/V of its own, which "
        "32 queries of a block share."
    )
    return "\n\n".join(parts)


def _per_query(row: dict[str, Any]) -> str:
    return f"{1e6 / (row['tokens_per_second'] * row['queries_per_token']):.0f} µs"


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
