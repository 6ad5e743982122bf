"""Prompts from a file's lines, in any of the usual formats; what cannot be used is told line by line."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from parablock.data.chat import Message
from parablock.data.formats import to_chat
from parablock.data.lines import Line

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


def read_prompts(lines: Iterable[Line]) -> Iterator[Prompt | Unusable]:
    """The prompts of lines as they are asked for. The ids are all that is remembered.

    A line's id is its `custom_id` or `id`, a string or a whole number, else the line's number; no two have the same.
    """
    seen: set[Id] = set()
    for line in lines:
        known: Id = line.number
        try:
            if line.row is None:
                raise ValueError(line.problem)
            known = _id(line.row, line.number)
            if known in seen:
                raise ValueError(f"the id {known!r} stands in an earlier line, too; give every line its own")
            prompt = Prompt(line.number, known, to_prompt(line.row))
        except ValueError as error:
            yield Unusable(line.number, None if known in seen else known, f"{line.where}{error}")
        else:
            yield prompt
        seen.add(known)


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


def _id(row: Mapping[str, Any], line: int) -> Id:
    for name in ("custom_id", "id"):
        known = row.get(name)
        if isinstance(known, (str, int)) and not isinstance(known, bool):
            return known
        if known is not None:
            raise ValueError(f"{name}={known!r} is neither a string nor a whole number; give it as one of them")
    return line
