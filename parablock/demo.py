"""`parablock demo`: a small AR model becomes a block-diffusion model, and both answer the same questions.

The story in order: measure the bundled AR model; adapt it live for a few minutes; compare, on fresh held-out problems,
AR decoding, the same with drafts, the live adaptation and the bundled adapted checkpoint; write the table, two plots
and a JSON report.
"""

import copy
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from parablock.bench.compare import Contender, Result, compare, fastest
from parablock.bench.plots import plot_denoising, plot_thresholds
from parablock.checkpoints.load import load
from parablock.data.chat import Sample, encode_prompt
from parablock.data.word_problems import EncodedProblems, Problem
from parablock.decoding.config import DecodeConfig
from parablock.decoding.generate import stream
from parablock.evals.files import write_text
from parablock.evals.machine import machine
from parablock.evals.word_problems import MAX_NEW_TOKENS, evaluate, test_problems
from parablock.settings import require_library
from parablock.training.config import TrainConfig

THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
WIDER_SUB_BLOCKS = (16, 32)
AUTOREGRESSIVE = DecodeConfig(mode="autoregressive", max_new_tokens=MAX_NEW_TOKENS)
SPECULATIVE = DecodeConfig(mode="speculative", max_new_tokens=MAX_NEW_TOKENS)
CHOSEN = 0.9  # the threshold of the paper
LIVE_RECIPE = TrainConfig(  # small blocks are learned first: a few minutes show more of block size 8 than of 32
    batch_size=32, micro_batch_size=32, context_length=256, packing=False, block_size=8, optimizer="muon", lr=3e-3,
    muon_lr=1e-2, warmup_steps=10, decay_share=0.3, log_every=10,
)  # fmt: skip


@dataclass(frozen=True)
class DemoConfig:
    """`live_minutes=0` skips the live adaptation."""

    seed: int = 1
    problems: int = 100
    live_minutes: float = 3.0
    folder: Path = Path("parablock-demo")
    report: Path | None = None

    def __post_init__(self) -> None:
        if self.problems < 1:
            raise ValueError(f"problems={self.problems} is out of range; use at least 1")


@dataclass
class _Live:
    """The live adaptation as it went."""

    model: Any
    steps: int = 0
    seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)


def run_demo(config: DemoConfig, console: Console) -> dict[str, Any]:
    """Run the demo; returns the report that was also written as JSON."""
    require_library("matplotlib", "plot")
    started = time.perf_counter()
    folder = config.folder
    report_path = config.report or folder / "report.json"
    for directory in (folder, report_path.parent):
        directory.mkdir(parents=True, exist_ok=True)
    problems = test_problems(config.seed, config.problems)
    diffusion, tokenizer = load("bundled")
    ar, _ = load("bundled-ar")
    size = sum(p.numel() for p in ar.parameters()) / 1e6
    console.print(f"[bold]parablock demo[/]: a {size:.1f}M-parameter AR model becomes a block-diffusion model")
    console.print(f"test problems: {config.problems}, seed {config.seed} (none of them in the training data)\n")
    console.print(f"[dim]{problems[0].question}[/]\n[green]{problems[0].answer}[/]\n")

    with console.status("measuring the AR model"):
        score = evaluate(ar, tokenizer, problems, AUTOREGRESSIVE)
    console.print(
        f"the AR model solves {score.correct} of {score.problems} "
        f"({100 * score.accuracy:.1f} ± {100 * score.standard_error:.1f} %), one token per forward\n"
    )
    live = _adapt_live(ar, tokenizer, config, console) if config.live_minutes > 0 else None
    decoders = contenders(ar, diffusion, live, tokenizer, problems[0], console)
    with _bar(console) as bar:
        task = bar.add_task(f"{len(decoders)} decoders, the same problems", total=len(problems))
        results = compare(decoders, tokenizer, problems, progress=lambda done: bar.update(task, completed=done))
    print_table(results, console)

    draw_pictures(folder, results, diffusion, tokenizer, problems[0])

    report = {
        "config": {**asdict(config), "folder": str(folder), "report": str(report_path)},
        "machine": machine(),
        "results": [r.as_dict() for r in results],
        "live": None if live is None else {"steps": live.steps, "seconds": live.seconds, "log": live.log},
        "seconds": time.perf_counter() - started,
    }
    write_text(report_path, json.dumps(report, indent=2) + "\n")
    _print_end(results, folder, report_path, config, console)
    return report


def draw_pictures(folder: Path, results: Sequence[Result], model: Any, tokenizer: Any, problem: Problem) -> None:
    """`thresholds.png` from the comparison, `denoising.png` from one more answer of `model`."""
    by_name = {r.name: r for r in results}
    plot_thresholds(folder / "thresholds.png", THRESHOLDS, [by_name[name_of(t)] for t in THRESHOLDS], results[0])
    prompt = encode_prompt(tokenizer, problem.messages()[:1])
    steps = list(stream(model, prompt, _decode(CHOSEN)))
    title = f"{len(steps[-1].tokens())} tokens in {len(steps)} forwards (numbers: which one revealed the token)"
    plot_denoising(folder / "denoising.png", tokenizer, len(prompt), steps, title)


def _adapt_live(ar: Any, tokenizer: Any, config: DemoConfig, console: Console) -> _Live:
    """Adapt a copy of the AR model for `live_minutes`; its learning-rate schedule follows the clock."""
    from transformers import TrainerCallback

    from parablock.training.trainer import train

    live = _Live(copy.deepcopy(ar))
    held_out = test_problems(config.seed + 1, 16)
    budget = 60 * config.live_minutes
    console.print(
        f"[bold]adapting live[/] for {config.live_minutes:g} min, block size 8 (watch tokens per forward rise)"
    )
    samples = EncodedProblems(tokenizer, seed=10**6 + config.seed, count=10**6)
    step_seconds = _seconds_per_step(live.model, tokenizer, samples)
    steps = max(10, int(budget / (1.2 * step_seconds)))  # a sixth of the time goes to the tests in between
    recipe = replace(LIVE_RECIPE, steps=steps, seed=config.seed)
    started = time.perf_counter()

    class Stop(TrainerCallback):  # a slower stretch than the estimate must not make the demo late
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            live.steps = state.global_step
            if live.steps >= recipe.log_every and time.perf_counter() - started > 1.3 * budget:
                control.should_training_stop = True

    def progress(step: int, logs: dict[str, float]) -> None:
        if "loss" not in logs:
            return
        live.model.eval()
        score = evaluate(live.model, tokenizer, held_out, _decode(CHOSEN))
        live.model.train()
        live.log.append({"step": step, "loss": logs["loss"], "tokens_per_forward": score.tokens_per_forward})
        seconds = time.perf_counter() - started
        console.print(
            f"  {seconds:4.0f} s  step {step:4d}/{steps}  loss {logs['loss']:6.3f}  "
            f"tokens/forward {score.tokens_per_forward:4.2f}  solved {score.correct}/{score.problems}"
        )

    with tempfile.TemporaryDirectory() as scratch:
        train(live.model, tokenizer, samples, recipe, scratch, progress=progress, callbacks=[Stop()])
    live.seconds = time.perf_counter() - started
    return live


def _seconds_per_step(model: Any, tokenizer: Any, samples: Sequence[Sample]) -> float:
    """What a step of the live recipe takes on this machine: a short training of a copy, its first step apart."""
    from parablock.training.trainer import train

    times: list[float] = []
    recipe = replace(LIVE_RECIPE, steps=4, log_every=1, warmup_steps=1)
    with tempfile.TemporaryDirectory() as scratch:
        train(
            copy.deepcopy(model), tokenizer, samples, recipe, scratch,
            progress=lambda step, logs: times.append(time.perf_counter()),
        )  # fmt: skip
    return min(b - a for a, b in pairwise(times[: recipe.steps]))


def _decode(threshold: float, sub_block_size: int = 8) -> DecodeConfig:
    return DecodeConfig(max_new_tokens=MAX_NEW_TOKENS, threshold=threshold, sub_block_size=sub_block_size)


def contenders(
    ar: Any, diffusion: Any, live: _Live | None, tokenizer: Any, problem: Problem, console: Console
) -> list[Contender]:
    """AR first; every mode with the dtype that is fastest for it on this machine."""
    prompt = encode_prompt(tokenizer, problem.messages()[:1])
    with console.status("choosing each mode's fastest dtype"):
        best_ar = fastest(_dtypes(ar), AUTOREGRESSIVE, prompt)
        best = fastest(_dtypes(diffusion), _decode(CHOSEN), prompt)
        causal, _ = load("bundled-causal", dtype=best_ar.dtype)
    decoders = [Contender("autoregressive", best_ar, AUTOREGRESSIVE), Contender("speculative", causal, SPECULATIVE)]
    if live is not None:
        model = live.model.to(best.dtype)
        decoders.append(Contender(f"live, {live.steps} steps, block {LIVE_RECIPE.block_size}", model, _decode(CHOSEN)))
    decoders += [Contender(name_of(t), best, _decode(t)) for t in THRESHOLDS]
    return decoders + [Contender(name_of(CHOSEN, s), best, _decode(CHOSEN, s)) for s in WIDER_SUB_BLOCKS]


def name_of(threshold: float, sub_block_size: int = 8) -> str:
    """A block-diffusion decoder's name in the table."""
    return f"block diffusion, {threshold}" + (f", sub-block {sub_block_size}" if sub_block_size != 8 else "")


def _dtypes(model: Any) -> list[Any]:
    import torch

    return [model, copy.deepcopy(model).to(torch.bfloat16)]


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def print_table(results: Sequence[Result], console: Console) -> None:
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


def _print_end(results: Sequence[Result], folder: Path, report: Path, config: DemoConfig, console: Console) -> None:
    ar, speculative, chosen = results[0], results[1], next(r for r in results if r.name == name_of(CHOSEN))
    same = round(speculative.same_answers * speculative.problems)
    console.print(
        f"Speculative decoding is [bold]{speculative.speed_up:.1f}x[/] as fast as AR decoding, with the same answers: "
        f"{same} of {speculative.problems}, token for token."
    )
    console.print(
        f"Block diffusion at threshold {CHOSEN} is [bold]{chosen.speed_up:.1f}x[/] as fast as AR decoding, at "
        f"{100 * chosen.accuracy:.1f} % against {100 * ar.accuracy:.1f} % solved."
    )
    console.print(f"written: {folder / 'thresholds.png'}, {folder / 'denoising.png'}, {report}\n")
    console.print("next:")
    for command, what in (
        ("parablock chat", "talk to the bundled model"),
        (f"parablock demo --bundled --seed {config.seed + 1}", "other test problems"),
        ("parablock generate --json 'QUESTION'", "tokens and figures of one answer"),
    ):
        console.print(f"  {command:38s}{what}")
