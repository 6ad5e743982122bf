"""The puzzle model: what the threshold of block diffusion costs in accuracy and gives in speed, on fresh problems."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from parablock.bench.compare import Contender, Solved, compare, fastest
from parablock.bench.plots import plot_denoising, plot_thresholds
from parablock.checkpoints.load import load
from parablock.data.chat import encode_prompt
from parablock.data.word_problems import Problem
from parablock.decoding.config import DecodeConfig
from parablock.decoding.generate import stream
from parablock.demo.progress import bar
from parablock.demo.sizes import DemoConfig
from parablock.evals.word_problems import MAX_NEW_TOKENS, test_problems

THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
WIDER_SUB_BLOCKS = (16, 32)
AUTOREGRESSIVE = DecodeConfig(mode="autoregressive", max_new_tokens=MAX_NEW_TOKENS)
CHOSEN = 0.9  # the threshold of the paper


def show_puzzles(config: DemoConfig, console: Console) -> list[Solved]:
    """Compare the bundled models, print the table, draw the pictures."""
    problems = test_problems(config.seed, config.problems)
    diffusion, tokenizer = load("bundled")
    ar, _ = load("bundled-ar")
    size = sum(p.numel() for p in ar.parameters()) / 1e6
    console.print(
        f"[bold]Block diffusion[/]: a {size:.1f}M-parameter model that solves word problems was adapted whole; a block "
        "is denoised in parallel, and a token is revealed when the model is surer of it than a threshold"
    )
    console.print(f"[dim]{problems[0].question}[/]\n[green]{problems[0].answer}[/]")
    decoders = contenders(ar, diffusion, tokenizer, problems[0], console)
    with bar(console) as progress:
        task = progress.add_task(f"{len(decoders)} decoders, the same problems", total=len(problems))
        results = compare(decoders, tokenizer, problems, progress=lambda done: progress.update(task, completed=done))
    print_table(results, console)
    draw_pictures(config.folder, results, diffusion, tokenizer, problems[0])
    chosen = next(r for r in results if r.name == name_of(CHOSEN))
    console.print(
        f"Block diffusion at threshold {CHOSEN} is [bold]{chosen.speed_up:.1f}x[/] as fast as AR decoding, at "
        f"{100 * chosen.accuracy:.1f} % against {100 * results[0].accuracy:.1f} % solved.\n"
    )
    return results


def draw_pictures(folder: Path, results: Sequence[Solved], model: Any, tokenizer: Any, problem: Problem) -> None:
    """`thresholds.png` from the comparison, `denoising.png` from one more answer of `model`."""
    by_name = {r.name: r for r in results}
    plot_thresholds(folder / "thresholds.png", THRESHOLDS, [by_name[name_of(t)] for t in THRESHOLDS], results[0])
    prompt = encode_prompt(tokenizer, problem.messages()[:1])
    steps = list(stream(model, prompt, _decode(CHOSEN)))
    title = f"{len(steps[-1].tokens())} tokens in {len(steps)} forwards (numbers: which one revealed the token)"
    plot_denoising(folder / "denoising.png", tokenizer, len(prompt), steps, title)


def contenders(ar: Any, diffusion: Any, tokenizer: Any, problem: Problem, console: Console) -> list[Contender]:
    """AR first; every mode with the dtype that is fastest for it on this machine."""
    prompt = encode_prompt(tokenizer, problem.messages()[:1])
    with console.status("choosing each mode's fastest dtype"):
        best_ar = fastest(_dtypes(ar), AUTOREGRESSIVE, prompt)
        best = fastest(_dtypes(diffusion), _decode(CHOSEN), prompt)
    decoders = [Contender("autoregressive", best_ar, AUTOREGRESSIVE)]
    decoders += [Contender(name_of(t), best, _decode(t)) for t in THRESHOLDS]
    return decoders + [Contender(name_of(CHOSEN, s), best, _decode(CHOSEN, s)) for s in WIDER_SUB_BLOCKS]


def name_of(threshold: float, sub_block_size: int = 8) -> str:
    """A block-diffusion decoder's name in the table."""
    return f"block diffusion, {threshold}" + (f", sub-block {sub_block_size}" if sub_block_size != 8 else "")


def print_table(results: Sequence[Solved], console: Console) -> None:
    """The comparison as people read it."""
    table = Table(title="the same problems, one at a time", title_justify="left")
    table.add_column("decoder, threshold (sub-block 8)")
    for column in ("accuracy", "tokens/s", "tokens/forward", "speed-up"):
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(
            r.name,
            f"{100 * r.accuracy:.1f} ± {100 * r.standard_error:.1f} %",
            f"{r.tokens_per_second:.0f}",
            f"{r.tokens_per_forward:.2f}",
            f"{r.speed_up:.2f}x",
        )
    console.print(table)
    best = {r.name.split(",")[0]: r.dtype for r in results}
    console.print("[dim]fastest dtype of each on this machine: " + "; ".join(f"{k}: {v}" for k, v in best.items()))


def _decode(threshold: float, sub_block_size: int = 8) -> DecodeConfig:
    return DecodeConfig(max_new_tokens=MAX_NEW_TOKENS, threshold=threshold, sub_block_size=sub_block_size)


def _dtypes(model: Any) -> list[Any]:
    import torch

    return [model, copy.deepcopy(model).to(torch.bfloat16)]
