"""Lines in OpenAI's batch format: each is a request to a server, and answered by the server's own handlers.

They run in this process, without a network: a request is read, refused and answered exactly as over HTTP.
"""

import asyncio
import json
import logging
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from parablock.batch.running import Ended, StoppedError
from parablock.data.lines import Line
from parablock.engine.config import EngineConfig
from parablock.server.app import endpoints
from parablock.server.config import ServeConfig
from parablock.server.errors import ApiError
from parablock.server.served import ServedModel
from parablock.settings import Model

log = logging.getLogger(__name__)

ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
LONGEST = 2**31 - 1  # seconds, requests: more than there are


@dataclass(frozen=True)
class Call:
    """A request: its `body` is JSON."""

    line: int
    custom_id: str
    url: str
    body: bytes


class InvalidError(ValueError):
    """A line that is no request; `code` says what is wrong with it in a word."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def read_calls(lines: Iterable[Line]) -> Iterator[Call | Ended]:
    """The requests; a line that is none has ended. No two have the same `custom_id`."""
    seen: set[str] = set()
    for line in lines:
        known: str | None = None
        try:
            if line.row is None:
                raise InvalidError("invalid_json", line.problem)
            known = _custom_id(line.row)
            if known in seen:
                message = f"the custom_id {known!r} stands in an earlier line, too; give every line its own"
                known = None
                raise InvalidError("duplicate_custom_id", message)
            seen.add(known)
            call = _call(line.number, known, line.row)
        except InvalidError as error:
            yield _failure(line.number, known, error.code, f"{line.where}{error}")
        else:
            yield call


def _custom_id(row: dict[str, Any]) -> str:
    known = row.get("custom_id")
    if not isinstance(known, str) or not known:
        raise InvalidError("invalid_custom_id", f"custom_id={known!r} names no request; give every line a string")
    return known


def _call(line: int, custom_id: str, row: dict[str, Any]) -> Call:
    if row.get("method") != "POST":
        raise InvalidError("invalid_method", f"method={row.get('method')!r} is not supported; use 'POST'")
    if row.get("url") not in ENDPOINTS:
        raise InvalidError("invalid_url", f"url={row.get('url')!r} is not supported; use {' or '.join(ENDPOINTS)}")
    body = row.get("body")
    try:  # in a table it may be a text, since bodies differ in their fields
        body = json.loads(body) if isinstance(body, str) else body
        text = json.dumps(body).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidError("invalid_body", f"the body is no JSON ({error}); write an object") from None
    if not isinstance(body, dict):
        raise InvalidError("invalid_body", f"the body is {type(body).__name__}; write an object")
    if body.get("stream"):
        raise InvalidError("invalid_body", "stream=True: a file's answers are whole; leave it out")
    return Call(line, custom_id, row["url"], text)


class CallWorker:
    """Answers requests with a server of its own that no network reaches."""

    def __init__(self, name: str, model: Model, tokenizer: Any, engine: EngineConfig) -> None:
        self.served = ServedModel(name, model, tokenizer, engine)
        config = ServeConfig(max_rows=engine.max_rows, max_queue=LONGEST, deadline=LONGEST)
        self.app = endpoints([self.served], config)

    def close(self) -> None:
        """Stop the engine."""
        self.served.engine.close()

    async def answer(self, task: Call) -> Ended:
        """The response to a request.

        Raises:
            StoppedError: the engine has stopped.
        """
        try:
            status, body = await self._post(task.url, task.body)
        except Exception:  # as the server itself does: what goes wrong for one is no matter of the others
            log.exception("the request %r failed", task.custom_id)
            status, body = 500, ApiError(500, "the server failed; try again", code="internal_error").body
        if self.served.engine.closed:
            raise StoppedError(f"the engine has stopped ({self.served.engine.error})")
        response = {"status_code": status, "request_id": secrets.token_hex(12), "body": body}
        tokens, forwards = 0, 0
        if status == 200:
            tokens, forwards = body["usage"]["completion_tokens"], body["parablock"]["forwards"]
        return Ended(task.line, _record(task.line, task.custom_id, response=response), tokens, forwards)

    async def _post(self, url: str, body: bytes) -> tuple[int, Any]:
        """Status and body of the answer."""
        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http", "method": "POST", "path": url, "query_string": b"", "headers": headers,
            "state": {"log": {}}, "http_version": "1.1", "scheme": "http", "root_path": "",
        }  # fmt: skip
        asked = [{"type": "http.request", "body": body, "more_body": False}]
        status, told = 0, b""

        async def receive() -> dict[str, Any]:
            if asked:
                return asked.pop()
            left: dict[str, Any] = await asyncio.get_running_loop().create_future()  # nobody leaves
            return left

        async def send(message: Any) -> None:
            nonlocal status, told
            status = message.get("status", status)
            told += message.get("body", b"")

        await self.app(scope, receive, send)
        return status, json.loads(told)


def _failure(line: int, custom_id: str | None, code: str, message: str) -> Ended:
    return Ended(line, _record(line, custom_id, error={"code": code, "message": message}))


def _record(line: int, custom_id: str | None, *, response: Any = None, error: Any = None) -> dict[str, Any]:
    """OpenAI's line of a batch's output, and the place in the input."""
    number = f"batch_req_{secrets.token_hex(12)}"
    return {"id": number, "custom_id": custom_id, "line": line, "response": response, "error": error}
