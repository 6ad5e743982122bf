"""What passes between the front and a replica: a request, and word that a replica gives it back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

PASSED = ("method", "path", "raw_path", "query_string", "http_version", "scheme", "client", "server", "headers")


@dataclass(frozen=True)
class Asked:
    """A request as it came, with its whole body."""

    scope: dict[str, Any]
    body: bytes = field(repr=False)
    beginning: tuple[str, ...] = field(repr=False)  # the texts of its prompt, for the router
    went: list[str] = field(default_factory=list)  # the replicas it was sent to: another try is for others

    @classmethod
    def of(cls, scope: Scope, body: bytes, beginning: Sequence[str]) -> "Asked":
        """What can be sent of an ASGI scope; the request's id is the one that Ray's proxy gave it."""
        sent = {name: scope[name] for name in PASSED if name in scope}
        request_id = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")[:64]
        return cls(
            {"type": "http", "asgi": {"version": "3.0"}, **sent, "request_id": request_id}, body, tuple(beginning)
        )


class GivenBackError(Exception):
    """The replica has not begun to answer, and cannot: another one may."""
