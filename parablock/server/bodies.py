"""Answers as OpenAI's JSON: whole, or as the events of a stream."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from parablock.server.answers import Answers, Piece
from parablock.server.errors import ApiError
from parablock.server.logprobs import ToldToken
from parablock.server.spoken import Spoken
from parablock.server.text import denoising

DONE = "data: [DONE]\n\n"


class Writer:
    """Writes the answers to one request. `chat`: messages, else plain text."""

    def __init__(
        self, answers: Answers, prompt_tokens: int, *, chat: bool, usage: bool = False, denoising: bool = False
    ) -> None:
        self.answers = answers
        self.chat = chat
        self.id = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self.failed = False  # a stream ended with an error
        self._prompt_tokens = prompt_tokens
        self._usage = usage
        self._denoising = denoising
        self._created = int(time.time())
        self._spoken = [Spoken(answers.served.tool_format) for _ in answers.choices]

    async def whole(self) -> dict[str, Any]:
        """The answer in one object."""
        tokens: list[list[ToldToken]] = [[] for _ in self.answers.choices]
        async for piece in self.answers.pieces():
            tokens[piece.choice.index] += piece.tokens
            for event in piece.said:
                self._spoken[piece.choice.index].add(event)
        choices = []
        for choice, spoken, told in zip(self.answers.choices, self._spoken, tokens, strict=True):
            content: dict[str, Any] = {"message": spoken.message()} if self.chat else {"text": spoken.text}
            content["logprobs"] = None if self.answers.told.logprobs is None else self._logprobs(told)
            choices.append({"index": choice.index, **content, "finish_reason": choice.finish_reason})
        usage = self.answers.usage(self._prompt_tokens)
        return {**self._object(choices), "usage": usage, "parablock": self.answers.figures()}

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events; an error ends it with an event of its own."""
        try:
            begun = False
            async for piece in self.answers.pieces():
                for event in [*([] if begun else self._roles()), *self._piece(piece)]:
                    yield event
                begun = True
            if self._usage:
                figures = {"usage": self.answers.usage(self._prompt_tokens), "parablock": self.answers.figures()}
                yield self._event([], **figures)
        except ApiError as error:
            self.failed = True
            yield f"data: {json.dumps(error.body)}\n\n"
        finally:
            self.answers.close()
        yield DONE

    def _roles(self) -> list[str]:
        """What a chat begins with, told when there is more: until then the request can still go to another replica."""
        choices = self.answers.choices if self.chat else []
        return [self._event([self._part(choice.index, {"role": "assistant", "content": ""})]) for choice in choices]

    def _piece(self, piece: Piece) -> list[str]:
        choice = piece.choice
        events = []
        if self._denoising:
            prompt = len(self.answers.prompts[choice.index])
            for update in piece.updates:
                end = prompt + (choice.tokens if update.done else choice.handle.config.max_new_tokens or 0)
                step = denoising(
                    self.answers.served.tokenizer, update, prompt, end, speculative=self.answers.speculative
                )
                events.append(self._event([self._part(choice.index, {})], denoising=step))
        deltas = [delta for event in piece.said if (delta := self._spoken[choice.index].add(event))]
        if piece.tokens and not deltas:
            deltas = [{"content": ""}]
        parts = [self._part(choice.index, delta) for delta in deltas]
        if piece.tokens:
            parts[0]["logprobs"] = self._logprobs(piece.tokens)
        events += [self._event([part]) for part in parts]
        if choice.finish_reason is not None:
            last = all(c.finish_reason is not None for c in self.answers.choices)
            figures = {"parablock": self.answers.figures()} if last else {}
            events.append(self._event([self._part(choice.index, {}, choice.finish_reason)], **figures))
        return events

    def _part(self, index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        content: dict[str, Any] = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}

    def _logprobs(self, told: list[ToldToken]) -> dict[str, Any]:
        tokens = self.answers.served.tokens
        return tokens.chat(told) if self.chat else tokens.completion(told)

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        usage = {"usage": None} if self._usage else {}
        return f"data: {json.dumps({**self._object(choices, chunk=True), **usage, **more})}\n\n"

    def _object(self, choices: list[dict[str, Any]], *, chunk: bool = False) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self.answers.served.name,
            "choices": choices,
        }
