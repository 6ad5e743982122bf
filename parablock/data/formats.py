"""One row of a dataset, in any of the usual formats, as chat messages or plain text."""

from collections.abc import Mapping
from typing import Any

from parablock.data.chat import Message

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
EXPECTED = (
    "messages (role, content) | conversations (from, value) | instruction, output (and input) | prompt, completion | "
    "question, answer | input, output | text"
)


def to_chat(row: Mapping[str, Any]) -> list[Message] | str:
    """The messages of a row, or its text if it is plain text (all of which is learned).

    Recognised by the columns: OpenAI's `messages`, ShareGPT's `conversations`, Alpaca's `instruction`, `input`,
    `output`, `prompt` and `completion` (strings or messages), `question` and `answer` (GSM8K), Llama-Nemotron's `input`
    (messages or a string) and `output`, with or without a `system_prompt`, and `text`. A line of `parablock batch` that
    tells an `error` has no messages.

    Raises:
        ValueError: other columns, or a role that is none; it names what it found and what it expects.
    """
    columns = set(row)
    if "messages" in columns:
        return [_message(m, "role", "content") for m in row["messages"]]
    if "conversations" in columns:
        return [_message(m, "from", "value") for m in row["conversations"]]
    if {"instruction", "output"} <= columns:
        more = row.get("input") or ""
        return _turn(f"{row['instruction']}\n\n{more}" if more else row["instruction"], row["output"], row)
    for question, answer in (("prompt", "completion"), ("question", "answer"), ("input", "output")):
        if {question, answer} <= columns:
            return _turn(row[question], row[answer], row)
    if "text" in columns:
        return str(row["text"])
    if "error" in columns:
        return []
    raise ValueError(f"the columns {', '.join(sorted(columns)) or '(none)'} are no known format; expected {EXPECTED}")


def _turn(question: Any, answer: Any, row: Mapping[str, Any]) -> list[Message]:
    system = row.get("system_prompt")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for content, role in ((question, "user"), (answer, "assistant")):
        if isinstance(content, str):
            messages.append({"role": role, "content": content})
        else:
            messages += [_message(m, "role", "content") for m in content]
    return messages


def _message(message: Mapping[str, Any], role: str, content: str) -> Message:
    if role not in message or content not in message:
        raise ValueError(f"a message has the fields {', '.join(sorted(message))}; expected {role} and {content}")
    who = message[role]
    return {"role": ROLES.get(who, who), "content": message[content] or ""}
