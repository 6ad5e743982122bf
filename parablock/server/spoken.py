"""An answer to a chat as OpenAI writes it: a message, or the deltas that add up to it."""

import secrets
import string
from typing import Any

from parablock.server.tool_formats import Format
from parablock.server.tool_reader import Arguments, Begun, Event, Said

SIGNS = string.ascii_letters + string.digits


def call_id(format: Format) -> str:
    """A new call's id, as the model's chat template takes it back."""
    if format.short_ids:
        return "".join(secrets.choice(SIGNS) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"


class Spoken:
    """What was told of one answer so far."""

    def __init__(self, format: Format) -> None:
        self._format = format
        self._text = ""
        self._calls: list[dict[str, Any]] = []

    def add(self, event: Event) -> dict[str, Any] | None:
        """What a stream's next chunk says of it, if anything."""
        index = len(self._calls) - 1
        match event:
            case Said(text):
                self._text += text
                return {"content": text}
            case Begun(name):
                head = {"id": call_id(self._format), "type": "function"}
                self._calls.append({**head, "function": {"name": name, "arguments": ""}})
                return {"tool_calls": [{"index": index + 1, **head, "function": {"name": name, "arguments": ""}}]}
            case Arguments(text):
                self._calls[-1]["function"]["arguments"] += text
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        return None

    def message(self) -> dict[str, Any]:
        """All of it."""
        message: dict[str, Any] = {"role": "assistant", "content": self._text}
        if self._calls:
            message |= {"content": self._text or None, "tool_calls": self._calls}
        return message

    @property
    def text(self) -> str:
        """Beside calls."""
        return self._text
