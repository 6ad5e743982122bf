"""Drafts of a causal adapter: masks see what they should, and whatever they draft, the tokens are the AR model's."""

import itertools
from dataclasses import replace
from typing import Any

import definitions
import numpy as np
import pytest
import torch
from cases import ALIKE, BASE, ROWS, empty
from conftest import ar_model
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import run_arriving
from test_speculative import SAMPLED
from test_windows import capped, windowed

import parablock as pb
from parablock.decoding.decoder import begin, next_work
from parablock.decoding.rows import Rows
from parablock.decoding.work import settle
from parablock.diffusion.gate import attach, gate_of, new_gate

SPECULATIVE = replace(BASE, mode="speculative", stop_token_ids=())
AR = replace(SPECULATIVE, mode="autoregressive")


def gated(model: Any, masks: int = 3, kinds: int | None = None, scale: float = 0.05) -> Any:
    """A model of AR with a random gate, that drafts well now and then."""
    model.config.bd_size = None
    gate = new_gate(model, draft_tokens=masks, rank=4, alpha=8)
    gate.embeddings.data = gate.embeddings.data[: kinds or masks]
    generator = torch.Generator().manual_seed(1)
    for parameter in gate.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * scale
    attach(model, gate)
    return model.eval()


MODELS = {
    "full": gated(ar_model()), "one kind": gated(ar_model(seed=2), masks=5, kinds=1), "window 3": gated(windowed(3)),
    "window 13": gated(windowed(13)), "capped": gated(capped()),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}])
def test_masks_see_the_known_tokens_of_their_outcome_and_the_masks_before_them(name: str, sampling: Any) -> None:
    """As many forwards as by definition: every draft of every outcome is the right one."""
    model = MODELS[name]
    for drafts in (1, 2, 3):
        config = replace(SPECULATIVE, drafter="masks", draft_tokens=drafts, max_new_tokens=20, **sampling)
        expected = [definitions.speculative(model, row, config) for row in ROWS]
        assert any(forwards < 19 for _, forwards in expected)
        for row, wanted in zip(ROWS, expected, strict=True):  # alone: random numbers are those of a first row
            out = pb.generate(model, row, config)
            assert (out.tokens[0], out.decode_forwards[0]) == wanted
        with pb.Engine(model, pb.EngineConfig(block_size=16, max_rows=4)) as engine:
            handles = [engine.submit(pb.Request(row, config, sample=0)) for row in ROWS]
            assert [(handle.result(), handle.forwards) for handle in handles] == expected


@pytest.mark.parametrize("sampling", SAMPLED)
@pytest.mark.parametrize("name", MODELS)
def test_the_tokens_are_those_of_autoregressive_decoding(name: str, sampling: dict[str, Any]) -> None:
    model = MODELS[name]
    config = replace(SPECULATIVE, max_new_tokens=40, stop_token_ids=(7, 21), **sampling)
    expected = pb.generate(model, ROWS, replace(config, mode="autoregressive")).tokens
    for drafter, drafts in itertools.product(("masks", "both"), (None, 3)):
        decode = replace(config, drafter=drafter, draft_tokens=drafts)
        assert pb.generate(model, ROWS, decode).tokens == expected
        for block_size, rows in ((8, 3), (32, 16)):
            with pb.Engine(model, pb.EngineConfig(block_size=block_size, max_rows=rows)) as engine:
                for _ in range(2):  # the second time their beginnings are known
                    assert engine.generate(ROWS, decode).tokens == expected
                assert empty(engine)


REQUESTS = st.tuples(
    st.integers(0, 7), st.integers(1, 40), st.sampled_from([None, "masks", "lookup", "both"]),
    st.sampled_from([None, 1, 3]), st.sampled_from([0.0, 0.4]), st.sampled_from(SAMPLED), st.integers(0, 8),
    st.one_of(st.none(), st.integers(0, 12)),
)  # fmt: skip


@settings(max_examples=25)
@given(st.lists(REQUESTS, min_size=1, max_size=8), st.sampled_from([(1, 72), (3, 104), (4, 400)]))
def test_any_schedule_gives_the_same_tokens(requests: list[Any], size: tuple[int, int]) -> None:
    """Rows that draft beside rows that do not, little memory, known beginnings, some cancelled."""
    model, (rows, kv_tokens) = MODELS["full"], size
    config = pb.EngineConfig(block_size=8, max_rows=rows, kv_tokens=kv_tokens, max_context=72, prefill_chunk=16)
    with pb.Engine(model, config) as engine:
        arrivals, answers = [], []
        for which, length, drafter, drafts, threshold, sampling, pause, patience in requests:
            decode = replace(AR, max_new_tokens=length, **sampling)
            answers.append(pb.generate(model, ALIKE[which], decode).tokens[0])
            if drafter is not None:
                own: Any = {"drafter": drafter, "draft_tokens": drafts, "draft_threshold": threshold}
                decode = replace(decode, mode="speculative", **own)
            arrivals.append((pb.Request(ALIKE[which], decode, stream=pause % 2 == 0), pause, patience))
        for handle, expected in zip(run_arriving(engine, arrivals), answers, strict=True):
            tokens = handle.tokens if handle.status == "cancelled" else handle.result()
            assert tokens == (expected[: len(tokens)] if handle.status == "cancelled" else expected)
        assert empty(engine)


def test_the_ar_model_is_the_base_whatever_the_gate_holds() -> None:
    base, model = ar_model(), MODELS["full"]
    for config in (AR, replace(AR, temperature=1.0)):
        assert pb.generate(model, ROWS, config).tokens == pb.generate(base, ROWS, config).tokens
    ids = torch.tensor([ROWS[0]])
    assert torch.equal(model(ids).logits, base(ids).logits)


def test_a_draft_below_the_threshold_is_not_verified() -> None:
    model = MODELS["full"]
    verified = []
    for threshold in (0.0, 0.3, 0.999):
        config = replace(SPECULATIVE, drafter="masks", draft_tokens=3, draft_threshold=threshold, max_new_tokens=40)
        out = pb.generate(model, ROWS, config)
        verified.append(sum(out.drafted))
    assert verified[0] > verified[1] > verified[2] == 0


def test_bad_combinations_name_the_remedy() -> None:
    plain, model = ar_model(), MODELS["full"]
    for drafter in ("masks", "both"):
        with pytest.raises(ValueError, match=f"drafter='{drafter}'.*parablock adapt --context causal.*'lookup'"):
            pb.generate(plain, ROWS[0], replace(SPECULATIVE, drafter=drafter))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"causal adapter.*mode='speculative'"):
        pb.generate(model, ROWS[0], replace(BASE, mode="diffusion"))
    assert (
        pb.generate(model, ROWS[0], replace(BASE, mode=None)).tokens
        == pb.generate(model, ROWS[0], replace(BASE, mode="autoregressive")).tokens
    )
    with pytest.raises(ValueError, match=r"draft_threshold=1\.5"):
        replace(SPECULATIVE, draft_threshold=1.5)
    assert np.isfinite(pb.generate(model, ROWS[0], replace(SPECULATIVE, max_new_tokens=1)).seconds)


def test_what_is_hoped_of_later_masks_is_never_more_than_of_earlier_ones() -> None:
    """Masks of a block are run from its first on, whatever was seen of each lately."""
    model = MODELS["full"]
    rows, gate = 4, gate_of(model)
    state = Rows(rows, 96, 16, gate)
    which = np.arange(rows)
    for row in which:
        begin(state, row, ROWS[0], replace(SPECULATIVE, drafter="masks", max_new_tokens=60, seed=1))
        state.reveal(np.array([row]), np.array([len(ROWS[0])]), np.array([5]))
        state.start_R[row] = len(ROWS[0])
    state.hope_RK[:] = np.random.default_rng(0).random(state.hope_RK.shape)
    state.pace.seconds = lambda tokens, drafts: np.ones(np.shape(tokens))  # type: ignore[method-assign]
    for _ in range(8):
        (work,) = next_work(state, which)
        asked = work.settle.keywords["asked"]  # type: ignore[attr-defined]
        for piece in range(rows):
            for outcome in range(8):
                places = asked.place_m[(work.piece_m == piece) & (asked.outcome_m == outcome)].tolist()
                assert places == list(range(len(places)))
        settle(state, [work], np.full(len(work.piece_m), 9), np.full(len(work.piece_m), 0.8, dtype=np.float32))


def test_a_block_of_one_token_has_no_room_for_drafts() -> None:
    with pb.Engine(MODELS["full"], pb.EngineConfig(block_size=1)) as engine:
        out = engine.generate(ROWS[:2], replace(SPECULATIVE, max_new_tokens=5))
    assert out.tokens == pb.generate(MODELS["full"], ROWS[:2], replace(AR, max_new_tokens=5)).tokens
    assert out.drafted == [0, 0]


def test_a_gate_has_as_many_masks_as_fit() -> None:
    with pytest.raises(ValueError, match="draft_tokens=16 is out of range; use 1 to 15"):
        gated(ar_model(), masks=16)
