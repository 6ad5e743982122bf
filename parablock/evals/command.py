"""What `parablock eval` does: tasks, model, questions, table, files."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from parablock.decoding.config import DecodeConfig
from parablock.evals import paper
from parablock.evals.code import CODE_TASKS
from parablock.evals.config import EvalConfig
from parablock.evals.cost import speed
from parablock.evals.results import SAMPLES, Sample, make_report, samples_of, task_reports, write
from parablock.evals.tables import print_table
from parablock.evals.tasks import load_tasks, parse_data

MANY_TASKS = 20  # more are not shown one by one

if TYPE_CHECKING:
    from parablock.evals.harness import ParablockLM


def run_eval(
    model: str,
    config: EvalConfig,
    decoding: Mapping[str, Any],
    console: Console,
    folder: Path | None = None,
    *,
    dtype: str | None = None,
    compile: bool = False,
) -> dict[str, Any] | None:
    """Measure a checkpoint, print the table, write the files; returns the report (None on all processes but the first).

    `decoding`: the settings of `DecodeConfig` that were given; the others are the suite's, or the defaults.

    Raises:
        ValueError: unknown tasks, data that cannot be read, a checkpoint or settings that cannot work, a folder that
            holds an evaluation already, programs to be run that were not allowed.
    """
    first = os.environ.get("RANK", "0") == "0"
    code = _code_tasks(config, console if first else None)
    folder = folder or Path("parablock-eval") / f"{Path(model).name}-{datetime.now():%Y%m%d-%H%M%S}"
    if first and (folder / SAMPLES).exists():
        raise ValueError(f"{str(folder)!r} holds an evaluation already; choose another folder with --output")
    settings = DecodeConfig(**(dict(paper.DECODING) if config.suite else {}) | dict(decoding))
    for name in ("lm_eval", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from datasets import disable_progress_bars
    from transformers import set_seed

    disable_progress_bars()
    set_seed(config.seed)  # some tasks shuffle their choices while they are loaded
    files = parse_data(config.data)
    if code and (unknown := [task for task in files if task not in (*code, *config.tasks)]) and not config.suite:
        raise ValueError(f"data names {', '.join(unknown)}, which is not among the tasks {', '.join(config.tasks)}")
    jobs = [(shots, *_tasks(config, names, shots, files)) for shots, names in _by_shots(config)]

    from parablock.evals.harness import ParablockLM

    lm = ParablockLM(
        model, batch_size=config.batch_size, dtype=dtype, compile=compile,
        **{name: getattr(settings, name) for name in DecodeConfig.__dataclass_fields__},
    )  # fmt: skip
    chat = _chat(lm, config, model, code, console if first else None)
    started = time.perf_counter()
    reports: dict[str, Any] = {}
    samples: list[Sample] = []
    for shots, manager, tasks in jobs:
        found = _ask(lm, config, manager, tasks, shots, chat)
        costs = lm.total_costs()
        if found is not None:
            new = samples_of(found)
            reports |= task_reports(found, new, {task: speed(cost) for task, cost in costs.items()})
            samples += new
    for task in code if lm.rank == 0 else ():
        from parablock.evals.code_tasks import run_code_task

        local = next(iter(files.get(task, {}).values()), None)
        reports[task], new = run_code_task(lm, task, folder, console, file=local, limit=config.limit)
        samples += new
    lm.barrier()
    if lm.rank != 0:
        return None
    report = make_report(
        model, config, replace(lm.config, seed=settings.seed), reports, time.perf_counter() - started,
        chat=chat, dtype=str(lm.model.dtype), processes=lm.world_size, cut_prompts=lm.too_long,
    )  # fmt: skip
    _print(report, config, console)
    for file in write(folder, report, samples):
        console.print(f"  {file}", soft_wrap=True)
    return report


def _code_tasks(config: EvalConfig, console: Console | None) -> list[str]:
    """The tasks that run programs, if that is allowed."""
    asked = [task for task in CODE_TASKS if config.suite or task in config.tasks]
    if not asked or config.run_code:
        return asked
    if config.suite is None:
        raise ValueError(
            f"{' and '.join(asked)} run programs that the model writes; allow it (in a sandbox) with --run-code"
        )
    if console:
        console.print("HumanEval and MBPP, which run programs that the model writes, are left out without --run-code")
    return []


def _by_shots(config: EvalConfig) -> list[tuple[int | None, list[str]]]:
    """The harness's tasks that are asked with the same number of examples."""
    if config.suite is None:
        names = [name for name in config.tasks if name not in CODE_TASKS]
        return [(config.num_fewshot, names)] if names else []
    shots: dict[int | None, list[str]] = {}
    for entry in paper.PAPER_TASKS:
        if entry.task not in CODE_TASKS:
            number = entry.num_fewshot if config.num_fewshot is None else config.num_fewshot
            shots.setdefault(number, []).append(entry.task)
    return list(shots.items())


def _tasks(
    config: EvalConfig, names: Sequence[str], shots: int | None, files: Mapping[str, Mapping[str, str]]
) -> tuple[Any, list[Any]]:
    own = {task: f for task, f in files.items() if task not in CODE_TASKS and (task in names or not config.suite)}
    return load_tasks(
        names, seed=config.seed, limit=config.limit, num_fewshot=shots, files=own, include_path=config.include_path
    )


def _chat(lm: "ParablockLM", config: EvalConfig, model: str, code: Sequence[str], console: Console | None) -> bool:
    """Whether questions go through the chat template."""
    has = lm.tokenizer.chat_template is not None
    if not has and (config.chat or config.system or code):
        asked = "humaneval and mbpp" if code else "--chat and --system"
        raise ValueError(f"{model} has no chat template; leave {asked} out, or use a checkpoint with one")
    if not has and console:
        console.print(f"{model} has no chat template: questions are put as they are", soft_wrap=True)
    return has if config.chat is None else config.chat


def _ask(
    lm: "ParablockLM", config: EvalConfig, manager: Any, tasks: Sequence[Any], shots: int | None, chat: bool
) -> dict[str, Any] | None:
    from lm_eval.evaluator import evaluate

    loaded = manager.load(list(tasks))
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (shots is not None and own != 0):  # a task that says 0 knows why
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=config.seed)
    found: dict[str, Any] | None = evaluate(
        lm,
        loaded,
        limit=config.limit,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat and config.multiturn,
        system_instruction=config.system,
        bootstrap_iters=1000,
    )
    return found


def _print(report: dict[str, Any], config: EvalConfig, console: Console) -> None:
    costs = ["tokens/forward", "tokens/s"]
    if drafting := report["decoding"]["mode"] == "speculative":
        costs.append("drafts accepted")
    table = Table("task", "n", "metric", "value", "95 %", *costs, title=report["model"])
    many = len(report["tasks"]) > MANY_TASKS and any(task["group"] for task in report["tasks"].values())
    for name, task in report["tasks"].items():
        if many and not task["group"]:
            continue  # results.json has the parts of a group
        head, tail = [name, str(task["questions"] or "")], [""] * len(costs)
        if pace := task["speed"]:
            tail = [f"{pace['tokens_per_forward']:.2f}", f"{pace['tokens_per_second']:.0f}"]
            tail += [f"{pace['accepted']} of {pace['drafted']}"] if drafting else []
        for metric, figure in task["metrics"].items():
            error = f" ± {figure['stderr']:.4f}" if figure["stderr"] is not None else ""
            low_high = "{:.3f} to {:.3f}".format(*figure["interval"]) if "interval" in figure else ""
            table.add_row(*head, metric.removesuffix(",none"), f"{figure['value']:.4f}{error}", low_high, *tail)
            head, tail = ["", ""], [""] * len(costs)
    print_table(console, table)
    if config.suite:
        beside = Table("benchmark", "metric", "here", "paper 1.5B", "paper 7B", title="Fast-dLLM v2, table 1")
        for row in paper.paper_rows(report["tasks"]):
            beside.add_row(*row)
        print_table(console, beside)
        if config.limit:
            console.print(f"only {config.limit} questions of each task: not the paper's benchmarks")
    if cut := report["cut_prompts"]:
        console.print(f"{cut} prompts were longer than the context: their beginnings were cut off")
