"""Responses that are kept in memory, so that later ones may follow them."""

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

MOST_BYTES = 64 * 2**20  # of all that is kept


@dataclass(frozen=True)
class Kept:
    """A response, and the items of its conversation up to its end."""

    response: dict[str, Any]
    items: list[dict[str, Any]]


class ResponseStore:
    """Keeps the last responses, at most so many and so many bytes; the oldest are forgotten first."""

    def __init__(self, most: int, most_bytes: int = MOST_BYTES) -> None:
        self.most = most
        self._most_bytes = most_bytes
        self._bytes = 0
        self._kept: OrderedDict[str, bytes] = OrderedDict()

    def keep(self, kept: Kept) -> None:
        """Remember a response by its id."""
        text = json.dumps({"response": kept.response, "items": kept.items}).encode()
        self._kept[kept.response["id"]] = text
        self._bytes += len(text)
        while len(self._kept) > self.most or self._bytes > self._most_bytes:
            self._bytes -= len(self._kept.popitem(last=False)[1])

    def get(self, known: str) -> Kept | None:
        """The response with this id, if it is still there."""
        text = self._kept.get(known)
        return None if text is None else Kept(**json.loads(text))

    def delete(self, known: str) -> bool:
        """Forget it; False: it is not there."""
        text = self._kept.pop(known, None)
        self._bytes -= len(text or b"")
        return text is not None
