"""The answers to one request, from the engine's threads to the event loop, which never waits for them blocking."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from parablock.decoding.config import DecodeConfig
from parablock.decoding.grammar import CompiledGrammar
from parablock.decoding.rows import DRAFTERS
from parablock.engine.request import Handle, QueueFullError, Request, Update
from parablock.server.errors import ApiError, from_value_error
from parablock.server.logprobs import Telling, Told, ToldToken
from parablock.server.served import ServedModel
from parablock.server.text import AnswerText
from parablock.server.tool_reader import Event, Reader, Said
from parablock.server.tools import ToolUse


@dataclass
class Choice:
    """One answer being decoded."""

    index: int
    handle: Handle
    text: AnswerText
    reader: Reader | None = None  # of tool calls
    telling: Telling | None = None  # its tokens, where their log-probabilities are told
    echo: str | None = None  # the prompt's text, until it is told
    echoed: int = 0  # characters of it
    shown: int = 0  # characters of the answer so far
    tokens: int = 0  # settled so far
    forwards: int = 0
    drafted: Mapping[str, int] = field(default_factory=dict)  # by drafter, so far
    accepted: Mapping[str, int] = field(default_factory=dict)
    finish_reason: str | None = None

    def read(self, text: str) -> list[Event]:
        """Its next text as text and calls."""
        if self.reader is None:
            return [Said(text)] if text else []
        events = self.reader.push(text, last=self.finish_reason is not None)
        if self.reader.full and self.finish_reason is None:
            self.finish_reason = "stop"
            self.handle.cancel()
        if self.reader.calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        return events


@dataclass
class Piece:
    """What is new of one answer: what text that may be shown says; the tokens whose text begins in it, where they are
    told; steps; and the reason if it ended.
    """

    choice: Choice
    said: list[Event]
    tokens: list[ToldToken]
    updates: list[Update]


class Answers:
    """All answers to one request. `close` frees what they hold, at whatever point.

    Args:
        served: the model.
        prompts: one entry per answer, in the order of the choices.
        config: how all of them are decoded.
        stops: strings before which an answer ends.
        told: what is told beside them.
        grammar: what every answer is held to.
        stream: pieces are wanted as they come.
        deadline: seconds until the answers must be whole.
        tools: what the answers may call.

    Raises:
        ApiError: settings the model cannot serve, no room for all answers, or an engine that has ended.
    """

    def __init__(
        self,
        served: ServedModel,
        prompts: Sequence[list[int]],
        config: DecodeConfig,
        stops: Sequence[str],
        told: Told,
        grammar: CompiledGrammar | None = None,
        *,
        stream: bool,
        deadline: float,
        tools: ToolUse | None = None,
    ) -> None:
        self.served = served
        self.prompts = prompts
        self.told = told
        self.started = time.perf_counter()
        self.seconds: float | None = None
        self.choices: list[Choice] = []
        self._deadline = deadline
        self._changed = asyncio.Event()
        loop, changed = asyncio.get_running_loop(), self._changed

        def listener() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(changed.set)

        try:
            for index, prompt in enumerate(prompts):
                watched = stream or bool(stops) or (tools is not None and tools.one)
                request = Request(
                    prompt, config, stream=watched, sample=index, grammar=grammar,
                    logprobs=told.logprobs, prompt_logprobs=told.logprobs is not None and told.echo is not None,
                )  # fmt: skip
                handle = served.engine.submit(request, listener)
                text = AnswerText(served.tokenizer, stops, served.tool_marks if tools else {})
                reader = tools.reader(served.tool_format) if tools else None
                telling = None if told.logprobs is None else Telling(served.tokenizer)
                self.choices.append(choice := Choice(index, handle, text, reader, telling))
                if told.echo is not None:
                    choice.echo = served.text_of(told.echo[index])
                    choice.echoed = len(choice.echo)
        except QueueFullError:
            self.close()
            seconds = served.retry_after(len(prompts))
            message = f"as many answers run and wait as the server takes; try again in {seconds} s"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": str(seconds)}) from None
        except ValueError as error:
            self.close()
            raise served.refusal() or from_value_error(error) from None

    async def pieces(self) -> AsyncIterator[Piece]:
        """Everything new, until all answers are whole.

        Raises:
            ApiError: decoding failed, or the deadline is over.
        """
        while unfinished := [c for c in self.choices if c.finish_reason is None]:
            self._changed.clear()
            for choice in unfinished:
                piece = self._advance(choice)
                if piece.said or piece.tokens or piece.updates or choice.finish_reason is not None:
                    yield piece
            if all(choice.finish_reason is not None for choice in self.choices):
                break
            try:
                async with asyncio.timeout(self.seconds_left):
                    await self._changed.wait()
            except TimeoutError:
                text = f"the request took longer than the server's deadline of {self._deadline:g} seconds"
                raise ApiError(504, text, code="deadline_exceeded") from None
        self.close()

    def _advance(self, choice: Choice) -> Piece:
        handle = choice.handle
        done = handle.done  # read first: what was told before the end is then in the updates
        if handle.status == "failed":
            if self.served.stopped:
                raise ApiError(500, f"decoding failed ({self.served.stopped}); the server ends", code="decoding_failed")
            raise self.served.refusal() or ApiError(500, "decoding failed; try again", code="decoding_failed")
        updates = handle.take_updates()
        new = [token for update in updates for token in update.tokens]
        told = [logprob for update in updates for logprob in update.logprobs]
        if done and not handle.request.stream:
            new, told = handle.tokens, handle.logprobs
        choice.tokens += len(new) if self.told.answers else 0
        states: list[Update | Handle] = [*updates, *([handle] if done else [])]
        for state in states:
            choice.forwards, choice.drafted, choice.accepted = state.forwards, state.drafted, state.accepted
        text = choice.text.push(new, last=done)
        if choice.text.stopped:
            choice.finish_reason = "stop"
            handle.cancel()
        elif done:
            choice.finish_reason = handle.finish_reason
        tokens: list[ToldToken] = []
        if choice.telling is not None:
            choice.telling.push(new, told)
            choice.shown += len(text)
            whole = choice.finish_reason is not None and not choice.text.stopped
            tokens = choice.telling.pop(None if whole else choice.shown)
        if self.told.echo is not None and (new or done):
            text, tokens = self._echoed(choice, text, tokens)
        return Piece(choice, choice.read(text), tokens, updates)

    def _echoed(self, choice: Choice, text: str, tokens: list[ToldToken]) -> tuple[str, list[ToldToken]]:
        """With the prompt before the answer's first piece."""
        if not self.told.answers:
            text, tokens = "", []
        tokens = [replace(token, offset=token.offset + choice.echoed) for token in tokens]
        if choice.echo is not None and choice.telling is not None:
            telling = Telling(self.served.tokenizer)
            telling.push(self.prompts[choice.index], choice.handle.prompt_logprobs)
            tokens = telling.pop(None) + tokens
        text, choice.echo = (choice.echo or "") + text, None
        return text, tokens

    def close(self) -> None:
        """Cancel what has not ended."""
        if self.seconds is None:
            self.seconds = time.perf_counter() - self.started
            for choice in self.choices:
                choice.handle.cancel()

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return max(0.0, self.started + self._deadline - time.perf_counter())

    @property
    def tokens(self) -> int:
        """Settled so far, in all answers together."""
        return sum(choice.tokens for choice in self.choices)

    @property
    def forwards(self) -> int:
        """Decode forwards so far, added over the answers."""
        return sum(choice.forwards for choice in self.choices)

    @property
    def first_token(self) -> float | None:
        """Seconds until the first token of any answer."""
        times = [c.handle.first_token for c in self.choices if c.handle.first_token is not None]
        return min(times, default=None)

    def figures(self) -> dict[str, Any]:
        """The extension field `parablock`."""
        seconds = time.perf_counter() - self.started if self.seconds is None else self.seconds
        first = self.first_token
        return {
            "forwards": self.forwards,
            "tokens_per_forward": round(self.tokens / max(1, self.forwards), 3),
            "seconds": round(seconds, 4),
            "ttft": None if first is None else round(first, 4),
            "tokens_per_second": round(self.tokens / max(seconds, 1e-9), 1),
            "cached_tokens": self.cached_tokens,
            **(self.drafts() if self.speculative else {}),
        }

    @property
    def speculative(self) -> bool:
        """Whether drafts are verified; the mode is the same for all answers."""
        return self.choices[0].handle.config.mode == "speculative"

    def drafts(self) -> dict[str, Any]:
        """Tokens that were drafted, and how many of these became tokens of the answers, in all and by drafter."""
        by_drafter = {
            name: {drafter: sum(getattr(c, name).get(drafter, 0) for c in self.choices) for drafter in DRAFTERS}
            for name in ("drafted", "accepted")
        }
        totals = {name: sum(counts.values()) for name, counts in by_drafter.items()}
        return {**totals, **{f"{name}_by": counts for name, counts in by_drafter.items()}}

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not run again."""
        return sum(choice.handle.cached_tokens for choice in self.choices)

    def usage(self, prompt_tokens: int) -> dict[str, Any]:
        """OpenAI's usage; `prompt_tokens` counts a prompt once, however many answers it gets."""
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": prompt_tokens + self.tokens,
            "prompt_tokens_details": {"cached_tokens": min(self.cached_tokens, prompt_tokens)},
        }
