"""Lines to answers: workers are kept full, whoever reads the lines and whoever writes the answers.

A worker answers a task in a coroutine, so one thread waits for all that are under way. `Local` has one worker, in this
process; `actors.py` has many on Ray.
"""

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

IN_FLIGHT = 4  # tasks that run or wait in an engine, in rows of it
PAUSE = 10.0  # seconds without an end that a caller hears of


class Task(Protocol):
    """What a worker answers."""

    @property
    def line(self) -> int:
        """Its place in the input."""


@dataclass(frozen=True)
class Ended:
    """What became of a line: its line of the output; `tokens` of the answer, which took so many decode `forwards`."""

    line: int
    record: dict[str, Any]
    tokens: int = 0
    forwards: int = 0


class StoppedError(RuntimeError):
    """Nothing can be run any more."""


class Worker(Protocol):
    """A model and its engine."""

    async def answer(self, task: Any) -> Ended:
        """What becomes of a task, whatever that is; many run at the same time.

        Raises:
            StoppedError: the engine has stopped.
        """

    def close(self) -> None:
        """Free all that it holds."""


class Pool(Protocol):
    """One worker or many."""

    room: int  # tasks that it takes at once

    @property
    def running(self) -> int:
        """Tasks that have not ended."""

    def submit(self, task: Any) -> None:
        """Take one more."""

    def wait(self) -> list[Ended]:
        """Until a task ends, or for a while."""


def answers(pool: Pool, entries: "Iterable[Task | Ended]") -> Iterator[Ended | None]:
    """What becomes of the entries, as they end; None when a while has passed without an end.

    The pool is always given more than it has rows for, and never more than its room. An entry that is answered already
    (a line that cannot be used) is passed on.

    Raises:
        StoppedError: nothing can be run any more.
    """
    waiting = iter(entries)
    more = True
    while more or pool.running:
        while more and pool.running < pool.room:
            entry = next(waiting, None)
            if entry is None:
                more = False
            elif isinstance(entry, Ended):
                yield entry
            else:
                pool.submit(entry)
        if pool.running:
            ended: list[Ended | None] = [*pool.wait()]
            yield from ended or [None]


class Local:
    """One worker in this process. The calling thread runs the event loop, while it waits."""

    def __init__(self, worker: Worker, max_rows: int) -> None:
        self.worker = worker
        self.room = IN_FLIGHT * max_rows
        self._loop = asyncio.new_event_loop()
        self._running: set[asyncio.Task[Ended]] = set()
        self._ended: asyncio.Queue[asyncio.Task[Ended]] = asyncio.Queue()

    def __enter__(self) -> "Local":
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.run_until_complete(self._give_up())
        self._loop.close()
        self.worker.close()

    @property
    def running(self) -> int:
        """Tasks that have not ended."""
        return len(self._running)

    def submit(self, task: Any) -> None:
        """Take one more."""
        running = self._loop.create_task(self.worker.answer(task))
        self._running.add(running)
        running.add_done_callback(self._ended.put_nowait)

    def wait(self) -> list[Ended]:
        """Until a task ends, or for a while."""
        ended = self._loop.run_until_complete(self._next())
        self._running.difference_update(ended)
        return [task.result() for task in ended]

    async def _next(self) -> list[asyncio.Task[Ended]]:
        try:
            async with asyncio.timeout(PAUSE):
                ended = [await self._ended.get()]
        except TimeoutError:
            return []
        while not self._ended.empty():
            ended.append(self._ended.get_nowait())
        return ended

    async def _give_up(self) -> None:
        for running in self._running:
            running.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
