"""One replica: a process with its own engines, and the same application as one process has."""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from starlette.types import Message

from parablock.cluster.passing import Asked, GivenBackError
from parablock.cluster.service import Service


class Replica:
    """Answers requests that the front passes on."""

    def __init__(self, service: Service, key: str | None) -> None:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        import torch

        from parablock.server.app import State, create_app
        from parablock.server.keys import given_keys
        from parablock.server.served import load_models

        if not service.cluster.gpus_per_replica:
            torch.set_num_threads(max(1, int(service.cluster.cpus_per_replica)))
        self.name: str = serve.get_replica_context().replica_id.unique_id
        self._served = load_models(service.models, service.serve.engine(), service.dtype)
        self._app = create_app(self._served, service.serve, given_keys(None, key))
        self._state: State = self._app.state.server

    async def answer(self, asked: Asked) -> AsyncIterator[list[Message]]:
        """The ASGI messages of the answer, those that come at once together; the first with what follows the headers.

        Raises:
            GivenBackError: the engine has stopped before anything was answered.
        """
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        left = asyncio.Event()
        task = asyncio.create_task(self._run(asked, sent, left))
        begun, ended = False, False
        messages: list[Message] = []
        try:
            while not ended:
                await _take(sent, messages)
                if ended := messages[-1] is None:
                    messages.pop()
                if not begun and (self._state.stopped or (ended and not messages)):
                    raise GivenBackError
                if messages and (begun or len(messages) > 1):
                    yield messages
                    begun, messages = True, []
        finally:
            left.set()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self, asked: Asked, sent: "asyncio.Queue[Message | None]", left: asyncio.Event) -> None:
        pending = [{"type": "http.request", "body": asked.body, "more_body": False}]

        async def receive() -> Message:
            if pending:
                return pending.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.put_nowait(message)

        try:
            await self._app({**asked.scope, "state": {"id": asked.scope["request_id"]}}, receive, send)
        finally:
            sent.put_nowait(None)

    def page(self) -> tuple[str, str]:
        """This replica's metrics."""
        return self.name, self._state.metrics.page().decode()

    def drain(self) -> int:
        """Take nothing more; how many requests still run."""
        self._state.draining = True
        return self._state.running

    def close(self) -> None:
        """End what runs, with an error of its own."""
        self._state.draining = True
        for served in self._served:
            served.engine.close()
        if self._state.traces:
            self._state.traces.close()

    def check_health(self) -> None:
        """Ray replaces a replica that raises here."""
        if self._state.stopped:
            raise RuntimeError(f"the engine of {self._state.stopped.name} has stopped: {self._state.stopped.stopped}")

    def __del__(self) -> None:
        self.close()


async def _take(queue: "asyncio.Queue[Any]", into: list[Any]) -> None:
    """At least one message, and all that are there."""
    into.append(await queue.get())
    while not queue.empty():
        into.append(queue.get_nowait())
