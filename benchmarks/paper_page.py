"""Writes `docs/results.md` from the stored results of `paper.py`: every verdict follows from the figures and their errors."""

from pathlib import Path

import numpy as np
from paper_figures import (
    BLUE,
    GREY,
    Groups,
    Panel,
    Part,
    accuracy_line,
    claim,
    draw,
    percent,
    points,
    table,
    trained,
)  # fmt: skip
from paper_page_cache import cache_section, staleness_section
from paper_page_decoding import SAME, block_sizes_section, sub_blocks_section, thresholds_section
from paper_page_strategies import strategies_section
from paper_statistics import Estimate, above, by_seed, estimate

TABLE_2 = {"naive": ("41.3", "59.0"), "+ padding": ("42.2", "60.1"), "+ complementary": ("45.0", "62.0")}


def page(parts: dict[str, Part], pictures: Path) -> str:
    """The whole page; what has not been measured is named and left out."""
    sections = {
        "training": training_section, "sub-blocks": sub_blocks_section, "block-sizes": block_sizes_section,
        "thresholds": thresholds_section, "cache": cache_section, "strategies": strategies_section,
        "staleness": staleness_section,
    }  # fmt: skip
    text = [_head(parts), *(write(parts[name], pictures) for name, write in sections.items() if name in parts)]
    if missing := [name for name in sections if name not in parts]:
        text.append(f"Not measured yet: {', '.join(missing)}.\n")
    return "\n".join([*text, _limits()])


def _head(parts: dict[str, Part]) -> str:
    settings = [part["setting"] for part in parts.values()]
    both = {
        key: ", ".join(sorted({s[key] for s in settings})) for key in ("processor", "torch", "transformers", "commit")
    }
    decoding = [part for part in parts.values() if "problems" in part]
    counts = ", ".join(sorted({str(part["problems"]) for part in decoding})) or "no"
    commands = sorted({s["command"].replace(f" {name}", " PART", 1) for name, s in zip(parts, settings, strict=True)})
    models = ", ".join(sorted({name for part in decoding for name in trained(part)})) or "none"
    return f"""# The paper's tables in miniature

Written by `python benchmarks/paper.py` from [benchmarks/results](../benchmarks/results) (`paper-*.json`). The claims are those of
Fast-dLLM v2 ([arXiv 2509.26328](https://arxiv.org/abs/2509.26328)), made there with models of 1.5B and 7B parameters on GSM8K,
HumanEval and other benchmarks. Here they are put to the bundled task and models of 1M parameters.

Each sentence after a heading begins with a verdict, computed from the figures: *agrees* when the measured difference lies more
than two standard errors on the claim's side, *disagrees* when it lies more than two on the other side, *cannot tell* in
between. Accuracies within {100 * SAME:.0f} points of each other count as the same.

- Machine: {both["processor"]}, 2 cores, no GPU, float32; torch {both["torch"]}, transformers {both["transformers"]}; commits {both["commit"]}.
- Models: {models}, one per training seed (the bundled AR model adapted for 200 steps at block size 8 and 500 at 32;
  `benchmarks/paper_training.py`), and the bundled model, which is trained longer, in a column of its own. Verdicts rest on the
  models of this page, not on the bundled one.
- Problems: {counts} fresh ones per model and setting. All settings of one model answer the same problems, so differences are
  paired; every model has problems of its own. Greedy decoding, threshold 0.9 and sub-block size 8 unless said.
- Errors: ± is one standard error, the larger of two: that from the problems (or repeats), and that from the seeds.
- Commands: {"; ".join(f"`{command}`" for command in commands)}; parts: {", ".join(parts)}.
"""


def training_section(part: Part, pictures: Path) -> str:
    rows = part["rows"]
    names = [row["variant"] for row in rows]

    def runs(variant: str, mode: str = "diffusion") -> Groups:
        mine = sorted((r for r in part["runs"] if r["variant"] == variant), key=lambda r: r["seed"])
        return [(np.arange(r[mode]["problems"]) < r[mode]["correct"]).astype(float) for r in mine]

    def gain(variant: str, over: str, mode: str = "diffusion") -> Estimate:
        return by_seed(runs(variant, mode), runs(over, mode))

    padding, complementary = gain("+ padding", "naive"), gain("+ complementary", "+ padding")
    each = [estimate(runs(name)) for name in ("naive", "+ padding", "+ complementary")]
    steps = [c.mean() - 2 * b.mean() + a.mean() for a, b, c in zip(*(runs(n) for n in list(TABLE_2)), strict=True)]
    more = Estimate(
        complementary.value - padding.value,
        float(np.sqrt(each[0].within ** 2 + 4 * each[1].within ** 2 + each[2].within ** 2)),
        estimate([np.array([step]) for step in steps]).between,
    )
    claims = [
        claim(above(padding), "padding to whole blocks beats the naive token shift", f"{points(padding, sign=True)} points",
              "+0.9 points (nine scores on average), +1.1 on GSM8K"),
        claim(above(complementary), "complementary views beat padding alone", f"{points(complementary, sign=True)} points",
              "+2.8 points on average, +1.9 on GSM8K"),
        claim(above(more), "complementary views add more than padding does", f"{points(more, sign=True)} points more",
              "1.9 points more on average, 0.8 on GSM8K"),
    ]  # fmt: skip
    beyond = [
        _gain("isolating the samples of a row (the default here)", gain("isolated", "+ complementary"), "the published packing"),
        _gain("a clean context for a block's first token", gain("clean first token", "isolated"), "the default"),
        _gain("an AR loss of weight 0.5 beside", gain("AR loss 0.5", "isolated"), "the default")
        + f" In AR mode: {points(gain('AR loss 0.5', 'isolated', 'autoregressive'), sign=True)} points.",
    ]  # fmt: skip
    body = [
        [row["variant"], percent(runs(row["variant"])), f"{row['diffusion']['tokens_per_forward']:.2f}",
         percent(runs(row["variant"], "autoregressive")), *TABLE_2.get(row["variant"], ("", ""))] for row in rows
    ]  # fmt: skip
    x = list(range(len(names)))
    panel = Panel(
        "recipe", "accuracy (%)",
        [accuracy_line("block diffusion", x, [runs(n) for n in names], BLUE, "o"),
         accuracy_line("the same model in AR mode", x, [runs(n, "autoregressive") for n in names], GREY, "s")],
        ticks=(x, names),
    )  # fmt: skip
    first = part["runs"][0]
    return f"""## The training recipe (table 2)

{chr(10).join(claims)}

{draw(pictures / "paper-training.png", "Accuracy by recipe", [panel])}

{table(["recipe", "accuracy", "tokens per forward", "accuracy in AR mode", "paper, average", "paper, GSM8K"], body)}

The bundled AR model adapted for {first["steps"]} steps of 16 packed rows of 256 tokens, block size 8; {first["diffusion"]["problems"]} problems per run, {max(row["seeds"] for row in rows)}
seeds. "+" adds one thing to the line before; "clean first token" and "AR loss" each change one thing of "isolated". Beyond the
paper:

{chr(10).join(beyond)}

Runs made at commit {", ".join(sorted({run["commit"] for run in part["runs"]}))}. All these runs are short: the adaptation first unlearns, and what a recipe does to a long run was not measured.
"""


def _gain(what: str, gain: Estimate, over: str) -> str:
    verdict = {"Agrees": "gains", "Disagrees": "loses", "Cannot tell": "makes no difference that these runs can show:"}
    return f"- {what[0].upper()}{what[1:]} {verdict[above(gain)]} {points(gain, sign=True)} points against {over}."


def _limits() -> str:
    return """## What it does not show

- A task model of 1M parameters on a CPU is no 7B on an A100. The task is narrow, its answers have at most 96 tokens, and a
  forward costs what Python and small operations cost. Ratios of speed depend on the machine; accuracies depend on the task.
- Agreement here means that an effect shows at this size too; disagreement, that it does not show at this size. Neither says
  anything of the paper's own measurements.
- Three training seeds give an uncertain standard error over seeds. Two standard errors are then less than 95 % certain, and
  among so many claims some verdict may be chance.
- All models start from one AR model and one kind of data. Sampling, long contexts and other tasks were not measured.
- The paper's figures are quoted as published; nobody here ran its models.
"""
