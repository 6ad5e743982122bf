"""Many workers on Ray, each a process with an engine of its own; this process hands out the tasks and writes the file.

Ray's actors and not Ray Data: its unit is a block of rows, of which nothing is seen before the whole block is done, and
which is run again as a whole when its worker dies. Here every answer arrives by itself, so the file is the one that a
single process writes, and is gone on with in the same way, whoever was killed.
"""

import math
import os
from collections import deque
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from parablock.batch.config import BatchConfig
from parablock.batch.running import IN_FLIGHT, PAUSE, Ended, StoppedError, Worker
from parablock.batch.workers import Setup
from parablock.cluster.joining import join

DEATHS = 3  # of each worker in a row, without an answer in between: then the job ends


class Remote:
    """A worker in its own process."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._worker: Worker | None = None

    async def load(self) -> None:
        """Load the model; a method of its own, so that its errors arrive as they are."""
        self._worker = self._setup.worker()

    async def answer(self, task: Any) -> Ended:
        """What becomes of a task."""
        assert self._worker is not None, "load comes first"
        return await self._worker.answer(task)


@dataclass(eq=False)
class _Actor:
    """A worker as this process knows it."""

    handle: Any
    ready: bool = False
    lost: bool = False
    tasks: dict[int, Any] = field(default_factory=dict)  # that it has, by line


class Actors:
    """So many workers on a Ray cluster. One that dies is replaced, and what it had not answered goes to others.

    Raises (by `with`):
        ValueError: no cluster at that address, or one that is too small.
    """

    def __init__(self, setup: Setup, config: BatchConfig) -> None:
        here = Path(setup.model).expanduser()
        self._setup = replace(setup, model=str(here.resolve())) if here.exists() else setup
        self._config = config
        assert config.processes is not None
        self._count = config.processes
        self._each = IN_FLIGHT * config.max_rows
        self.room = self._each * self._count
        self._waiting: deque[Any] = deque()
        self._actors: list[_Actor] = []
        self._told: SimpleQueue[tuple[_Actor, int | None, Future[Any]]] = SimpleQueue()  # line None: it is loaded
        self._deaths = 0

    def __enter__(self) -> "Actors":
        cpus = max(len(os.sched_getaffinity(0)), math.ceil(self._count * self._config.cpus_per_replica))
        with ExitStack() as joined:
            joined.enter_context(join(self._config.address, cpus, quiet=True))
            self._require_room()
            self._actors = [self._start() for _ in range(self._count)]
            self._joined = joined.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._joined.close()  # ends the workers, and a cluster of our own

    @property
    def running(self) -> int:
        """Tasks that have not ended."""
        return len(self._waiting) + sum(len(actor.tasks) for actor in self._actors)

    def submit(self, task: Any) -> None:
        """Take one more."""
        self._waiting.append(task)
        self._hand_out()

    def wait(self) -> list[Ended]:
        """Until a task ends, or for a while.

        Raises:
            ValueError: the model cannot be loaded, or cannot serve the settings.
            StoppedError: the workers die, one after the other.
        """
        ended: list[Ended] = []
        try:
            told = [self._told.get(timeout=PAUSE)]
            while not self._told.empty():
                told.append(self._told.get())
        except Empty:
            return []
        for actor, line, future in told:
            ended += self._note(actor, line, future)
        self._hand_out()
        return ended

    def _hand_out(self) -> None:
        """Tasks to the workers that have the fewest."""
        while self._waiting:
            able = [actor for actor in self._actors if actor.ready and len(actor.tasks) < self._each]
            if not able:
                return
            actor = min(able, key=lambda actor: len(actor.tasks))
            task = self._waiting.popleft()
            actor.tasks[task.line] = task
            self._listen(actor, task.line, actor.handle.answer.remote(task))

    def _listen(self, actor: _Actor, line: int | None, reference: Any) -> None:
        reference.future().add_done_callback(lambda future: self._told.put((actor, line, future)))

    def _start(self) -> _Actor:
        import ray

        remote = ray.remote(Remote).options(
            num_cpus=self._config.cpus_per_replica, num_gpus=self._config.gpus_per_replica,
            max_concurrency=self._each + 1, max_restarts=0, max_task_retries=0,
        )  # fmt: skip
        actor = _Actor(remote.remote(self._setup))
        self._listen(actor, None, actor.handle.load.remote())
        return actor

    def _note(self, actor: _Actor, line: int | None, future: "Future[Any]") -> list[Ended]:
        """What a worker has told, or that it will tell nothing any more."""
        from ray.exceptions import RayError

        error = future.exception()
        if error is None:
            if line is None:
                actor.ready = True
                return []
            self._deaths = 0
            return [future.result()] if actor.tasks.pop(line, None) is not None else []
        if line is None and isinstance(error, ValueError):
            raise ValueError(str(getattr(error, "cause", error)))
        if not isinstance(error, (RayError, StoppedError)):
            raise error
        self._replace(actor, error)
        return []

    def _replace(self, actor: _Actor, error: BaseException) -> None:
        """Another one in its place; what it had is handed out first."""
        import ray

        if actor.lost:
            return
        actor.lost = True
        self._deaths += 1
        if self._deaths > DEATHS * self._count:
            reason = (str(getattr(error, "cause", error)) or type(error).__name__).strip().splitlines()[0]
            raise StoppedError(f"the workers die one after the other ({reason})")
        ray.kill(actor.handle)
        self._waiting.extendleft(reversed(actor.tasks.values()))
        self._actors[self._actors.index(actor)] = self._start()

    def _require_room(self) -> None:
        """ValueError where the cluster could never run so many workers."""
        import ray

        has: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        for name, option, each in (
            ("CPU", "cpus", self._config.cpus_per_replica), ("GPU", "gpus", self._config.gpus_per_replica),
        ):  # fmt: skip
            if each * self._count > has.get(name, 0):
                raise ValueError(
                    f"replicas={self._count} with {each:g} {name}s each need {each * self._count:g}, and the cluster "
                    f"has {has.get(name, 0):g}; use fewer --replicas, or fewer --{option}-per-replica"
                )
