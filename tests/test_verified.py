"""Verified block diffusion: the tokens of its definition whatever is drafted, and how many forwards they take."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import definitions
import numpy as np
import pytest
from cases import ALIKE, BASE, ROWS, D, empty
from conftest import ar_model, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import run_arriving
from test_windows import MODELS as WINDOWED

import parablock as pb
from parablock.checkpoints.look import look
from parablock.data.chat import encode_prompt
from parablock.data.word_problems import word_problem
from parablock.decoding.modes import verified
from parablock.decoding.rows import Rows

VERIFIED = replace(BASE, mode="diffusion", strategy="verified", stop_token_ids=(7,))
ENDLESS = replace(VERIFIED, stop_token_ids=())
SAMPLED = ({}, {"temperature": 0.5}, {"temperature": 1.0, "top_p": 0.8}, {"temperature": 1.2, "top_k": 6})
MODEL = small_model()
known: dict[Any, list[int]] = {}
Keep = Callable[[Rows, np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]
keep = verified._keep


def truth(ids: list[int], config: pb.DecodeConfig) -> list[int]:
    """The answer by definition; sub-blocks and their cache have no part in it."""
    config = replace(config, sub_block_size=8, sub_block_cache=True)
    key = tuple(ids), config
    if key not in known:
        known[key] = definitions.verified(MODEL, ids, config)
    return known[key]


def oracle(rates: list[float]) -> Keep:
    """Drafts of the endless greedy answer, each right with the next of these probabilities, and likely with another."""
    rng, rate = np.random.default_rng(len(rates)), itertools.cycle(rates)

    def kept(rows: Rows, row_m: np.ndarray, target_m: np.ndarray, tokens_m: np.ndarray, sure_m: np.ndarray) -> None:
        tokens_m, sure_m = tokens_m.copy(), np.ones(len(sure_m))
        for m, (row, target) in enumerate(zip(row_m, target_m, strict=True)):
            length, p = int(rows.prompt_R[row]), next(rate)
            answer = truth(rows.ids_RC[row, :length].tolist(), replace(ENDLESS, max_new_tokens=72))
            right = target - length < len(answer) and rng.random() < p
            tokens_m[m] = answer[target - length] if right else rng.integers(0, 60)
            sure_m[m] = float(rng.random() < max(p, 0.5))
        keep(rows, row_m, target_m, tokens_m, sure_m)

    return kept


@pytest.fixture
def perfect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified, "_keep", oracle([1.0]))


@pytest.mark.parametrize(("likely", "sampling"), [(verified.LIKELY, SAMPLED[0]), (0.0, SAMPLED[1]), (0.0, SAMPLED[2])])
def test_the_tokens_are_those_of_the_definition(
    likely: float, sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified, "LIKELY", likely)
    config = replace(VERIFIED, max_new_tokens=40, **sampling)
    assert pb.generate(MODEL, ROWS[0], config).tokens == [truth(ROWS[0], config)]
    for size, cache, rows, chunk in ((1, True, 16, 256), (2, False, 3, 16), (8, True, 3, 16)):
        config = replace(config, sub_block_size=size, sub_block_cache=cache)
        dense = pb.generate(MODEL, ROWS, config)
        greedy = replace(config, temperature=0.0)  # sampled, a row's numbers are those of its place in the batch
        if config == greedy:
            assert dense.tokens == [truth(row, config) for row in ROWS]
            assert len({len(t) for t in dense.tokens}) > 1
        with pb.Engine(MODEL, pb.EngineConfig(max_rows=rows, prefill_chunk=chunk)) as engine:
            for _ in range(2):  # the second time their beginnings are known
                assert engine.generate(ROWS, config).tokens == dense.tokens
            assert empty(engine)


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_are_those_of_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified, "LIKELY", 0.0)
    make_model, *arguments = WINDOWED[name]
    model: Any = make_model(*arguments)
    config = replace(ENDLESS, temperature=0.7, max_new_tokens=30)
    some = [ROWS[i] for i in (3, 7)]
    assert [pb.generate(model, row, config).tokens[0] for row in some] == [
        definitions.verified(model, row, config) for row in some
    ]
    with pb.Engine(model, pb.EngineConfig(max_rows=3)) as engine:
        assert engine.generate(ROWS, config).tokens == pb.generate(model, ROWS, config).tokens


REQUESTS = st.tuples(
    st.integers(0, 7),  # which prompt; some begin alike
    st.integers(1, 40),  # max_new_tokens
    st.sampled_from([VERIFIED, replace(VERIFIED, sub_block_size=2), replace(VERIFIED, sub_block_size=8)]),
    st.sampled_from(SAMPLED),
    st.booleans(),  # streamed
    st.integers(0, 8),  # steps until the next one is submitted
    st.one_of(st.none(), st.integers(0, 12)),  # cancelled after so many steps
)


@settings(max_examples=25)
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
        max_rows=rows, kv_tokens=kv_tokens, max_context=72, prefill_chunk=16, prefix_cache=prefix_cache
    )
    with pytest.MonkeyPatch.context() as patch, pb.Engine(MODEL, config) as engine:
        patch.setattr(verified, "_keep", oracle(rates))
        arrivals = [
            (pb.Request(ALIKE[which], replace(base, max_new_tokens=length, **own), stream=stream), pause, patience)
            for which, length, base, own, stream, pause, patience in requests
        ]
        for handle in run_arriving(engine, arrivals):
            expected = truth(list(handle.request.prompt), handle.request.config)
            if handle.status == "cancelled":
                assert handle.tokens == expected[: len(handle.tokens)]
            else:
                assert handle.result() == expected
            assert handle.accepted["masks"] <= handle.drafted["masks"]
        assert empty(engine)


def test_beside_other_modes_and_strategies() -> None:
    configs = [VERIFIED, BASE, replace(BASE, mode="autoregressive"), replace(VERIFIED, temperature=0.9)]
    requests = [pb.Request(row, config) for row in ROWS for config in configs]
    with pb.Engine(MODEL, pb.EngineConfig(max_rows=5, kv_tokens=200)) as engine:
        handles = [engine.submit(request) for request in requests]
        for request, handle in zip(requests, handles, strict=True):
            assert handle.result() == pb.generate(MODEL, list(request.prompt), request.config).tokens[0]
        assert engine.preemptions > 0


@pytest.mark.usefixtures("perfect")
@pytest.mark.parametrize("size", [2, 4, 8])
def test_right_drafts_save_forwards_and_the_length_is_exact(size: int) -> None:
    config = replace(ENDLESS, sub_block_size=size)
    for length in range(1, 41):
        out = pb.generate(MODEL, ROWS[1], replace(config, max_new_tokens=length))
        assert out.tokens == [truth(ROWS[1], replace(config, max_new_tokens=length))]
        with pb.Engine(MODEL, pb.EngineConfig(max_rows=1)) as engine:
            same = engine.generate(ROWS[1], replace(config, max_new_tokens=length))
        assert (same.tokens, same.decode_forwards, same.drafted) == (out.tokens, out.decode_forwards, out.drafted)
        if size == D:
            # the prefill gives the first token of a block, the first forward the second, beside the first drafts; from
            # then on a forward verifies a block and commits it; the last token is never run
            assert out.decode_forwards == [0 if length == 1 else 1 if length == 2 else 2 + (length - 2) // D]


@pytest.mark.usefixtures("perfect")
def test_nothing_stands_behind_a_stop_token() -> None:
    whole = truth(ROWS[1], replace(ENDLESS, max_new_tokens=24))
    for stop in set(whole[1:]):
        *_, last = pb.stream(MODEL, ROWS[1], replace(ENDLESS, sub_block_size=8, stop_token_ids=(stop,)))
        end = whole.index(stop) + 1
        assert last.tokens() == whole[:end]
        assert int((~last.masked).sum()) <= len(ROWS[1]) + end - int(last.start[0])


@pytest.mark.usefixtures("perfect")
@pytest.mark.parametrize("cache", [True, False])
def test_with_little_memory_drafts_take_no_pages_from_others(cache: bool) -> None:
    config = replace(ENDLESS, sub_block_size=8, max_new_tokens=33)
    with pb.Engine(MODEL, pb.EngineConfig(max_rows=1, kv_tokens=400)) as engine:
        plenty = engine.generate(ROWS[0], config)
    with pb.Engine(MODEL, pb.EngineConfig(max_rows=1, kv_tokens=40, prefix_cache=cache)) as engine:
        tight = engine.generate(ROWS[0], config)
        assert tight.tokens == plenty.tokens == [truth(ROWS[0], config)]
        assert plenty.decode_forwards[0] < tight.decode_forwards[0] < 33
    with pb.Engine(MODEL, pb.EngineConfig(max_rows=3, kv_tokens=64, prefix_cache=cache)) as engine:
        handles = [engine.submit(pb.Request(row, config, stream=True)) for row in ROWS[:3]]
        while engine.step():
            pass
        for row, handle in zip(ROWS, handles, strict=False):
            told = [token for update in handle.updates() for token in update.tokens]
            assert told == handle.result() == truth(row, config)
        assert engine.preemptions > 0


@pytest.mark.parametrize("rates", [[1.0], [0.5, 1.0, 0.0]])
def test_steps_show_what_is_settled_and_nothing_else(rates: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified, "_keep", oracle(rates))
    config = replace(ENDLESS, max_new_tokens=50, sub_block_size=8)
    expected = [truth(row, config) for row in ROWS[:4]]
    seen: list[dict[int, int]] = [{} for _ in expected]
    for step in pb.stream(MODEL, ROWS[:4], config):
        assert (step.ids[step.masked] == MODEL.config.mask_token_id).all()
        for r, c in zip(*step.revealed.nonzero(), strict=True):
            position = int(step.start[r] + c)
            assert position not in seen[r]  # revealed once
            seen[r][position] = int(step.ids[r, c])
        for r, answer in enumerate(expected):
            assert step.tokens(r) == answer[: int(step.new_tokens[r])]
            assert len(seen[r]) == step.new_tokens[r]  # no token without those before it
    for r, answer in enumerate(expected):
        assert [seen[r][len(ROWS[r]) + i] for i in range(50)] == answer


def test_the_bundled_model_drafts_well_and_answers_by_definition() -> None:
    model, tokenizer = pb.load("bundled", dtype="float32")
    questions = [word_problem("test", 5, i).question for i in range(4)]
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": q}]) for q in questions]
    base = pb.DecodeConfig(mode="diffusion", strategy="verified", max_new_tokens=60, stop_token_ids=(2,), seed=3)
    expected = [definitions.verified(model, ids, base) for ids in prompts]
    warm = replace(base, temperature=0.8)
    with pb.Engine(model, pb.EngineConfig(max_rows=4)) as engine:
        for size, least in ((8, 4), (32, 7)):
            out = engine.generate(prompts, replace(base, sub_block_size=size))
            assert out.tokens == expected
            assert out.tokens_per_forward > least
            assert sum(out.accepted) > 0.8 * sum(out.drafted)
        assert engine.generate(prompts, warm).tokens == pb.generate(model, prompts, warm).tokens
        assert engine.generate(prompts[0], warm).tokens == [definitions.verified(model, prompts[0], warm)]


def test_speculative_mode_names_it_where_tokens_see_their_block() -> None:
    with pytest.raises(ValueError, match="strategy='verified'"):
        pb.generate(MODEL, ROWS[0], replace(BASE, mode="speculative"))
    with pytest.raises(ValueError, match="--strategy verified"):
        look("bundled").mode(replace(BASE, mode="speculative"))
    with pytest.raises(ValueError, match="never adapted"):
        pb.generate(ar_model(), ROWS[0], VERIFIED)
