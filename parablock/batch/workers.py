"""Which kind of lines a job has, and the workers for them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from parablock.batch.plain import PromptWorker, read_plain
from parablock.batch.running import Ended, Task, Worker
from parablock.checkpoints.load import load
from parablock.data.lines import Line, read_lines
from parablock.decoding.config import DecodeConfig
from parablock.engine.config import EngineConfig
from parablock.settings import require_library

Kind = Literal["prompts", "requests"]


@dataclass(frozen=True)
class Setup:
    """All that a worker is made from, wherever it runs."""

    kind: Kind
    model: str
    dtype: str | None
    decoding: DecodeConfig
    engine: EngineConfig

    def worker(self) -> Worker:
        """Load the model and start an engine.

        Raises:
            ValueError: no such model, or settings it cannot serve.
        """
        model, tokenizer = load(self.model, dtype=self.dtype)
        if self.kind == "prompts":
            return PromptWorker(model, tokenizer, self.decoding, self.engine)
        from parablock.batch.calls import CallWorker

        return CallWorker(self.model, model, tokenizer, self.engine)


def kind_of(files: Sequence[Path]) -> Kind:
    """What the first line that holds an object is: a request in OpenAI's batch format has a `url` and a `body`."""
    rows = (line.row for line in read_lines(files) if line.row is not None)
    return "requests" if {"url", "body"} <= next(rows, {}).keys() else "prompts"


def read_tasks(kind: Kind, lines: Iterable[Line]) -> Iterator[Task | Ended]:
    """What the lines ask for; one that cannot be used has ended."""
    if kind == "prompts":
        return read_plain(lines)
    for library in ("fastapi", "prometheus_client"):
        require_library(library, "serve")
    from parablock.batch.calls import read_calls

    return read_calls(lines)
