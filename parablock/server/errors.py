"""Everything that goes wrong is told in OpenAI's shape: message, type, param, code."""

import re
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
RESTART = 5  # seconds that a supervisor and a server need, about, until there is one again
HTTP_NAMES = {"max_new_tokens": "max_tokens"}  # what a setting is called over HTTP


class ErrorDetails(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error as the client reads it."""

    error: ErrorDetails


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.body = {
            "error": {
                "message": _printable(message, 2000),
                "type": TYPES.get(status, "invalid_request_error"),
                "param": None if param is None else _printable(param, 200),
                "code": code,
            }
        }

    def response(self) -> JSONResponse:
        """The whole HTTP answer."""
        return JSONResponse(self.body, self.status, self.headers)


def from_value_error(error: ValueError) -> ApiError:
    """What the library refuses, with its own words; settings are called what they are called over HTTP."""
    message = str(error)
    for name, http_name in HTTP_NAMES.items():
        message = message.replace(name, http_name)
    named = re.match(r"(\w+)=", message)
    return ApiError(400, message, named[1] if named else None, "invalid_value")


def shutting_down(seconds: int = 0) -> ApiError:
    """Told to stop, the server takes nothing more; what runs needs so many seconds, about."""
    headers = {"Retry-After": str(seconds + RESTART)}
    return ApiError(503, "the server is shutting down; try again later", code="shutting_down", headers=headers)


def engine_stopped(kind: str) -> ApiError:
    """Nothing can be decoded any more, because of an error of this kind."""
    message = f"the engine has stopped ({kind}); the server ends, try again when it has been started again"
    return ApiError(503, message, code="engine_stopped", headers={"Retry-After": str(RESTART)})


def from_validation(errors: Sequence[Any]) -> ApiError:
    """The first thing that is wrong with a body, named."""
    first = errors[0]
    # pydantic also names which kind of a union it tried
    where = [str(part) for part in first["loc"] if part not in ("body", "str") and "[" not in str(part)]
    param = ".".join(where) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param} is not supported; leave it out", param, "unsupported_parameter")
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is no valid JSON", None, "invalid_json")
    if param is None and first["type"] == "model_attributes_type":  # also what a page's form would send
        message = "the body is no JSON object; send one with the header Content-Type: application/json"
        return ApiError(400, message, None, "invalid_json")
    message = first["msg"].removeprefix("Value error, ")
    if param is None and first["type"] == "value_error":  # our own words, which begin with the field
        return ApiError(400, message, re.split(r"\W", message, maxsplit=1)[0], "invalid_value")
    return ApiError(400, f"{param or 'the body'}: {message}", param, "invalid_value")


async def on_api_error(_: Request, error: Exception) -> JSONResponse:
    """An error that was meant for the client."""
    assert isinstance(error, ApiError)
    return error.response()


async def on_validation_error(_: Request, error: Exception) -> JSONResponse:
    """A body that does not fit its model."""
    assert isinstance(error, RequestValidationError)
    return from_validation(error.errors()).response()


async def on_http_error(_: Request, error: Exception) -> JSONResponse:
    """A path or method that does not exist."""
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})).response()


def _printable(text: str, longest: int) -> str:
    """What a client sent may be no Unicode, and long."""
    return text[:longest].encode("utf-8", "replace").decode()
