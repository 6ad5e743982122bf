"""What every request passes before it is understood: key, limits, the body's size; and a line in the log afterwards."""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from parablock.server.errors import ApiError
from parablock.server.keys import Key, find_key
from parablock.server.limits import Limits, Spending
from parablock.server.metrics import Metrics

log = logging.getLogger(__name__)

BODY_SECONDS = 30.0  # a body that takes longer to arrive is given up


class Guard:
    """ASGI middleware around the application.

    `scope["state"]["log"]` is the request's line: handlers add to it what they know (never prompts or answers).
    `scope["state"]["id"]` is its id, where somebody before has given it one. `scope["state"]["spending"]`: where its
    key's limits are, if there are any.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[Key], max_body: int, metrics: Metrics) -> None:
        self._app = app
        self._keys = keys
        self._limits = {key: Limits(key, partial(metrics.rate_limited, key.name)) for key in keys}
        self._max_body = max_body
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, pass on, log."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        state = scope.setdefault("state", {})
        line: dict[str, Any] = {"id": state.get("id") or secrets.token_hex(8)}
        state["log"] = line = line | {"method": scope["method"], "path": scope["path"]}
        spending: Spending | None = None

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                line["status"] = message["status"]
                own = {"x-request-id": line["id"]}
                if spending:
                    spending.settle()
                    own |= spending.limits.headers()
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in own.items())]
            await send(message)

        try:
            key = self._check_key(scope, line)
            if key is not None and scope["method"] == "POST":
                state["spending"] = spending = Spending(self._limits[key], line)
                spending.begin()
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
            if spending:
                spending.settle()
            self._metrics.responded(line.get("status", 0))
            write_line(line)

    def _check_key(self, scope: Scope, line: dict[str, Any]) -> Key | None:
        """Whose key it is; the log's line says who asked, or from where one came who may not."""
        if not self._keys or scope["path"].startswith("/health"):
            return None
        given = dict(scope["headers"]).get(b"authorization", b"")
        key = find_key(self._keys, given)
        if key is None:
            line |= {"refused": "wrong key" if given else "no key", "client": (scope.get("client") or ["unknown"])[0]}
            self._metrics.refused_keys.inc()
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, "a wrong API key, or none; send it as a bearer token", None, "invalid_api_key", headers)
        if key.name is not None:
            line["key"] = key.name
        return key

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
