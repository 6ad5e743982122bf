"""`parablock batch`: the prompts of a file, answered by one engine, in a file that `parablock adapt` reads.

Three pieces that know nothing of each other: prompts are read (`data/prompts.py`), run (`running.py`) and written
(`output.py`).
"""

import sys
import time
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from parablock.batch.output import FEW, AnswerFile, Tally
from parablock.batch.running import Answer, EngineStoppedError, Failure, answers
from parablock.checkpoints.load import load
from parablock.data.prompts import count_lines, read_prompts
from parablock.decoding.config import DecodeConfig
from parablock.decoding.generate import resolve
from parablock.engine.config import EngineConfig
from parablock.engine.engine import Engine
from parablock.settings import require

COUNTED = 2**30  # bytes: of a larger file the lines are not counted beforehand
TELL_EVERY = 10.0  # seconds between two lines of progress where there is no terminal


def run_batch(
    model: str,
    prompts: Path,
    output: Path,
    config: DecodeConfig,
    *,
    dtype: str | None = None,
    max_rows: int = 32,
    limit: int | None = None,
) -> int:
    """Answer the prompts of a file; returns the exit status: 1 if a line has no answer, 130 after Ctrl-C.

    A line's random numbers depend on the seed and on its place in the file alone.

    Raises:
        ValueError: no such file, an `output` that is finished, written by another process or begun by another job,
            or settings the model cannot serve.
    """
    console = Console(highlight=False)
    engine_config = EngineConfig(max_rows=max_rows, block_size=config.block_size)
    require(limit is None or limit >= 1, "limit", limit, "use at least 1")
    if not prompts.is_file():
        raise ValueError(f"there is no file at {str(prompts)!r}; check the path")
    size = prompts.stat().st_size
    job = {
        "model": model, "dtype": dtype, "decoding": asdict(config), "prompts": prompts.name, "bytes": size,
        "limit": limit,
    }  # fmt: skip
    total = None if size > COUNTED else min(count_lines(prompts), limit or sys.maxsize)
    if total == 0:
        raise ValueError(f"{str(prompts)!r} is empty; it needs at least one line")
    with AnswerFile(output, job) as file:
        progress = _Progress(console, total, len(file.lines))
        try:
            loaded, tokenizer = load(model, dtype=dtype)
            config = replace(config, seed=file.seed)
            resolve(loaded, [[0]], config if config.max_new_tokens else replace(config, max_new_tokens=1))
            left = (entry for entry in islice(read_prompts(prompts), limit) if entry.line not in file.lines)
            with Engine(loaded, engine_config) as engine, progress:
                engine.start()
                for answer in answers(engine, tokenizer, left, config):
                    if answer is not None:
                        file.write(answer.record())
                    progress.advance(answer)
        except (KeyboardInterrupt, EngineStoppedError) as error:
            why = str(error) or "stopped"
            done = f"{len(file.lines)} of {total or 'all'} lines are done"
            print(f"parablock: {why}; {done}, the same command goes on from there", file=sys.stderr)
            return 1 if isinstance(error, EngineStoppedError) else 130
        file.finish()
    _tell(file.tally, output, progress, console)
    return 1 if file.tally.failed else 0


class _Progress:
    """How far it is: a live line in a terminal, elsewhere a line now and then. `before`: lines done by earlier runs."""

    def __init__(self, console: Console, total: int | None, before: int) -> None:
        self.console, self.total, self.before = console, total, before
        self.answered = self.ended = self.tokens = self.forwards = 0  # by this run
        self.started = self.told = time.perf_counter()
        columns = (
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"), TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("answering", total=total, completed=before, speed="")

    def __enter__(self) -> "_Progress":
        if self.before:
            self.console.print(f"going on: {self.before} lines are done")
        self.started = self.told = time.perf_counter()
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    @property
    def seconds(self) -> float:
        """Of this run, without loading."""
        return time.perf_counter() - self.started

    def advance(self, answer: Answer | Failure | None) -> None:
        """One more has ended, or none has for a while."""
        if answer is not None:
            self.ended += 1
        if isinstance(answer, Answer):
            self.answered += 1
            self.tokens += answer.tokens
            self.forwards += answer.forwards
        if self.console.is_terminal:
            self.bar.update(self.task, completed=self.before + self.ended, speed=self._speed())
        elif time.perf_counter() - self.told >= TELL_EVERY:
            self.told = time.perf_counter()
            left = "" if self.total is None or not self.ended else f", {self._seconds_left(self.total):.0f} s left"
            of = "" if self.total is None else f" of {self.total}"
            self.console.print(f"{self.before + self.ended}{of} done, {self._speed()}{left}")

    def _seconds_left(self, total: int) -> float:
        return (total - self.before - self.ended) * self.seconds / self.ended

    def _speed(self) -> str:
        return f"{self.answered / self.seconds:.1f} requests/s, {self.tokens / self.seconds:,.0f} tokens/s"


def _tell(tally: Tally, output: Path, progress: _Progress, console: Console) -> None:
    """What came out, in one line; what failed, in one on stderr."""
    cut = f" ({tally.cut} cut at max_new_tokens)" if tally.cut else ""
    failed = f", {tally.failed} lines without" if tally.failed else ""
    own = f"{progress.answered} of them now: " if progress.before else ""
    tpf, seconds = progress.tokens / max(1, progress.forwards), progress.seconds
    console.print(
        f"{output}: {tally.answered} answers{cut}{failed}; {own}{progress.tokens:,} tokens in {seconds:.1f} s, "
        f"{tpf:.2f} tokens per forward",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    if tally.failed:
        named = ", ".join(map(str, tally.first_failed)) + (" ..." if tally.failed > FEW else "")
        print(f"parablock: {tally.failed} lines have no answer (line {named}); {output} says why", file=sys.stderr)
