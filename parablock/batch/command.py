"""`parablock batch`: the lines of files, answered by one engine or many, in a file of answers.

Pieces that know nothing of each other: lines are read (`data/lines.py`), understood (`plain.py`, `calls.py`), run
(`running.py`; on Ray `actors.py`) and written (`output.py`).
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from parablock.batch.config import BatchConfig
from parablock.batch.output import AnswerFile
from parablock.batch.progress import BatchProgress, tell
from parablock.batch.running import Local, Pool, StoppedError, answers
from parablock.batch.workers import Kind, Setup, kind_of, read_tasks
from parablock.data.lines import count_lines, list_files, read_lines
from parablock.decoding.config import DecodeConfig
from parablock.engine.config import EngineConfig
from parablock.settings import require_library

COUNTED = 2**30  # bytes: of larger files the lines are not counted beforehand


def run_batch(
    model: str, source: Path, output: Path, decoding: DecodeConfig, config: BatchConfig, dtype: str | None = None
) -> int:
    """Answer the lines of a file or a folder; returns the exit status: 1 if one has no answer, 130 after Ctrl-C.

    A prompt's random numbers depend on the seed and on its place in the input alone.

    Raises:
        ValueError: no such file, an `output` that is finished, written by another process or begun by another job,
            settings the model cannot serve, or a cluster that is not there or too small.
    """
    console = Console(highlight=False)
    if config.processes:
        require_library("ray", "ray")
    files = list_files(source)
    if source.is_dir() and output.resolve().parent == source.resolve():
        raise ValueError(f"{str(output)!r} lies among the files that are read; name an output elsewhere")
    kind = kind_of(files)
    _check(kind, decoding)
    job = {
        "model": model, "dtype": dtype, "decoding": asdict(decoding), "limit": config.limit,
        "files": {file.name: file.stat().st_size for file in files},
    }  # fmt: skip
    total = _total(files, config.limit)
    if total == 0:
        raise ValueError(f"{str(source)!r} is empty; it needs at least one line")
    with AnswerFile(output, job, ordered=config.ordered) as file:
        progress = BatchProgress(console, total, len(file.lines))
        engine = EngineConfig(max_rows=config.max_rows, block_size=decoding.block_size)
        setup = Setup(kind, model, dtype, replace(decoding, seed=file.seed), engine)
        tasks = read_tasks(kind, islice(read_lines(files), config.limit))
        try:
            with _pool(setup, config) as pool, progress:
                for ended in answers(pool, (task for task in tasks if task.line not in file.lines)):
                    if ended is not None:
                        file.write(ended.record)
                    progress.advance(ended)
        except (KeyboardInterrupt, StoppedError) as error:
            why = str(error) or "stopped"
            done = f"{len(file.lines)} of {total or 'all'} lines are done"
            print(f"parablock: {why}; {done}, the same command goes on from there", file=sys.stderr)
            return 1 if isinstance(error, StoppedError) else 130
        file.finish()
    tell(file.tally, output, progress, console)
    return 1 if file.tally.failed else 0


@contextlib.contextmanager
def _pool(setup: Setup, config: BatchConfig) -> Iterator[Pool]:
    """What answers the tasks: this process, or others on Ray."""
    if config.processes:
        from parablock.batch.actors import Actors

        with Actors(setup, config) as actors:
            yield actors
    else:
        with Local(setup.worker(), config.max_rows) as local:
            yield local


def _check(kind: Kind, decoding: DecodeConfig) -> None:
    """Requests say themselves how they are decoded."""
    unsaid: Any = asdict(DecodeConfig())
    changed = {name: value for name, value in asdict(decoding).items() if value != unsaid[name]}
    if kind == "requests" and changed:
        name, value = next(iter(changed.items()))
        raise ValueError(f"{name}={value!r} would change nothing: each request's body says its own; leave it out")


def _total(files: Sequence[Path], limit: int | None) -> int | None:
    if sum(file.stat().st_size for file in files) > COUNTED:
        return None
    return min(count_lines(files), limit or sys.maxsize)
