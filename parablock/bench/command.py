"""What `parablock bench` does: models and prompts, the measurement with its progress, the table, the files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from parablock.bench.config import BenchConfig
from parablock.bench.throughput import COLUMNS, Case, Workload, measure, report, table, write_report
from parablock.evals.tables import print_table
from parablock.settings import require_library

TASK_PROMPTS = 256  # of the bundled task
HIDDEN = ("queries/token", "tokens/s of one", "K/V MB", "memory MB")  # a terminal has no room; report.md has all
OF_DRAFTS, OF_TIMES = ("drafted", "accepted", "equal to AR"), ("TTFT ms", "ms/token", "ms/step")


def run_bench(
    config: BenchConfig,
    console: Console,
    folder: Path,
    *,
    model: str | None = None,
    ar: str | None = None,
    random_weights: str | None = None,
    prompts: Path | None = None,
    block_size: int = 32,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Measure, print the table, write table, plots and JSON to `folder`; returns the report.

    Raises:
        ValueError: an unknown shape or dtype, a model that cannot be loaded, an empty file of prompts.
    """
    require_library("matplotlib", "plot")  # told before minutes are spent
    if random_weights is not None:
        config = replace(
            config, tokens_per_step=config.tokens_per_step or 4, prompt_tokens=config.prompt_tokens or (64,)
        )
        workload, name = _random_workload(random_weights, block_size, dtype), f"random weights, {random_weights}"
    else:
        assert model is not None
        workload, name = _workload(model, ar, prompts, dtype), model
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading")

        def show(done: int, total: int, case: Case) -> None:
            bar.update(task, completed=done, total=total, description=f"{case.name}, {case.concurrency} in flight")

        results = measure(workload, config, progress=show)
    content = report(config, name, results)
    setting = content["setting"]
    hidden = (*HIDDEN, *(OF_TIMES if "speculative" in workload.models else OF_DRAFTS))
    printed = Table(
        *(name for name in COLUMNS if name not in hidden),
        title=f"{name} on {setting['processor']}, torch {setting['torch']}, {workload.models['autoregressive'].dtype}; "
        f"medians of {config.repeats} interleaved repeats",
    )
    printed.columns[0].no_wrap = True
    for line in table(content["rows"], ranges=False):
        printed.add_row(*(cell for name, cell in zip(COLUMNS, line, strict=True) if name not in hidden))
    print_table(console, printed)
    for file in write_report(folder, content):
        console.print(f"  {file}")
    return content


def _random_workload(shape: str, block_size: int, dtype: str | None) -> Workload:
    import torch

    from parablock.bench.shapes import random_model
    from parablock.checkpoints.load import weights_dtype
    from parablock.packed import pack

    device = _device()
    weights = weights_dtype(dtype, device)
    weights = torch.bfloat16 if weights == "auto" else weights
    made = random_model(shape, block_size=block_size, dtype=weights, device=device)
    if device == "cpu":
        pack(made, int8=dtype == "int8")
    return Workload({"diffusion": made, "autoregressive": made}, [], made.config.mask_token_id)


def _workload(model: str, ar: str | None, prompts: Path | None, dtype: str | None) -> Workload:
    from parablock.checkpoints.load import load
    from parablock.data.chat import encode_prompt
    from parablock.diffusion.support import is_adapted
    from parablock.evals.word_problems import test_problems

    if prompts is not None:
        questions = [line.strip() for line in prompts.read_text().splitlines() if line.strip()]
        if not questions:
            raise ValueError(f"{prompts} holds no prompt; write one per line")
    else:
        questions = [problem.question for problem in test_problems(1, TASK_PROMPTS)]
    loaded, tokenizer = load(model, dtype=dtype)
    if ar is not None and not is_adapted(loaded.config):
        raise ValueError(f"ar={ar!r}: {model} was never adapted and decodes autoregressively itself; leave --ar out")
    other = ar or ("bundled-ar" if model == "bundled" else None)
    autoregressive = loaded
    if other is not None:
        autoregressive, _ = load(other, dtype=dtype)
    if tokenizer.chat_template is None:
        encoded = [tokenizer(question)["input_ids"] for question in questions]
    else:
        encoded = [encode_prompt(tokenizer, [{"role": "user", "content": question}]) for question in questions]
    if not is_adapted(loaded.config):
        return Workload({"speculative": loaded, "autoregressive": loaded}, encoded, len(tokenizer))
    return Workload({"diffusion": loaded, "autoregressive": autoregressive}, encoded, loaded.config.mask_token_id)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
