"""How far a batch is, and what came out."""

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from parablock.batch.output import FEW, Tally, failed
from parablock.batch.running import Ended

TELL_EVERY = 10.0  # seconds between two lines of progress where there is no terminal


class BatchProgress:
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

    def __enter__(self) -> "BatchProgress":
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

    def advance(self, ended: Ended | None) -> None:
        """One more has ended, or none has for a while."""
        if ended is not None:
            self.ended += 1
            self.answered += not failed(ended.record)
            self.tokens += ended.tokens
            self.forwards += ended.forwards
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


def tell(tally: Tally, output: Path, progress: BatchProgress, console: Console) -> None:
    """What came out, in one line; what failed, in one on stderr."""
    cut = f" ({tally.cut} cut at max_new_tokens)" if tally.cut else ""
    without = f", {tally.failed} lines without" if tally.failed else ""
    own = f"{progress.answered} of them now: " if progress.before else ""
    tpf, seconds = progress.tokens / max(1, progress.forwards), progress.seconds
    console.print(
        f"{output}: {tally.answered} answers{cut}{without}; {own}{progress.tokens:,} tokens in {seconds:.1f} s, "
        f"{tpf:.2f} tokens per forward",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    if tally.failed:
        named = ", ".join(map(str, tally.first_failed)) + (" ..." if tally.failed > FEW else "")
        print(f"parablock: {tally.failed} lines have no answer (line {named}); {output} says why", file=sys.stderr)
