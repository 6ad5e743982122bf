"""What a caller hands to the engine, and what it gets back."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from parablock.decoding.config import DecodeConfig
from parablock.decoding.decoder import Window
from parablock.decoding.grammar import CompiledGrammar
from parablock.decoding.logprobs import TokenLogprob
from parablock.decoding.rows import DRAFTERS

log = logging.getLogger(__name__)


class QueueFullError(RuntimeError):
    """So many requests run or wait that the engine takes no more (`EngineConfig.max_queue`)."""


Status = Literal["waiting", "running", "finished", "cancelled", "failed"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """One prompt (token ids) and how it is decoded.

    `stream`: make an `Update` after every step. `sample` tells answers to the same prompt and seed apart: it is the row
    that `pb.generate` would give this prompt in a batch. `grammar`: what the answer may say (`pb.Grammars`).

    `logprobs`: tell every token's log-probability, and those of so many most probable tokens there [0, 20], as the
    model itself gives them (see `decoding/logprobs.py`). `prompt_logprobs`: the same of the prompt's tokens, which are
    then all run, and in block diffusion take a forward each.
    """

    prompt: Sequence[int]
    config: DecodeConfig = field(default_factory=DecodeConfig)
    stream: bool = False
    sample: int = 0
    grammar: CompiledGrammar | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False


@dataclass(frozen=True)
class Update(Window):
    """One step of one request.

    `tokens`: the response tokens that have newly settled (no mask stands before them); `logprobs`: theirs, if asked
    for. The window is the block being
    decoded: `start` (absolute position; see `pb.stream`'s `Step`), `ids [D]`, `masked [D]` (still unknown), `revealed
    [D]` (by this step) and `confidence [D]` (nan where nothing was revealed); `drafts [K]`, `refused [K]` (-1: none).
    `forwards`: decode forwards so far; `drafted`, `accepted`: tokens so far, by drafter; `done`: the last update.
    """

    tokens: list[int]
    logprobs: list[TokenLogprob]
    forwards: int
    drafted: dict[str, int]
    accepted: dict[str, int]
    done: bool


class Handle:
    """A submitted request: its state, its tokens, and how to wait for more of them."""

    def __init__(
        self, engine: Any, request: Request, config: DecodeConfig, listener: Callable[[], None] | None = None
    ) -> None:
        self.request = request
        self.config = config  # nothing left open: what the checkpoint decides is filled in
        self.status: Status = "waiting"
        self.tokens: list[int] = []  # settled so far when streaming, else all at the end
        self.logprobs: list[TokenLogprob] = []  # of `tokens`, if asked for
        # of the prompt's tokens, if asked for, whole before the first token: nothing predicts the first one
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self.forwards = 0  # decode forwards it took part in
        # tokens that were drafted, by where they came from, and how many of these became tokens of the answer
        self.drafted, self.accepted = dict.fromkeys(DRAFTERS, 0), dict.fromkeys(DRAFTERS, 0)
        self.cached_tokens = 0  # of the prompt: not run again
        self.submitted = time.perf_counter()
        self.admitted: float | None = None  # seconds from submission until it had a row
        self.first_token: float | None = None  # seconds from submission until a first token had settled
        self.seconds: float | None = None  # from submission to the end
        self._engine = engine
        self._listener = listener
        self._updates: deque[Update] = deque()
        self._cancelled = False
        self._told: dict[int, TokenLogprob] = {}  # by position of prompt and answer: what has become known so far
        self.paused: Any = None  # what it needs to go on, when it gave its row and pages to others

    @property
    def done(self) -> bool:
        """Nothing more will come."""
        return self.status not in ("waiting", "running")

    def cancel(self) -> None:
        """Give up: the row and its memory are free within one step. What had settled stays in `tokens`."""
        self._engine.cancel(self)

    def result(self, timeout: float | None = None) -> list[int]:
        """Wait for the end and return all tokens.

        Raises:
            RuntimeError: the step that decoded it failed (the error is the cause), or the engine was closed.
            TimeoutError: `timeout` seconds are over; the request goes on.
        """
        self._engine.wait(self, timeout=timeout)
        self._raise_failure()
        return self.tokens

    def updates(self, timeout: float | None = None) -> Iterator[Update]:
        """The steps as they happen (`Request(stream=True)`); the last one is `done`. Errors as of `result`."""
        if not self.request.stream:
            raise ValueError("stream=False: this request keeps no updates; submit Request(..., stream=True)")
        while True:
            while self._updates:
                yield self._updates.popleft()
            if self.done and not self._updates:
                self._raise_failure()
                return
            self._engine.wait(self, timeout=timeout, for_update=True)

    def take_updates(self) -> list[Update]:
        """The steps since the last call, without waiting: for callers whom a listener tells when there are any."""
        taken: list[Update] = []
        while self._updates:
            taken.append(self._updates.popleft())
        return taken

    def _logprobs(self, begin: int, tokens: int) -> list[TokenLogprob]:
        """Of `tokens` tokens of the answer, from its token `begin` on; the prompt's are told with the first ones."""
        if self.request.logprobs is None:
            return []
        length = len(self.request.prompt)
        whole = length == 1 or length - 1 in self._told
        if self.request.prompt_logprobs and not self.prompt_logprobs and whole:
            self.prompt_logprobs = [None, *(self._told[position] for position in range(1, length))]
        return [self._told[length + number] for number in range(begin, begin + tokens)]

    def _notify(self) -> None:
        """Tell the listener; its failure is its own."""
        if self._listener is not None:
            try:
                self._listener()
            except Exception:
                log.exception("a request's listener failed")

    def _raise_failure(self) -> None:
        if self.status == "failed":
            raise RuntimeError(f"the request failed: {self.error}") from self.error
