"""Lines with a prompt each, all decoded by the settings of the job; the answers are a data set."""

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from jinja2.exceptions import TemplateError

from parablock.batch.running import Ended, StoppedError
from parablock.data.chat import Message, encode_prompt
from parablock.data.lines import Line
from parablock.data.prompts import Id, Prompt, Unusable, read_prompts
from parablock.decoding.config import DecodeConfig
from parablock.decoding.generate import resolve
from parablock.engine.config import EngineConfig
from parablock.engine.engine import Engine
from parablock.engine.request import Request
from parablock.settings import Model


def read_plain(lines: Iterable[Line]) -> Iterator[Prompt | Ended]:
    """The prompts; a line without one has ended."""
    for entry in read_prompts(lines):
        yield _failure(entry.line, entry.id, entry.message) if isinstance(entry, Unusable) else entry


class PromptWorker:
    """Answers prompts with an engine of its own.

    Raises:
        ValueError: settings the model cannot serve.
    """

    def __init__(self, model: Model, tokenizer: Any, config: DecodeConfig, engine: EngineConfig) -> None:
        resolve(model, [[0]], config if config.max_new_tokens else replace(config, max_new_tokens=1))
        self.tokenizer = tokenizer
        self.config = config
        self.engine = Engine(model, engine)
        self.engine.start()

    def close(self) -> None:
        """Stop the engine."""
        self.engine.close()

    async def answer(self, task: Prompt) -> Ended:
        """The answer to a prompt, or why it has none.

        Raises:
            StoppedError: the engine has stopped.
        """
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def listener() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(changed.set)

        try:
            request = Request(encode(self.tokenizer, task.messages), self.config, sample=task.line - 1)
            handle = self.engine.submit(request, listener)
        except (ValueError, TypeError, LookupError, TemplateError) as error:  # roles that do not alternate, say
            self._require_running()
            return _failure(task.line, task.id, str(error))
        while not handle.done:
            await changed.wait()
            changed.clear()
        if handle.status == "failed":
            self._require_running()
            return _failure(task.line, task.id, f"decoding failed: {handle.error}")
        text = self.tokenizer.decode(handle.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        record = {
            "id": task.id, "line": task.line,
            "messages": [*task.messages, {"role": "assistant", "content": text}],
            "finish_reason": handle.finish_reason, "prompt_tokens": len(request.prompt),
            "completion_tokens": len(handle.tokens),
        }  # fmt: skip
        return Ended(task.line, record, len(handle.tokens), handle.forwards)

    def _require_running(self) -> None:
        if self.engine.closed:
            raise StoppedError(f"the engine has stopped ({self.engine.error})")


def encode(tokenizer: Any, messages: list[Message]) -> list[int]:
    """The ids of a conversation; without a chat template, of a single message as it is."""
    if tokenizer.chat_template is None and len(messages) == 1:
        return list(tokenizer(messages[0]["content"])["input_ids"])
    return encode_prompt(tokenizer, messages)


def _failure(line: int, id: Id | None, message: str) -> Ended:
    return Ended(line, {"id": id, "line": line, "error": {"message": message}})
