"""Log-probabilities in the engine: those of plain forwards, whatever the settings, the schedule or the neighbours."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import BASE, MASK, ROWS, SMALL, D, empty, prompt
from conftest import ar_model, attach_gate, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from official_layout import masks_of

import parablock as pb
from parablock.decoding.generate import resolve
from parablock.decoding.logprobs import TokenLogprob
from parablock.diffusion.masks import block_causal_mask
from parablock.evals.likelihood import log_likelihood

MODEL, ADAPTED = ar_model(), small_model()
SETTINGS: dict[str, Any] = {
    "logit_bias": ((3, 4.5), (9, -100.0)), "presence_penalty": 0.7, "repetition_penalty": 1.4, "temperature": 0.8,
    "top_k": 9,
}  # fmt: skip


def log_p(model: Any, ids: list[int], attends: torch.Tensor | None = None) -> torch.Tensor:
    """`[L, V]`: log-probabilities behind every token; the mask token has none."""
    with torch.no_grad():
        mask = None if attends is None else masks_of(model, attends, torch.arange(len(ids)))
        logits = model(torch.tensor([ids]), attention_mask=mask).logits[0]
    if model.config.mask_token_id is not None:
        logits[:, model.config.mask_token_id] = -torch.inf
    return torch.log_softmax(logits, -1)


def check(told: TokenLogprob, row: torch.Tensor, token: int, top: int) -> None:
    values, ids = row.topk(top)
    assert [i for i, _ in told.top] == ids.tolist()
    expected = torch.tensor([row[token], *values])
    torch.testing.assert_close(torch.tensor([told.logprob, *(v for _, v in told.top)]), expected, rtol=1e-4, atol=1e-4)


def ask(engine: pb.Engine, ids: list[int], config: pb.DecodeConfig, **more: Any) -> Any:
    return engine.submit(pb.Request(ids, config, **{"logprobs": 3, **more}))


@pytest.mark.parametrize("extra", [{}, SETTINGS])
@pytest.mark.parametrize("mode", ["autoregressive", "speculative"])
def test_those_of_a_plain_forward(mode: Any, extra: dict[str, Any]) -> None:
    """Prompts longer than a chunk, too; the second time their beginnings are known."""
    for model in (MODEL, attach_gate(ar_model())):
        with pb.Engine(model, replace(SMALL, kv_tokens=2000, block_size=D)) as engine:
            drafts = {"draft_tokens": 4} if mode == "speculative" else {}
            config = replace(BASE, mode=mode, **extra, **drafts)
            handles = [ask(engine, ids, config, prompt_logprobs=i % 2 == 1) for i, ids in enumerate(ROWS * 2)]
            plain = [engine.submit(pb.Request(ids, config)) for ids in ROWS]
            answers = [handle.result() for handle in handles]
            assert [handle.result() for handle in plain] == answers[: len(ROWS)]
            assert not any(handle.logprobs or handle.prompt_logprobs for handle in plain)
            assert any(handle.cached_tokens for handle in handles)
            assert empty(engine)
        for handle, ids, tokens in zip(handles, ROWS * 2, answers, strict=True):
            expected = log_p(model, [*ids, *tokens])
            assert len(handle.logprobs) == len(tokens)
            for i, told in enumerate(handle.logprobs):
                check(told, expected[len(ids) + i - 1], tokens[i], 3)
            if handle.request.prompt_logprobs:
                first, *rest = handle.prompt_logprobs
                assert first is None
                assert len(rest) == len(ids) - 1
                for i, told in enumerate(rest):
                    check(told, expected[i], ids[i + 1], 3)


def test_blocks_are_told_as_they_stood() -> None:
    """A token's log-probability is that of the step that revealed it: `pb.stream` shows what each of them saw."""
    config = replace(BASE, threshold=0.3, sub_block_size=8, sub_block_cache=False, max_new_tokens=30)
    with pb.Engine(ADAPTED, SMALL) as engine:
        for ids in ROWS[:6]:
            handle = ask(engine, ids, config, logprobs=2)
            tokens = handle.result()
            known: dict[int, int] = dict(enumerate(ids))
            length = (len(ids) // D + 1) * D
            expected: dict[int, torch.Tensor] = {}
            for step in pb.stream(ADAPTED, ids, config):
                start = int(step.start[0])
                new = [start + int(i) for i in step.revealed[0].nonzero()[0]]
                if not new:
                    continue
                last = max(new) // D * D + D if max(new) % D else max(new)  # a block's first token: by the one before
                filled = [known.get(i, MASK) for i in range(max(last, length if not new else last))]
                rows = log_p(ADAPTED, filled, block_causal_mask(len(filled), D))
                for position in new:
                    expected[position] = rows[position - 1]
                for position in new:
                    known[position] = int(step.ids[0][position - start])
            for i, told in enumerate(handle.logprobs):
                check(told, expected[len(ids) + i], tokens[i], 2)


@settings(max_examples=12)
@given(st.lists(st.tuples(st.integers(1, 37), st.booleans()), min_size=1, max_size=4), st.booleans())
def test_prompts_by_the_definition_of_eval(cases: list[tuple[int, bool]], diffusion: bool) -> None:
    model = ADAPTED if diffusion else MODEL
    prompts = [prompt(9 * i + length, length) for i, (length, _) in enumerate(cases)]
    config = replace(BASE, max_new_tokens=5)
    resolved = resolve(model, prompts, config)
    with pb.Engine(model, SMALL) as engine:
        handles = [
            ask(engine, ids, config, logprobs=1, prompt_logprobs=True, stream=stream)
            for ids, (_, stream) in zip(prompts, cases, strict=True)
        ]
        answers = [handle.result() for handle in handles]
    for ids, handle, answer in zip(prompts, handles, answers, strict=True):
        assert answer == pb.generate(model, ids, config).tokens[0]
        if len(ids) > 1:
            with_eval, greedy = log_likelihood(model, [(ids[:1], ids[1:])], resolved)[0]
            assert sum(told.logprob for told in handle.prompt_logprobs[1:]) == pytest.approx(with_eval, abs=1e-3)
            best = [told.top[0][0] for told in handle.prompt_logprobs[1:]]
            assert (best == ids[1:]) == greedy


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive", "speculative", "verified"])
def test_streams_and_preemption(mode: str) -> None:
    """Too little memory for all: rows give theirs back in the middle of prompts and answers; nothing is told twice."""
    model = MODEL if mode == "speculative" else ADAPTED
    known: Any = {"mode": "diffusion", "strategy": "verified"} if mode == "verified" else {"mode": mode}
    config: Any = replace(BASE, stop_token_ids=(), **known)
    tight = pb.EngineConfig(max_rows=6, kv_tokens=96, max_context=64, prefill_chunk=8, block_size=D)
    with pb.Engine(model, pb.EngineConfig(max_rows=1, max_context=64)) as engine:
        alone = [ask(engine, ids, config, prompt_logprobs=True) for ids in ROWS]
        expected = [handle.result() for handle in alone]
    with pb.Engine(model, tight) as engine:
        handles = [ask(engine, ids, config, prompt_logprobs=True, stream=True) for ids in ROWS]
        for handle, other, tokens in zip(handles, alone, expected, strict=True):
            updates = list(handle.updates())
            assert handle.tokens == tokens
            assert [told for update in updates for told in update.logprobs] == handle.logprobs
            assert all(len(update.tokens) == len(update.logprobs) for update in updates)
            for mine, reference in ((handle.logprobs, other.logprobs), (handle.prompt_logprobs, other.prompt_logprobs)):
                assert len(mine) == len(reference)
                for a, b in zip(mine, reference, strict=True):
                    assert (a is None) == (b is None)
                    if a is not None and b is not None:
                        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
        assert engine.preemptions
        assert empty(engine)


def test_refusals() -> None:
    with pb.Engine(MODEL, SMALL) as engine:
        with pytest.raises(ValueError, match=r"logprobs=21 is out of range; use a number in \[0, 20\]"):
            engine.submit(pb.Request(ROWS[0], BASE, logprobs=21))
        with pytest.raises(ValueError, match="prompt_logprobs=True needs"):
            engine.submit(pb.Request(ROWS[0], BASE, prompt_logprobs=True))
        handle = ask(engine, ROWS[0], BASE, logprobs=0)
        handle.result()
        assert all(told.top == () for told in handle.logprobs)
