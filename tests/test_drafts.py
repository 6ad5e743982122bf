"""What is guessed, and how much of it is drafted: the lookup against its definition, widths against what pays."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from cases import BASE, ROWS
from conftest import ar_model
from hypothesis import given
from hypothesis import strategies as st

import parablock as pb
from parablock.decoding.decoder import begin, next_work
from parablock.decoding.drafts import lookup
from parablock.decoding.modes import speculative
from parablock.decoding.pace import LIFETIME, MANY, SURE, SURER, WIDTHS_W1, Pace, choose_widths
from parablock.decoding.rows import Rows
from parablock.decoding.work import settle

SPECULATIVE = replace(BASE, mode="speculative", stop_token_ids=(), max_new_tokens=300)
MODEL = ar_model()


def rows_of(texts: list[list[int]], config: pb.DecodeConfig = SPECULATIVE) -> Rows:
    """Rows whose prompts and first answer tokens are known, ready to decode."""
    rows = Rows(len(texts) + 1, 320, 32)
    for row, text in enumerate(texts):
        begin(rows, row, text[:-1], config)
        rows.reveal(np.array([row]), np.array([len(text) - 1]), np.array(text[-1:]))
        rows.start_R[row] = len(text) - 1
    return rows


def agreement(text: list[int], end: int) -> int:
    """How many of the text's last tokens stand at `end`, too; 18 are compared."""
    last = len(text) - 1
    return next((n for n in range(18) if n > end or text[end - n] != text[last - n]), 18)


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=60), min_size=1, max_size=4),
    st.lists(st.integers(0, 2), max_size=8),
)
def test_a_guess_is_what_followed_the_longest_match(texts: list[list[int]], more: list[int]) -> None:
    rows, which = rows_of(texts), np.arange(len(texts))
    for token in [None, *more]:
        moved = np.zeros(len(texts), dtype=bool)
        if token is not None:  # every row goes on with it; one whose guess was right moves its place along
            guesses, found = lookup(rows, which, 1)
            moved = found & (guesses[:, 0] == token)
            rows.alike_R[which] = (rows.alike_R[which] + 1) * moved
            rows.start_R[which] += 1
            rows.reveal(which, rows.start_R[which], np.full(len(which), token))
            texts = [[*text, token] for text in texts]
        guesses, found = lookup(rows, which, 8)
        for row, text in enumerate(texts):
            longest, end = max((agreement(text, end), end) for end in range(len(text) - 1))
            assert found[row] == (longest >= 2)
            if found[row]:
                alike = int(rows.alike_R[row])
                assert agreement(text, alike) == longest
                assert moved[row] or alike == end  # the latest of the longest
                after = text[alike + 1 :]
                assert guesses[row].tolist() == [after[i % len(after)] for i in range(8)]


def test_a_place_that_moved_along_is_still_the_longest_match() -> None:
    text = [1, 2, 3, 4, 5, 9, 3, 4, 6, 9, 1, 2, 3]
    rows, which = rows_of([text]), np.arange(1)
    assert lookup(rows, which, 3)[0].tolist() == [[4, 5, 9]]
    rows.alike_R[0] += 1  # as after a right guess
    rows.start_R[0] += 1
    rows.reveal(which, rows.start_R[which], np.array([4]))
    assert lookup(rows, which, 3)[0].tolist() == [[5, 9, 3]]  # not 6, which the later but shorter match names


def test_many_places_and_long_texts() -> None:
    rows, which = rows_of([[1] * 200, [1, 2] * 100, list(range(200))]), np.arange(3)
    guesses, found = lookup(rows, which, 5)
    assert found.tolist() == [True, True, False]
    assert guesses[:2].tolist() == [[1] * 5, [1, 2, 1, 2, 1]]


# --- how much is drafted ---


def pace_of(seconds: Callable[[int], float], drafts: Callable[[int], float] | None = None, padded: int = 0) -> Pace:
    """As after many forwards of every size that took `seconds(tokens)`, those with drafts `drafts(tokens)`."""
    pace = Pace()
    pace.padded, pace.rows = padded, 1
    for pace.drafts, took in ((False, seconds), (True, drafts or seconds)):
        for size in range(12):
            for _ in range(20):
                pace.note(1 << size, took(1 << size))
    return pace


def widths(pace: Pace, chances: list[float], *, rows: int = 0, most: int = 7) -> list[int]:
    ones, most_k = np.ones(rows or len(chances), dtype=int), np.full(len(chances), most)
    value_kC = np.array(chances)[:, None] ** np.arange(1, 32) * (np.arange(31) < most)
    return choose_widths(pace, ones, value_kC, most_k).tolist()


def flat(tokens: int) -> float:
    return 1.0 + tokens / 1e6


def bent(tokens: int) -> float:
    return max(64.0, tokens)


def test_drafts_are_as_long_as_pays() -> None:
    assert widths(pace_of(flat), [0.9, 0.5, 0.2]) == [8, 8, 8]
    assert widths(pace_of(flat), [0.9], most=6) == [7]
    assert widths(pace_of(flat), [0.99], most=31) == [32]
    assert widths(pace_of(float), [0.9, 0.99]) == [1, 1]  # every token costs as much as the first
    assert widths(pace_of(lambda tokens: 32.0 + tokens), [0.3]) == [4]
    assert widths(pace_of(bent), [0.6] * 8) == [8] * 8
    assert widths(pace_of(bent), [0.6] * 64) == [1] * 64  # under load


CHANCES = st.lists(st.sampled_from([0.02, 0.1, 0.3, 0.6, 0.9, 0.99]), min_size=1, max_size=5)


@given(CHANCES, st.integers(0, 40), st.sampled_from([0, 30, 200]), st.booleans(), st.sampled_from([1.0, 30.0, 300.0]))
def test_no_other_choice_makes_more_tokens_per_second(
    chances: list[float], others: int, beside: int, padded: bool, fixed: float
) -> None:
    n = len(chances) + others
    pace = pace_of(lambda tokens: fixed + tokens + max(0, tokens - 64), padded=n if padded else 0)
    pace.beside = 0 if padded else beside

    def seconds(tokens: int, drafts: bool) -> float:
        return float(pace.seconds(np.array([tokens]), drafts)[0])

    def rate(width: int, drafting: tuple[int, ...]) -> float:
        more = n * (width - 1) if padded else len(drafting) * (width - 1)
        gain = sum(chances[k] ** i for k in drafting for i in range(1, width))
        # what runs beside is worth its time
        worth = n * seconds(n + pace.beside, drafts=False) / seconds(n, drafts=False)
        return (worth + gain) / seconds(n + pace.beside + more, drafts=bool(drafting))

    numbers = range(len(chances))
    groups = [group for count in numbers for group in itertools.combinations(numbers, count + 1)]
    best = max(rate(width, group) for width in WIDTHS_W1[:3, 0].tolist() for group in groups)
    chosen, sure = widths(pace, chances, rows=n), SURE if n < MANY else SURER
    drafting = tuple(k for k in numbers if chosen[k] > 1)
    assert len({chosen[k] for k in drafting}) <= 1
    if drafting:
        assert rate(chosen[drafting[0]], drafting) == pytest.approx(best)
        assert best > sure * rate(1, ())
    else:
        assert best <= sure * rate(1, ()) * (1 + 1e-9)


def test_forwards_with_drafts_are_measured_apart() -> None:
    pace = pace_of(flat, drafts=lambda tokens: 2.0)
    assert widths(pace, [0.4] * 4) == [1] * 4
    pace.drafts = False
    for _ in range(LIFETIME + 1):
        pace.note(4, flat(4))
    assert widths(pace, [0.4] * 4) != [1] * 4  # it was long ago: worth another try


def test_a_slow_forward_now_and_then_changes_nothing() -> None:
    pace = pace_of(flat)
    for _ in range(5):
        pace.note(8, 100.0)
        pace.note(64, 0.001)
    assert widths(pace, [0.5]) == [8]


def test_where_guesses_are_wrong_nothing_is_drafted_until_they_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    def five(rows: Rows, which: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        looked.append(len(drafted))
        return np.full((len(which), most), 5), np.ones(len(which), dtype=bool)

    monkeypatch.setattr(speculative, "lookup", five)
    rows, which, drafted = rows_of([[1, 2, 3]]), np.arange(1), list[int]()
    rows.pace = pace_of(lambda tokens: 32.0 + tokens)
    for token in [6] * 60 + [5] * 20:
        works = next_work(rows, which)
        width = works[0].tokens
        drafted.append(width - 1)
        settle(rows, works, np.full(width, token), np.ones(width, dtype=np.float32))
    assert drafted[0] == 3
    assert set(drafted[40:60]) == {0}
    assert len([step for step in looked if 40 <= step < 60]) == 4  # and hardly looked for
    assert drafted[-1] == 7
    assert rows.accepted_RS[0].tolist() == [0, sum(drafted[60:])]
    assert rows.pace.chance > 0.5
    begin(rows, 0, [1, 2], SPECULATIVE)
    assert rows.chance_R[0] == rows.pace.chance  # a new row begins with what is known of others


def test_a_full_engine_decodes_autoregressively() -> None:
    """Where a forward's time grows with its tokens from the first on, no drafts are run, right as they may be."""
    rows = [[*row, *row] for row in ROWS[:3]]
    with pb.Engine(MODEL, pb.EngineConfig(max_rows=3)) as engine:
        engine.batch.rows.pace = pace_of(float)
        engine.batch.rows.pace.note = lambda tokens, seconds: None  # type: ignore[method-assign]
        out = engine.generate(rows, replace(SPECULATIVE, max_new_tokens=24))
    expected = pb.generate(MODEL, rows, replace(SPECULATIVE, mode="autoregressive", max_new_tokens=24))
    assert (out.tokens, out.decode_forwards) == (expected.tokens, expected.decode_forwards)
    assert sum(out.drafted) == 0
