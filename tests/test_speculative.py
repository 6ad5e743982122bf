"""Speculative decoding: the autoregressive tokens whatever is drafted, and how many forwards they take."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import ALIKE, BASE, ROWS, empty
from conftest import ar_model
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import run_arriving

import parablock as pb
from parablock.data.chat import encode_prompt
from parablock.data.word_problems import word_problem
from parablock.decoding.modes import speculative
from parablock.decoding.rows import Rows

AR = replace(BASE, mode="autoregressive")
SPECULATIVE = replace(BASE, mode="speculative")
SAMPLED = (
    {}, {"temperature": 0.5}, {"temperature": 1.0, "top_p": 0.8}, {"temperature": 1.5, "top_k": 6},
    {"temperature": 1.2, "top_p": 0.9, "top_k": 9},
)  # fmt: skip
MODEL = ar_model()
known: dict[Any, list[int]] = {}
Lookup = Callable[[Rows, np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def autoregressive(ids: list[int], config: pb.DecodeConfig) -> list[int]:
    """The answer without drafts."""
    config = replace(config, mode="autoregressive", draft_tokens=None)
    key = tuple(ids), config
    if key not in known:
        known[key] = pb.generate(MODEL, ids, config).tokens[0]
    return known[key]


def oracle(rates: list[float]) -> Lookup:
    """Drafts of the endless greedy answer, each token right with the next of these probabilities."""
    rng, rate = np.random.default_rng(len(rates)), itertools.cycle(rates)

    def lookup(rows: Rows, which: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        guess_nM, found_n = rng.integers(0, 64, (len(which), most)), np.ones(len(which), dtype=bool)
        for n, row in enumerate(which):
            start, length = int(rows.start_R[row]), int(rows.prompt_R[row])
            p = next(rate)
            found_n[n] = p > 0.1 or rng.random() < 0.5
            answer = autoregressive(
                rows.ids_RC[row, :length].tolist(), replace(AR, max_new_tokens=72, stop_token_ids=())
            )
            truth = np.array(answer[start + 1 - length :][:most])
            right = rng.random(len(truth)) < p
            guess_nM[n, : len(truth)][right] = truth[right]
        return guess_nM, found_n

    return lookup


@pytest.fixture
def perfect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculative, "lookup", oracle([1.0]))


@pytest.mark.parametrize("sampling", SAMPLED)
@pytest.mark.parametrize("drafts", [None, 4])
def test_the_tokens_are_those_of_autoregressive_decoding(sampling: dict[str, Any], drafts: int | None) -> None:
    config = replace(SPECULATIVE, max_new_tokens=40, draft_tokens=drafts, **sampling)
    expected = pb.generate(MODEL, ROWS, replace(config, mode="autoregressive", draft_tokens=None))
    assert len({len(t) for t in expected.tokens}) > 1
    dense = pb.generate(MODEL, ROWS, config)
    assert dense.tokens == expected.tokens
    for block_size, rows in ((8, 3), (32, 16)):
        with pb.Engine(MODEL, pb.EngineConfig(block_size=block_size, max_rows=rows)) as engine:
            for _ in range(2):  # the second time their beginnings are known
                out = engine.generate(ROWS, config)
                assert out.tokens == expected.tokens
                if drafts:
                    assert (out.decode_forwards, out.drafted) == (dense.decode_forwards, dense.drafted)
            assert empty(engine)
    if drafts:
        assert sum(dense.accepted) > 0 or sampling  # what is sampled seldom repeats itself
        assert sum(dense.decode_forwards) == sum(expected.decode_forwards) - sum(dense.accepted)


def test_the_bundled_model_answers_as_transformers_generate() -> None:
    model, tokenizer = pb.load("bundled-ar")
    questions = [word_problem("test", 5, i).question for i in range(12)]
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": q}]) for q in questions]
    config = pb.DecodeConfig(mode="speculative", max_new_tokens=60, draft_tokens=7)
    expected = [
        model.generate(torch.tensor([p]), max_new_tokens=60, do_sample=False, suppress_tokens=[3])[0, len(p) :].tolist()
        for p in prompts
    ]
    assert model.config.mask_token_id == 3
    out = pb.generate(model, prompts, config)
    assert out.tokens == expected
    assert sum(out.accepted) > 0
    with pb.Engine(model) as engine:
        assert engine.generate(prompts, config).tokens == expected
        warm = replace(config, temperature=0.8, seed=3)
        ar = replace(warm, mode="autoregressive", draft_tokens=None)
        assert engine.generate(prompts, warm).tokens == engine.generate(prompts, ar).tokens


REQUESTS = st.tuples(
    st.integers(0, 7),  # which prompt; some begin alike
    st.integers(1, 40),  # max_new_tokens
    st.sampled_from([AR, SPECULATIVE, replace(SPECULATIVE, draft_tokens=3), replace(SPECULATIVE, draft_tokens=50)]),
    st.sampled_from(SAMPLED),
    st.booleans(),  # streamed
    st.integers(0, 8),  # steps until the next one is submitted
    st.one_of(st.none(), st.integers(0, 12)),  # cancelled after so many steps
)


@settings(max_examples=50)
@given(
    st.lists(REQUESTS, min_size=1, max_size=10),
    st.lists(st.sampled_from([0.0, 0.5, 0.9, 1.0]), min_size=1, max_size=7),
    st.sampled_from([(1, 72), (3, 104), (4, 400)]),
    st.booleans(),
)
def test_any_drafts_in_any_schedule_give_the_same_tokens(
    requests: list[Any], rates: list[float], size: tuple[int, int], prefix_cache: bool
) -> None:
    rows, kv_tokens = size
    config = pb.EngineConfig(
        block_size=8, max_rows=rows, kv_tokens=kv_tokens, max_context=72, prefill_chunk=16, prefix_cache=prefix_cache
    )
    with pytest.MonkeyPatch.context() as patch, pb.Engine(MODEL, config) as engine:
        patch.setattr(speculative, "lookup", oracle(rates))
        arrivals = [
            (pb.Request(ALIKE[which], replace(mode, max_new_tokens=length, **own), stream=stream), pause, patience)
            for which, length, mode, own, stream, pause, patience in requests
        ]
        handles = run_arriving(engine, arrivals)
        for handle in handles:
            expected = autoregressive(list(handle.request.prompt), handle.request.config)
            if handle.status == "cancelled":
                assert handle.tokens == expected[: len(handle.tokens)]
            else:
                assert handle.result() == expected
            assert handle.accepted["lookup"] <= handle.drafted["lookup"]
        assert empty(engine)
        assert engine.stats["drafted"] == sum(handle.drafted["lookup"] for handle in handles)
        assert engine.stats["accepted"] == sum(handle.accepted["lookup"] for handle in handles)


@pytest.mark.usefixtures("perfect")
@pytest.mark.parametrize("drafts", [1, 3, 7])
def test_right_drafts_save_forwards(drafts: int) -> None:
    config = replace(SPECULATIVE, draft_tokens=drafts, stop_token_ids=())
    for length in range(1, 26):
        out = pb.generate(MODEL, ROWS[1], replace(config, max_new_tokens=length))
        assert out.tokens == [autoregressive(ROWS[1], replace(config, max_new_tokens=length))]
        # the prefill gives the first token; the last token is never run
        assert out.decode_forwards == [-(-(length - 1) // (drafts + 1))]
        assert out.accepted == out.drafted == [length - 1 - out.decode_forwards[0]]
        assert out.forwards == out.decode_forwards[0] + 1


@pytest.mark.usefixtures("perfect")
def test_nothing_stands_behind_a_stop_token() -> None:
    whole = autoregressive(ROWS[1], replace(AR, stop_token_ids=()))
    for stop in set(whole[1:]):
        config = replace(SPECULATIVE, draft_tokens=7, stop_token_ids=(stop,))
        *_, last = pb.stream(MODEL, ROWS[1], config)
        end = whole.index(stop) + 1
        assert last.tokens() == whole[:end]
        assert int((~last.masked).sum()) <= len(ROWS[1]) + end - int(last.start[0])


@pytest.mark.usefixtures("perfect")
def test_pages_for_drafts_are_taken_only_where_there_are_some() -> None:
    """A row whose next page is not there drafts as far as its own; nobody gives up pages for another's drafts."""
    config = replace(SPECULATIVE, draft_tokens=7, stop_token_ids=(), max_new_tokens=33)
    with pb.Engine(MODEL, pb.EngineConfig(block_size=8, max_rows=1, kv_tokens=400)) as engine:
        plenty = engine.generate(ROWS[0], config)
        assert plenty.decode_forwards == [4]
    with pb.Engine(MODEL, pb.EngineConfig(block_size=8, max_rows=1, kv_tokens=40)) as engine:
        tight = engine.generate(ROWS[0], config)
        assert (tight.tokens, tight.decode_forwards) == (plenty.tokens, [5])
    with pb.Engine(MODEL, pb.EngineConfig(block_size=8, max_rows=3, kv_tokens=64)) as engine:
        handles = [engine.submit(pb.Request(row, config)) for row in ROWS[:2]]
        assert [h.result() for h in handles] == [autoregressive(row, config) for row in ROWS[:2]]
        assert engine.stats["preemptions"] > 0


@pytest.mark.parametrize("rates", [[1.0], [0.5, 1.0, 0.0]])
def test_steps_show_what_is_settled_and_nothing_else(rates: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculative, "lookup", oracle(rates))
    config = replace(SPECULATIVE, draft_tokens=6, max_new_tokens=50, block_size=8, stop_token_ids=())
    expected = [autoregressive(row, replace(config, block_size=None)) for row in ROWS[:4]]
    seen: list[dict[int, int]] = [{} for _ in expected]
    for step in pb.stream(MODEL, ROWS[:4], config):
        assert (step.ids[step.masked] == MODEL.config.mask_token_id).all()
        for r, c in zip(*step.revealed.nonzero(), strict=True):
            position = int(step.start[r] + c)
            assert position not in seen[r]  # revealed once
            seen[r][position] = int(step.ids[r, c])
        for r, answer in enumerate(expected):
            assert step.tokens(r) == answer[: int(step.new_tokens[r])]
            assert len(seen[r]) == step.new_tokens[r]
            assert not len(step.draft(r))
    for r, answer in enumerate(expected):
        assert [seen[r][len(ROWS[r]) + i] for i in range(50)] == answer
