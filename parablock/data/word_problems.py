"""The bundled task: grade-school word problems with worked solutions.

A problem is a short story put together from an opening, one or two events and a question. Its solution is one line of
arithmetic per step and ends, like GSM8K's, in `#### <number>`. The solution's wording is a function of the question,
so a parallel decoder is never asked to guess a phrasing; numbers stay below 100.

Train and test never share a problem: a problem belongs to the test split only if the checksum of its pieces and numbers
says so, and the names of the two splits are disjoint. Every `(split, seed, index)` is one fixed problem, so any seed
gives a fresh test set.
"""

import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from parablock.data.chat import Sample, encode_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "test"]
Numbers = dict[str, int]

NAME_STARTS = ("Ma", "Li", "To", "Ka", "Ro", "Ne", "Sa", "Da", "Jo", "Be", "Vi", "Lu", "Pa", "Te", "Mi", "No")
NAME_ENDS = ("ra", "na", "lo", "mi", "ta", "ki", "ri", "la", "do", "sa", "ya", "no")
ITEMS = (
    "pencils", "stickers", "marbles", "apples", "shells", "cards", "beads", "coins", "stamps", "books", "buttons",
    "cookies", "flowers", "stones", "candles", "lemons",
)  # fmt: skip
CONTAINERS = ("boxes", "bags", "jars", "baskets", "drawers", "trays")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
MAX_STEPS = 4  # lines of arithmetic in a solution
TEST_SHARE = 8  # one problem (and about one name) in eight is kept for the test split


@dataclass(frozen=True)
class Problem:
    """A question, its worked solution (ends in `#### <result>`) and the result."""

    question: str
    answer: str
    result: int

    def messages(self) -> list[dict[str, str]]:
        """The problem as a chat: the user asks, the assistant solves."""
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


@dataclass(frozen=True)
class Piece:
    """A part of a story: its sentence, its lines of the solution and how its numbers are drawn.

    `draw(rng, r)` gets the running result `r` and returns the numbers of the templates, the new running result among
    them under `"r"`, or None when no such numbers exist. The old running result is `{r0}` in the templates.
    """

    sentence: str
    lines: tuple[str, ...]
    draw: Callable[[random.Random, int], Numbers | None]


def _pick(rng: random.Random, low: int, high: int) -> int | None:
    return rng.randint(low, high) if low <= high else None


def _times(rng: random.Random, r: int) -> Numbers | None:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    return {"a": a, "b": b, "r": a * b} if a * b >= 10 else None


def _plus(rng: random.Random, r: int) -> Numbers | None:
    a, b = rng.randint(5, 49), rng.randint(3, 40)
    return {"a": a, "b": b, "r": a + b} if a + b >= 10 else None


def _minus(rng: random.Random, r: int) -> Numbers | None:
    a = rng.randint(20, 99)
    b = rng.randint(3, min(40, a - 10))
    return {"a": a, "b": b, "r": a - b}


def _with_twice(rng: random.Random, r: int) -> Numbers | None:
    a = rng.randint(5, 30)
    return {"a": a, "p": 2 * a, "r": 3 * a}


def _gain(rng: random.Random, r: int) -> Numbers | None:
    c = _pick(rng, 3, min(40, 99 - r))
    return None if c is None else {"c": c, "r": r + c}


def _lose(rng: random.Random, r: int) -> Numbers | None:
    c = _pick(rng, 3, min(40, r - 10))
    return None if c is None else {"c": c, "r": r - c}


def _gain_groups(rng: random.Random, r: int) -> Numbers | None:
    c, d = rng.randint(2, 9), rng.randint(2, 9)
    return {"c": c, "d": d, "p": c * d, "r": r + c * d} if 10 <= c * d <= 99 - r else None


def _lose_groups(rng: random.Random, r: int) -> Numbers | None:
    c, d = rng.randint(2, 9), rng.randint(2, 9)
    return {"c": c, "d": d, "p": c * d, "r": r - c * d} if 10 <= c * d <= r - 10 else None


def _double(rng: random.Random, r: int) -> Numbers | None:
    return {"r": 2 * r} if r <= 49 else None


def _half(rng: random.Random, r: int) -> Numbers | None:
    return {"r": r // 2} if r % 2 == 0 and r >= 20 else None


def _share(rng: random.Random, r: int) -> Numbers | None:
    options = [k for k in range(2, 10) if r % k == 0 and 2 <= r // k <= 9]
    return {"k": (k := rng.choice(options)), "r": r // k} if options else None


def _goal(rng: random.Random, r: int) -> Numbers | None:
    g = _pick(rng, r + 10, 99)
    return None if g is None else {"g": g, "r": g - r}


def _none(rng: random.Random, r: int) -> Numbers | None:
    return {"r": r}


OPENINGS = (
    Piece("{N} has {a} {boxes} with {b} {items} in each.", ("{a}*{b}={r} {items} in the {boxes}.",), _times),
    Piece("{N} buys {a} {items} every day for {b} days.", ("{a}*{b}={r} {items} bought.",), _times),
    Piece("{a} friends give {N} {b} {items} each.", ("{a}*{b}={r} {items} from the friends.",), _times),
    Piece("{N} has {a} red {items} and {b} blue {items}.", ("{a}+{b}={r} {items} in both colors.",), _plus),
    Piece("{N} finds {a} {items} on {day} and {b} more on {day2}.", ("{a}+{b}={r} {items} found.",), _plus),
    Piece("{M} has {a} {items} and {N} has {b} more than {M}.", ("{a}+{b}={r} {items} for {N}.",), _plus),
    Piece("{M} has {a} {items} and {N} has {b} fewer than {M}.", ("{a}-{b}={r} {items} for {N}.",), _minus),
    Piece("{N} had {a} {items} but lost {b} of them.", ("{a}-{b}={r} {items} not lost.",), _minus),
    Piece(
        "{M} has {a} {items}, {N} has twice as many, and {M} gives them all to {N}.",
        ("2*{a}={p} {items} for {N}.", "{a}+{p}={r} {items} together."),
        _with_twice,
    ),
)
EVENTS = (
    Piece("{N} buys {c} more.", ("{r0}+{c}={r} {items} after buying more.",), _gain),
    Piece("On {day} {N} gets {c} {items} from {M}.", ("{r0}+{c}={r} {items} with the gift.",), _gain),
    Piece("Then {N} finds another {c} {items}.", ("{r0}+{c}={r} {items} after finding more.",), _gain),
    Piece("{N} gives {c} of them to {M}.", ("{r0}-{c}={r} {items} after giving some away.",), _lose),
    Piece("Then {N} sells {c} {items}.", ("{r0}-{c}={r} {items} after the sale.",), _lose),
    Piece("On {day} {c} {items} break.", ("{r0}-{c}={r} {items} still whole.",), _lose),
    Piece(
        "Then {N} buys {c} packs of {d} {items}.",
        ("{c}*{d}={p} {items} in the packs.", "{r0}+{p}={r} {items} with the packs."),
        _gain_groups,
    ),
    Piece(
        "{N} gives {c} friends {d} {items} each.",
        ("{c}*{d}={p} {items} for the friends.", "{r0}-{p}={r} {items} left after that."),
        _lose_groups,
    ),
    Piece("Then {M} doubles what {N} has.", ("2*{r0}={r} {items} after doubling.",), _double),
    Piece("{N} gives half of them to {M}.", ("{r0}/2={r} {items} after giving half.",), _half),
)
QUESTIONS = (
    Piece("How many {items} does {N} have now?", (), _none),
    Piece("How many {items} are there in the end?", (), _none),
    Piece(
        "{N} shares them equally among {k} friends. How many {items} does each friend get?",
        ("{r0}/{k}={r} {items} for each friend.",),
        _share,
    ),
    Piece(
        "{N} wants to have {g} {items}. How many more does {N} need?",
        ("{g}-{r0}={r} {items} still needed.",),
        _goal,
    ),
)


def _is_test_name(start: int, end: int) -> bool:
    return (3 * start + 5 * end) % TEST_SHARE == 0


NAMES: dict[Split, tuple[str, ...]] = {
    split: tuple(
        first + last
        for i, first in enumerate(NAME_STARTS)
        for j, last in enumerate(NAME_ENDS)
        if _is_test_name(i, j) == (split == "test")
    )
    for split in ("train", "test")
}


def word_problem(split: Split, seed: int, index: int) -> Problem:
    """The problem number `index` of the endless list that `seed` gives for `split`."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    rng = random.Random(f"{split}/{seed}/{index}")
    while True:
        problem = _draw(rng, split)
        if problem is not None:
            return problem


class EncodedProblems(Sequence[Sample]):
    """Training problems `start .. start + count` of a seed as samples, made and tokenized when asked for."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, seed: int, start: int = 0, count: int) -> None:
        self.tokenizer, self.seed, self.start, self.length = tokenizer, seed, start, count

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not 0 <= index < self.length:
            raise IndexError(index)
        return encode_chat(self.tokenizer, word_problem("train", self.seed, self.start + index).messages())


def _draw(rng: random.Random, split: Split) -> Problem | None:
    """One attempt: None when the drawn pieces do not fit together or fall into the other split."""
    pieces = [rng.choice(OPENINGS), *rng.sample(EVENTS, rng.choice((1, 1, 2))), rng.choice(QUESTIONS)]
    name, other = rng.sample(NAMES[split], 2)
    words = {"N": name, "M": other, "items": rng.choice(ITEMS), "boxes": rng.choice(CONTAINERS)}
    sentences: list[str] = []
    lines: list[str] = []
    key: list[str] = []
    result = 0
    for piece in pieces:
        numbers = piece.draw(rng, result)
        if numbers is None:
            return None
        day, day2 = rng.sample(DAYS, 2)
        fields = {**words, **numbers, "r0": result, "day": day, "day2": day2}
        sentences.append(piece.sentence.format(**fields))
        lines += [line.format(**fields) for line in piece.lines]
        key.append(f"{piece.sentence}{sorted(numbers.items())}")
        result = numbers["r"]
    if len(lines) > MAX_STEPS:
        return None
    if (zlib.crc32("".join(key).encode()) % TEST_SHARE == 0) != (split == "test"):
        return None
    return Problem(" ".join(sentences), "\n".join([*lines, f"#### {result}"]), result)


def read_answer(text: str) -> int | None:
    """The number after the last `####` of a solution, or None when there is none."""
    found = re.findall(r"####\s*(-?\d+)", text)
    return int(found[-1]) if found else None
