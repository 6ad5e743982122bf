"""Prompts from a JSONL file, one per line, in any of the usual formats; what cannot be used is told line by line."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parablock.data.chat import Message
from parablock.data.formats import to_chat

ANSWERS = {"prompt": "completion", "instruction": "output", "question": "answer", "input": "output"}

Id = str | int


@dataclass(frozen=True)
class Prompt:
    """A chat that waits for its answer. `line` is its place in the file, from 1; `id` the same where it names none."""

    line: int
    id: Id
    messages: list[Message]


@dataclass(frozen=True)
class Unusable:
    """A line without a prompt, and why; `id` is None where it names that of an earlier line."""

    line: int
    id: Id | None
    message: str


def read_prompts(path: Path) -> Iterator[Prompt | Unusable]:
    """The lines of a file as they are asked for; empty ones are passed over. The ids are all that is remembered.

    A line's id is its `custom_id` or `id`, a string or a whole number, else the line's number; no two have the same.
    """
    seen: set[Id] = set()
    with path.open("rb") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            known: Id = line
            try:
                row = _object(text)
                known = _id(row, line)
                if known in seen:
                    raise ValueError(f"the id {known!r} stands in an earlier line, too; give every line its own")
                prompt = Prompt(line, known, to_prompt(row))
            except ValueError as error:
                yield Unusable(line, None if known in seen else known, str(error))
            else:
                yield prompt
            seen.add(known)


def count_lines(path: Path) -> int:
    """How many lines `read_prompts` would give."""
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def to_prompt(row: Mapping[str, Any]) -> list[Message]:
    """The question side of a row, in a format that `to_chat` knows; the answer may be missing, and is left out.

    Raises:
        ValueError: no question in it, or a conversation that does not end with the user's message (and an answer).
    """
    # a table's missing fields come as null
    filled = {name: value for name, value in row.items() if value is not None}
    filled |= {answer: "" for question, answer in ANSWERS.items() if question in filled}
    _require_messages(filled)
    said = to_chat(filled)
    if isinstance(said, str):
        raise ValueError("'text' has no question; give messages, or a prompt")
    messages = said[:-1] if said and said[-1]["role"] == "assistant" else said
    for message in messages:
        if not isinstance(message["content"], str):
            raise ValueError(f"a message's content is {type(message['content']).__name__}; give its text as a string")
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("the conversation has no user message at its end (before the answer); add one")
    if not messages[-1]["content"].strip():
        raise ValueError("the prompt is empty; write a question")
    return messages


def _require_messages(row: Mapping[str, Any]) -> None:
    """ValueError where a field that `to_chat` reads is of another kind than it expects."""
    for name in ("messages", "conversations"):
        if name in row:
            _require_list(name, row[name])
            return
    for name in ("prompt", "instruction", "question", "input"):
        if name in row and not isinstance(row[name], str):
            _require_list(name, row[name])


def _require_list(name: str, value: Any) -> None:
    if not isinstance(value, list) or not all(
        isinstance(message, dict) and all(isinstance(message.get(who, ""), str) for who in ("role", "from"))
        for message in value
    ):
        raise ValueError(f"{name!r} is neither a text nor a list of messages; write [{{'role': ..., 'content': ...}}]")


def _object(text: bytes) -> dict[str, Any]:
    try:
        row = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8; save the file in that encoding") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({error}); write one object per line") from None
    if not isinstance(row, dict):
        raise ValueError("it is no JSON object; write one object per line")
    return row


def _id(row: Mapping[str, Any], line: int) -> Id:
    for name in ("custom_id", "id"):
        known = row.get(name)
        if isinstance(known, (str, int)) and not isinstance(known, bool):
            return known
        if known is not None:
            raise ValueError(f"{name}={known!r} is neither a string nor a whole number; give it as one of them")
    return line
