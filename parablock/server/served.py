"""The models of a server: each with its tokenizer and its own engine."""

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from parablock.checkpoints.load import load
from parablock.decoding.config import Drafter, Mode
from parablock.decoding.generate import own_stop_tokens
from parablock.decoding.grammar import Grammars
from parablock.diffusion.gate import gate_of
from parablock.diffusion.support import is_adapted
from parablock.engine.config import EngineConfig
from parablock.engine.engine import Engine
from parablock.server.conversation import template_of
from parablock.server.errors import ApiError, engine_stopped, shutting_down
from parablock.server.logprobs import Tokens
from parablock.server.tool_formats import format_of
from parablock.settings import Model

RECENT = 32  # answers whose time says how long the next ones take
LONGEST_RETRY = 60  # seconds


class ServedModel:
    """One model, its engine running in a thread of its own."""

    def __init__(self, name: str, model: Model, tokenizer: Any, config: EngineConfig) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.tool_format = format_of(template_of(tokenizer))
        marks = (self.tool_format.mark, self.tool_format.closer)
        special = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.tool_marks = {number: token for number, token in special.items() if token in marks}
        self.tokens = Tokens(tokenizer)
        self.stop_token_ids = own_stop_tokens(model)
        gate = gate_of(model)
        self.modes: tuple[Mode, ...] = ("autoregressive", "speculative")  # the first is the default
        if is_adapted(model.config):
            self.modes = ("diffusion", "autoregressive")
        elif gate is not None:
            self.modes = ("speculative", "autoregressive")
        self.drafters: tuple[Drafter, ...] = ("both", "masks", "lookup") if gate else ("lookup",)
        self.engine = Engine(model, config)
        self.engine.start()
        self.created = int(time.time())
        self._grammars: Grammars | None = None
        self._making = threading.Lock()
        self._recent: deque[float] = deque(maxlen=RECENT)  # seconds that the last answers were here

    def text_of(self, prompt: str | Sequence[int]) -> str:
        """A prompt, which may be given as ids, as text."""
        return prompt if isinstance(prompt, str) else str(self.tokenizer.decode(prompt, skip_special_tokens=True))

    @property
    def grammars(self) -> Grammars:
        """What compiles grammars for it; made when it is first needed, which takes a moment."""
        with self._making:
            if self._grammars is None:
                self._grammars = Grammars(self.tokenizer)
            return self._grammars

    @property
    def stopped(self) -> str | None:
        """Why its engine has stopped by itself, as far as clients may know: the kind of the error."""
        return None if self.engine.error is None else type(self.engine.error).__name__

    def refusal(self) -> ApiError | None:
        """Why it takes no requests any more, if it does not."""
        if self.stopped:
            return engine_stopped(self.stopped)
        return shutting_down() if self.engine.closed else None

    def ended(self, answers: int, seconds: float) -> None:
        """So many answers, whole or given up, have left after so many seconds."""
        self._recent.extend([seconds] * answers)

    @property
    def room(self) -> int:
        """Answers that may be here at once, running or waiting."""
        return self.engine.config.max_rows + (self.engine.config.max_queue or 0)

    def retry_after(self, places: int) -> int:
        """Whole seconds until so many places of a full engine are likely free.

        As many answers leave per second as are there, over the time that each of them is there (Little's law).
        """
        if not self._recent:
            return 1
        seconds = places * sum(self._recent) / len(self._recent) / self.room
        return min(max(1, math.ceil(seconds)), LONGEST_RETRY)

    def card(self) -> dict[str, Any]:
        """Its entry in the list of models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "parablock",
            "parablock": {
                "modes": list(self.modes),
                "drafters": list(self.drafters) if "speculative" in self.modes else [],
                "block_size": self.engine.block_size,
                "context": self.engine.max_context,
            },
        }


def load_models(names: Sequence[str], config: EngineConfig, dtype: str | None = None) -> list[ServedModel]:
    """Load checkpoints and start their engines.

    Raises:
        ValueError: a name given twice, or a checkpoint that cannot be loaded.
    """
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the model {name!r} is given twice; name every model once")
    return [ServedModel(name, *load(name, dtype=dtype), config) for name in names]
