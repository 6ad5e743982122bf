"""From answers to the client: whole or as a stream, until it is told or has gone away."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Protocol

from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from parablock.server.answers import Answers
from parablock.server.errors import ApiError

READ_SECONDS = 30.0  # that a client has to read what is left of a stream when its deadline is over


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class AnswerWriter(Protocol):
    """Writes answers in the words of an endpoint. `failed`: a stream ended with an error."""

    answers: Answers
    failed: bool

    async def whole(self) -> dict[str, Any]:
        """All in one object."""

    def events(self) -> AsyncIterator[str]:
        """Server-sent events; an error ends them with one of its own."""


class Delivery(Response):
    """The response to one request. However it ends, the answers are closed and `ended(outcome)` is called once."""

    def __init__(self, writer: AnswerWriter, ended: Callable[[str], None], *, stream: bool) -> None:
        super().__init__()
        self._writer = writer
        self._ended = ended
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, and watch for the client meanwhile."""
        outcome = "cancelled"
        response: Response | None = None
        try:
            if self._stream:
                # a client that does not read must not hold its place for ever
                async with asyncio.timeout(self._writer.answers.seconds_left + READ_SECONDS):
                    outcome = await _unless_gone(self._send_events(send), receive)
            else:
                response = JSONResponse(await _unless_gone(self._writer.whole(), receive))
                outcome = "finished"
        except ApiError as error:
            outcome, response = "error", error.response()
        except (ClientGoneError, TimeoutError):
            return
        finally:
            self._ended(outcome)
        if response is not None:
            await response(scope, receive, send)

    async def _send_events(self, send: Send) -> str:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        headers.append((b"x-accel-buffering", b"no"))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for event in self._writer.events():
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        return "error" if self._writer.failed else "finished"


async def _unless_gone(work: Coroutine[Any, Any, Any], receive: Receive) -> Any:
    """The work's result; if the client goes away before, the work is cancelled."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
