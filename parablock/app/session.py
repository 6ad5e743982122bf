"""One visitor's conversation, and what of it the browser keeps."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

KEPT_TURNS = 100
KEPT_CHARACTERS = 100_000
LONGEST_STORED = 10 * KEPT_CHARACTERS  # in JSON, where a character may take six

Turn = dict[str, str]  # question, answer


@dataclass
class Session:
    """A conversation. `run` tells the browser one question from the next: of two the later is larger."""

    turns: list[Turn] = field(default_factory=list)
    run: int = 0
    stop: bool = False
    busy: bool = False

    def begin(self) -> None:
        """Another question, or another beginning."""
        self.run, self.stop = max(self.run + 1, time.time_ns() // 1_000_000), False


def messages(turns: Sequence[Turn], system: str, question: str) -> list[dict[str, str]]:
    """What a model is asked."""
    first = [("system", system.strip())] if system.strip() else []
    earlier = [pair for turn in turns for pair in (("user", turn["question"]), ("assistant", turn["answer"]))]
    return [{"role": role, "content": content} for role, content in [*first, *earlier, ("user", question)]]


def latest(turns: Sequence[Turn]) -> list[Turn]:
    """The last turns, as many as are kept; always the very last."""
    kept: list[Turn] = []
    characters = 0
    for turn in reversed(turns[-KEPT_TURNS:]):
        characters += len(turn["question"]) + len(turn["answer"])
        if kept and characters > KEPT_CHARACTERS:
            break
        kept.append(turn)
    return kept[::-1]


def stored(text: str | None) -> list[Turn]:
    """The turns that a browser has stored; none if that is not of this page's making."""
    if text is None or len(text) > LONGEST_STORED:
        return []
    try:
        turns = [(turn["question"], turn["answer"]) for turn in json.loads(text)]
        for part in (part for turn in turns for part in turn):
            part.encode()  # a string, and one that UTF-8 can write
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return latest([{"question": question, "answer": answer} for question, answer in turns])
