"""What stands before the replicas: has a request routed, passes the answer on, and sees to replicas that die."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from parablock.cluster.figures import merged
from parablock.cluster.passing import Asked, GivenBackError
from parablock.cluster.prefixes import beginning
from parablock.cluster.service import Service
from parablock.server.bodies import DONE
from parablock.server.delivery import READ_SECONDS
from parablock.server.errors import ApiError
from parablock.server.guards import BODY_SECONDS, write_line

COLLECT_SECONDS = 5.0  # that replicas have to tell their metrics
PROMPTED = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


class Front:
    """The ASGI application that Ray's HTTP proxies talk to. It holds no model, and computes nothing."""

    def __init__(self, replicas: DeploymentHandle[Any], service: Service) -> None:
        self._replicas = replicas
        self._max_body = service.serve.max_body
        self._patience = service.serve.deadline + READ_SECONDS
        self._rerun = 0  # requests that another replica answered in the end
        self._broken = 0  # streams that ended with a dead replica's error

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray; uvicorn takes functions alone for applications."""

        async def front(scope: Scope, receive: Receive, send: Send) -> None:
            await self.respond(scope, receive, send)

        return front

    async def respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Anything that comes from the proxy."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            try:
                body = await _read(receive, self._max_body)
                texts = beginning(body) if scope["path"] in PROMPTED else ()
                asked = Asked.of(scope, body, texts)
                if scope["path"] == "/metrics":
                    await self._metrics(asked, send)
                else:
                    await self._pass(asked, send)
            except ApiError as error:
                await error.response()(scope, receive, send)

    async def _pass(self, asked: Asked, send: Send) -> None:
        """The answer of a replica; that of another one if the first is lost before it has begun.

        Raises:
            ApiError: there is no answer, and nothing was sent.
        """
        for last in (False, True):
            started: Message | None = None
            try:
                async for message in self._messages(asked):
                    started = started or message
                    await send(message)
                return
            except (RayActorError, GivenBackError) as error:
                write_line({"id": asked.scope["request_id"], "replica_lost": type(error).__name__, "rerun": not last})
                if started is not None:
                    self._broken += 1
                    await _break_off(started, send)
                    return
                if last:
                    raise ApiError(
                        503, "the replica was lost, and so was another; try again", code="replica_lost"
                    ) from None
                self._rerun += 1

    async def _messages(self, asked: Asked) -> AsyncIterator[Message]:
        """What one replica answers. Whoever leaves cancels it."""
        ends_at = time.monotonic() + self._patience
        stream: Any = self._replicas.options(stream=True).answer.remote(asked)
        try:
            while True:
                try:
                    async with asyncio.timeout(ends_at - time.monotonic()):
                        messages = await anext(stream)
                except StopAsyncIteration:
                    stream = None
                    return
                except TimeoutError:
                    text = f"no replica answered within {self._patience:g} seconds; try again"
                    raise ApiError(504, text, code="deadline_exceeded") from None
                for message in messages:
                    yield _without_id(message)
        finally:
            if stream is not None:
                stream.cancel()

    async def _metrics(self, asked: Asked, send: Send) -> None:
        """Those of all replicas, if one of them lets the client see its own."""
        messages = [message async for message in self._messages(asked)]
        if messages[0]["status"] == 200:
            pages = await self._replicas.broadcast("page").results_async(
                timeout_s=COLLECT_SECONDS, return_exceptions=True
            )
            told = dict(page for page in pages if not isinstance(page, BaseException))
            text = merged(told, rerun=self._rerun, broken=self._broken)
            headers = [(k, v) for k, v in messages[0]["headers"] if k != b"content-length"]
            messages = [{**messages[0], "headers": headers}, {"type": "http.response.body", "body": text}]
        for message in messages:
            await send(message)


def _without_id(message: Message) -> Message:
    """The proxy adds the request's id itself."""
    if message["type"] != "http.response.start":
        return message
    return {**message, "headers": [(name, value) for name, value in message["headers"] if name != b"x-request-id"]}


async def _break_off(started: Message, send: Send) -> None:
    """End an answer whose replica is gone: a stream with an event that says so."""
    if b"text/event-stream" not in dict(started["headers"]).get(b"content-type", b""):
        raise ConnectionError("the replica was lost within its answer")
    error = ApiError(500, "the replica that answered was lost; try again", code="replica_lost")
    event = f"data: {json.dumps(error.body)}\n\n{DONE}"
    await send({"type": "http.response.body", "body": event.encode()})


async def _read(receive: Receive, longest: int) -> bytes:
    """The body; of one that is too long, enough for the replica to see that it is."""
    body: bytes = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while len(body) <= longest:
                message = await receive()
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} seconds") from None
    return body


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
