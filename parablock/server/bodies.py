"""Answers as OpenAI's JSON: whole, or as the events of a stream."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from parablock.server.answers import Answers, Piece
from parablock.server.errors import ApiError
from parablock.server.logprobs import Said
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

    async def whole(self) -> dict[str, Any]:
        """The answer in one object."""
        texts = [""] * len(self.answers.choices)
        said: list[list[Said]] = [[] for _ in texts]
        async for piece in self.answers.pieces():
            texts[piece.choice.index] += piece.text
            said[piece.choice.index] += piece.said
        choices = []
        for choice, text, tokens in zip(self.answers.choices, texts, said, strict=True):
            content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            logprobs = None if self.answers.told.logprobs is None else self._logprobs(tokens)
            choices.append(
                {"index": choice.index, **content, "logprobs": logprobs, "finish_reason": choice.finish_reason}
            )
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
        if piece.text or piece.said:
            part = self._part(choice.index, {"content": piece.text})
            part["logprobs"] = self._logprobs(piece.said) if piece.said else None
            events.append(self._event([part]))
        if choice.finish_reason is not None:
            last = all(c.finish_reason is not None for c in self.answers.choices)
            figures = {"parablock": self.answers.figures()} if last else {}
            events.append(self._event([self._part(choice.index, {}, choice.finish_reason)], **figures))
        return events

    def _part(self, index: int, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        content: dict[str, Any] = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}

    def _logprobs(self, said: list[Said]) -> dict[str, Any]:
        tokens = self.answers.served.tokens
        return tokens.chat(said) if self.chat else tokens.completion(said)

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
