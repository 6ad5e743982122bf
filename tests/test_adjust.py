"""Sampling settings: what they do to logits by a readable definition, in all modes, whatever runs beside."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import BASE, ENDLESS, ROWS, SMALL, prompt
from conftest import ar_model, attach_gate, small_model
from definitions import DEFINITIONS, adjusted, autoregressive, verified
from hypothesis import given, settings
from hypothesis import strategies as st

import parablock as pb
from parablock.decoding.adjust import adjusted as vectorised
from parablock.decoding.decoder import begin
from parablock.decoding.rows import Rows
from parablock.decoding.unmasking import propose
from parablock.decoding.work import Work

MODEL, ADAPTED = ar_model(), small_model()
SETTINGS: dict[str, Any] = {
    "logit_bias": ((3, 4.5), (9, -100.0), (50, 2.0)), "presence_penalty": 0.7, "frequency_penalty": 0.4,
    "repetition_penalty": 1.4, "min_tokens": 9,
}  # fmt: skip
SOME = st.fixed_dictionaries(
    {},
    optional={
        "logit_bias": st.dictionaries(st.integers(0, 63), st.floats(-100, 100), max_size=5).map(
            lambda d: tuple(d.items())
        ),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.5, 2),
        "min_tokens": st.integers(0, 12),
    },
)


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 12), SOME), min_size=1, max_size=5), st.data())
def test_penalties_by_definition(cases: list[Any], data: Any) -> None:
    """Any predictions of any rows, behind any text of theirs, get the logits of the definition."""
    rows = Rows(len(cases), 40, 8)
    config = replace(BASE, mode="autoregressive", mask_token_id=63)
    configs = [replace(config, **change) for _, _, change in cases]
    row_m, text_m, target_m = [], [], []
    for row, (length, text, _) in enumerate(cases):
        begin(rows, row, prompt(row, length), configs[row])
        rows.ids_RC[row, length : length + text] = [n % 5 for n in prompt(9 + row, text)]  # some more than once
        for _ in range(data.draw(st.integers(0, 3))):
            row_m.append(row)
            text_m.append(length + data.draw(st.integers(0, text)))
            target_m.append(text_m[-1] + data.draw(st.integers(0, 3)))
    logits = torch.randn(len(row_m), 64, generator=torch.Generator().manual_seed(len(row_m)))
    if not len(row_m):
        return
    nothing = np.zeros(0, dtype=np.int64)
    piece = np.array(row_m)
    work = Work(
        np.arange(len(cases)), nothing, nothing, nothing, nothing, piece, piece * 0, np.array(target_m), piece * 0,
        np.array(text_m), lambda *_: nothing,
    )  # fmt: skip
    got = vectorised(logits.clone(), rows, [work])
    for m, row in enumerate(row_m):
        length = cases[row][0]
        ids = rows.ids_RC[row].tolist()
        expected = adjusted(logits[m].clone(), configs[row], ids[:length], ids[length : text_m[m]], target_m[m])
        torch.testing.assert_close(got[m], expected)


def test_min_p_is_that_of_transformers() -> None:
    from transformers import MinPLogitsWarper

    logits = torch.randn(6, 64) * 3
    kept = MinPLogitsWarper(min_p=0.2)(torch.zeros(6, 1, dtype=torch.long), logits) > -torch.inf
    seen = torch.zeros(6, 64, dtype=torch.bool)
    for number in torch.linspace(0, 0.999, 400):
        tokens, _ = propose(logits[:, None], number.expand(6, 1), min_p=0.2)
        seen[torch.arange(6), tokens[:, 0]] = True
    assert not (seen & ~kept).any()
    assert (seen.sum(1) > 0.8 * kept.sum(1)).all()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "min_p": 0.05, "top_p": 0.95}])
@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
def test_answers_by_definition(mode: str, sampling: dict[str, Any]) -> None:
    config: Any = replace(BASE, mode=mode, sub_block_cache=False, **SETTINGS, **sampling)
    for ids in ROWS[:5]:
        expected = DEFINITIONS[mode](ADAPTED, ids, config)
        assert pb.generate(ADAPTED, ids, config).tokens[0] == expected
        assert len(expected) >= 9
    config = replace(config, mode="diffusion", strategy="verified")
    for ids in ROWS[:4]:
        assert pb.generate(ADAPTED, ids, config).tokens[0] == verified(ADAPTED, ids, config)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "min_p": 0.02, "top_k": 30}])
def test_speculative_decoding_is_autoregressive(sampling: dict[str, Any]) -> None:
    """Drafts by lookup and by masks: a biased row repeats itself, so many are right."""
    change: dict[str, Any] = SETTINGS | {"presence_penalty": -1.0, "frequency_penalty": 0.1, "repetition_penalty": 0.95}
    for model, drafter in ((MODEL, "lookup"), (attach_gate(ar_model()), "both")):
        for extra in (SETTINGS, change):
            config: Any = replace(BASE, mode="speculative", max_new_tokens=40, draft_tokens=5, **extra, **sampling)
            plain = replace(config, mode="autoregressive", draft_tokens=None)
            out = pb.generate(model, ROWS, replace(config, drafter=drafter))
            assert out.tokens == pb.generate(model, ROWS, plain).tokens
            assert out.tokens[0] == autoregressive(model, ROWS[0], plain)
            assert sum(out.drafted)


@settings(max_examples=15)
@given(
    st.lists(
        st.tuples(st.sampled_from(["diffusion", "autoregressive", "verified"]), SOME, st.sampled_from([0.0, 0.9])),
        min_size=1,
        max_size=5,
    )
)
def test_neighbours_do_not_matter(cases: list[Any]) -> None:
    configs = []
    for mode, change, temperature in cases:
        known: Any = {"mode": "diffusion", "strategy": "verified"} if mode == "verified" else {"mode": mode}
        configs.append(replace(BASE, **known, **change, temperature=temperature, min_p=0.01))
    with pb.Engine(ADAPTED, SMALL) as engine:
        handles = [engine.submit(pb.Request(ROWS[i], config)) for i, config in enumerate(configs)]
        for i, (handle, config) in enumerate(zip(handles, configs, strict=True)):
            assert handle.result() == pb.generate(ADAPTED, ROWS[i], config).tokens[0]


def test_stop_tokens() -> None:
    own = pb.generate(ADAPTED, ROWS, pb.DecodeConfig(max_new_tokens=30, sub_block_size=4, logit_bias=((62, 20.0),)))
    assert all(tokens[-1] == 62 for tokens in own.tokens)
    whole = pb.DecodeConfig(max_new_tokens=30, sub_block_size=4, logit_bias=((62, 20.0),), ignore_eos=True)
    assert all(len(tokens) == 30 for tokens in pb.generate(ADAPTED, ROWS, whole).tokens)
    for mode in ("diffusion", "autoregressive"):
        late = replace(ENDLESS, mode=mode, stop_token_ids=(62, 7), min_tokens=11, logit_bias=((62, 60.0),))
        assert [len(t) for t in pb.generate(ADAPTED, ROWS, late).tokens] == [12] * len(ROWS)


def test_nothing_but_stop_tokens() -> None:
    """Where nothing else is possible, `min_tokens` gives way."""
    config = replace(BASE, temperature=0.9, stop_token_ids=tuple(range(64)), min_tokens=3)
    assert [len(tokens) for tokens in pb.generate(ADAPTED, ROWS, config).tokens] == [1] * len(ROWS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"presence_penalty": 2.5}, "presence_penalty=2.5"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty=nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"min_tokens": -1}, "min_tokens=-1"),
        ({"min_tokens": 9, "max_new_tokens": 8}, "min_tokens=9 is more than max_new_tokens=8"),
        ({"logit_bias": ((1, 101.0),)}, "logit_bias=\\(1, 101.0\\)"),
        ({"logit_bias": ((64, 1.0),)}, "logit_bias=\\(64, 1.0\\)"),
        ({"logit_bias": ((1, 1.0),) * 4097}, "logit_bias=4097 tokens"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pb.generate(ADAPTED, ROWS[0], pb.DecodeConfig(sub_block_size=4, **change))
