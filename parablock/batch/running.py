"""Prompts to answers: one engine is kept full, whoever reads the prompts and whoever writes the answers."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from jinja2.exceptions import TemplateError

from parablock.data.chat import Message, encode_prompt
from parablock.data.prompts import Id, Prompt, Unusable
from parablock.decoding.config import DecodeConfig
from parablock.engine.engine import Engine
from parablock.engine.request import Handle, Request

IN_FLIGHT = 4  # requests that run or wait in the engine, in rows of it
PAUSE = 10.0  # seconds without an end that a caller hears of


class EngineStoppedError(RuntimeError):
    """Nothing can be run any more."""


@dataclass(frozen=True)
class Answer:
    """What the engine made of a prompt; `tokens` of the answer, which took so many decode `forwards`."""

    prompt: Prompt
    text: str
    finish_reason: str
    prompt_tokens: int
    tokens: int
    forwards: int

    def record(self) -> dict[str, Any]:
        """The line of the output."""
        return {
            "id": self.prompt.id, "line": self.prompt.line,
            "messages": [*self.prompt.messages, {"role": "assistant", "content": self.text}],
            "finish_reason": self.finish_reason, "prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens,
        }  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """A line without an answer, and why."""

    line: int
    id: Id | None
    message: str

    def record(self) -> dict[str, Any]:
        """The line of the output."""
        return {"id": self.id, "line": self.line, "error": {"message": self.message}}


def answers(
    engine: Engine, tokenizer: Any, prompts: Iterable[Prompt | Unusable], config: DecodeConfig
) -> Iterator[Answer | Failure | None]:
    """What becomes of the prompts, as they end; None when a while has passed without an end.

    The engine is always given more than it has rows for, and never more than `IN_FLIGHT` times that.

    Raises:
        EngineStoppedError: the engine has stopped.
    """
    waiting = iter(prompts)
    running: dict[int, tuple[Prompt, Handle]] = {}
    ended: SimpleQueue[int] = SimpleQueue()
    more = True
    while more or running:
        while more and len(running) < IN_FLIGHT * engine.config.max_rows:
            prompt = next(waiting, None)
            if prompt is None:
                more = False
            elif isinstance(prompt, Unusable):
                yield Failure(prompt.line, prompt.id, prompt.message)
            else:
                try:
                    request = Request(encode(tokenizer, prompt.messages), config, sample=prompt.line - 1)
                    handle = engine.submit(request, partial(ended.put, prompt.line))
                except (ValueError, TypeError, LookupError, TemplateError) as error:  # roles that do not alternate, say
                    _require_running(engine)
                    yield Failure(prompt.line, prompt.id, str(error))
                else:
                    running[prompt.line] = prompt, handle
        if not running:
            continue
        try:
            line = ended.get(timeout=PAUSE)
        except Empty:
            yield None
            continue
        prompt, handle = running.pop(line)
        if handle.status == "failed":
            _require_running(engine)
            yield Failure(prompt.line, prompt.id, f"decoding failed: {handle.error}")
            continue
        text = tokenizer.decode(handle.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        reason, tokens = str(handle.finish_reason), len(handle.tokens)
        yield Answer(prompt, text, reason, len(handle.request.prompt), tokens, handle.forwards)


def encode(tokenizer: Any, messages: list[Message]) -> list[int]:
    """The ids of a conversation; without a chat template, of a single message as it is."""
    if tokenizer.chat_template is None and len(messages) == 1:
        return list(tokenizer(messages[0]["content"])["input_ids"])
    return encode_prompt(tokenizer, messages)


def _require_running(engine: Engine) -> None:
    if engine.closed:
        raise EngineStoppedError(f"the engine has stopped ({engine.error})")
