"""What every request passes before it is understood: the key, the body's size, and one line in the log afterwards."""

import asyncio
import contextlib
import hmac
import json
import logging
import os
import secrets
import time
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from parablock.server.errors import ApiError

log = logging.getLogger(__name__)

BODY_SECONDS = 30.0  # a body that takes longer to arrive is given up


class Guard:
    """ASGI middleware around the application.

    `scope["state"]["log"]` is the request's line: handlers add to it what they know (never prompts or answers).
    `scope["state"]["id"]` is its id, where somebody before has given it one.
    """

    def __init__(self, app: ASGIApp, key: str | None, max_body: int, responded: Callable[[int], None]) -> None:
        self._app = app
        self._responded = responded  # told every status
        self._key = None if key is None else key.encode()
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, pass on, log."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        state = scope.setdefault("state", {})
        line: dict[str, Any] = {"id": state.get("id") or secrets.token_hex(8)}
        state["log"] = line = line | {"method": scope["method"], "path": scope["path"]}

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                line["status"] = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", line["id"].encode())]
            await send(message)

        try:
            self._check_key(scope)
            body = await self._read(scope, receive)
            await self._app(scope, _replay(body, receive), told)
        except ApiError as error:
            await error.response()(scope, receive, told)
        except Exception as error:
            line["error"] = type(error).__name__
            log.exception("request %s failed", line["id"])
            if "status" in line:  # the answer has begun: nothing to add
                raise
            await ApiError(500, "the server failed; try again", code="internal_error").response()(scope, receive, told)
        finally:
            line["ms"] = round(1000 * (time.perf_counter() - started), 1)
            self._responded(line.get("status", 0))
            write_line(line)

    def _check_key(self, scope: Scope) -> None:
        if self._key is None or scope["path"].startswith("/health"):
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + self._key):
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, "a wrong API key, or none; send it as a bearer token", None, "invalid_api_key", headers)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body; too long or too slow is an error."""
        too_large = ApiError(
            413, f"the body has more than {self._max_body} bytes; shorten it", code="request_too_large"
        )
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body:
            raise too_large
        body: bytes = b""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > self._max_body:
                        raise too_large
                    if not message.get("more_body", False):
                        return body
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} seconds") from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once more, then what comes after it."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


def write_line(line: dict[str, Any]) -> None:
    """One JSON line on stderr; a log that cannot be written stops no answer."""
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with contextlib.suppress(OSError):
        os.write(2, (json.dumps({"time": when, **line}) + "\n").encode())
