"""The engine: the tokens of `pb.generate` whatever runs beside, and no step without need."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import ALIKE, BASE, ROWS, SMALL, D, S, empty, prompt, queries
from conftest import small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import run_arriving

import parablock as pb


@pytest.fixture
def engine(model: Any) -> Iterator[pb.Engine]:
    with pb.Engine(model, SMALL) as engine:
        yield engine


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
@pytest.mark.parametrize("strategy", ["threshold", "factor", "fixed"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("sub_block_cache", [True, False])
def test_the_tokens_of_the_reference(
    model: Any, mode: Any, strategy: Any, temperature: float, sub_block_cache: bool
) -> None:
    config = replace(
        BASE, mode=mode, strategy=strategy, temperature=temperature, sub_block_cache=sub_block_cache, tokens_per_step=2
    )
    expected = pb.generate(model, ROWS, config)
    assert len({len(t) for t in expected.tokens}) > 1  # rows end at different times
    for chunk, rows in ((8, 1), (16, 3), (256, 16)):
        with pb.Engine(model, pb.EngineConfig(prefill_chunk=chunk, max_rows=rows)) as engine:
            for _ in range(2):  # the second time their beginnings are known
                out = engine.generate(ROWS, config)
                assert out.tokens == expected.tokens
                assert out.decode_forwards == expected.decode_forwards
            assert engine.stats["pages_cached"] > 0
            assert empty(engine)


def test_golden_generations(golden_model: Any, golden_generations: list[dict[str, Any]]) -> None:
    by_block: dict[int, list[dict[str, Any]]] = {}
    for g in golden_generations:
        by_block.setdefault(g["block_size"], []).append(g)
    for block_size, generations in by_block.items():
        with pb.Engine(golden_model, pb.EngineConfig(block_size=block_size)) as engine:
            handles = [
                engine.submit(
                    pb.Request(
                        g["prompt"],
                        pb.DecodeConfig(
                            max_new_tokens=len(g["output"]),
                            **{n: g[n] for n in ("threshold", "sub_block_size", "sub_block_cache")},
                        ),
                    )
                )
                for g in generations
            ]  # all of them together, each with its own settings
            assert [h.result() for h in handles] == [g["output"] for g in generations]


def test_requests_keep_their_own_settings(model: Any) -> None:
    configs = [
        replace(BASE, **change)
        for change in (
            {}, {"mode": "autoregressive"}, {"sub_block_size": 2}, {"sub_block_size": 8}, {"temperature": 1.0},
            {"temperature": 0.5, "top_p": 0.7}, {"temperature": 1.5, "top_k": 3}, {"strategy": "fixed"},
            {"strategy": "factor", "factor": 2.0}, {"threshold": 0.2}, {"max_new_tokens": 3}, {"stop_token_ids": ()},
            {"stop_token_ids": (1, 2, 3, 4, 5)}, {"mode": "autoregressive", "temperature": 0.7, "top_k": 5},
            {"seed": 99, "temperature": 1.0}, {"sub_block_cache": False},
        )
    ]  # fmt: skip
    with pb.Engine(model) as engine:
        handles = [engine.submit(pb.Request(ROWS[i % len(ROWS)], c)) for i, c in enumerate(configs)]
        for i, (handle, config) in enumerate(zip(handles, configs, strict=True)):
            assert handle.result() == pb.generate(model, ROWS[i % len(ROWS)], config).tokens[0], config


REQUESTS = st.tuples(
    st.integers(0, 7),  # which prompt; some begin alike
    st.integers(1, 30),  # max_new_tokens
    st.sampled_from(["diffusion", "autoregressive"]),
    st.sampled_from([0.0, 0.9]),
    st.integers(0, 12),  # steps until the next one is submitted
    st.one_of(st.none(), st.integers(0, 20)),  # cancelled after so many steps
)
known: dict[Any, list[int]] = {}


@settings(max_examples=40)
@given(st.lists(REQUESTS, min_size=1, max_size=12), st.sampled_from([(1, 64), (3, 96), (4, 400)]), st.booleans())
def test_any_schedule_gives_the_same_tokens(requests: list[Any], size: tuple[int, int], prefix_cache: bool) -> None:
    model = known.setdefault("model", small_model())  # type: ignore[arg-type]
    rows, kv_tokens = size
    config = pb.EngineConfig(
        max_rows=rows, kv_tokens=kv_tokens, max_context=64, prefill_chunk=16, prefix_cache=prefix_cache
    )
    with pb.Engine(model, config) as engine:
        arrivals = [
            (pb.Request(ALIKE[which], replace(BASE, mode=mode, max_new_tokens=length, temperature=t)), pause, patience)
            for which, length, mode, t, pause, patience in requests
        ]
        handles = run_arriving(engine, arrivals)
        for handle, (which, *_, patience), (request, *_) in zip(handles, requests, arrivals, strict=True):
            decode = request.config
            key = (which, decode)
            if key not in known:
                known[key] = pb.generate(model, ALIKE[which], decode).tokens[0]
            if handle.status == "cancelled":
                assert patience is not None
                assert handle.tokens == known[key][: len(handle.tokens)]
            else:
                assert handle.result() == known[key]
        assert empty(engine)


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
def test_shapes_rounded_to_powers_of_two_change_nothing(model: Any, mode: Any) -> None:
    config = replace(BASE, mode=mode)
    rows = [*ROWS, prompt(1, 48)]
    expected = pb.generate(model, rows, config).tokens
    with pb.Engine(model, pb.EngineConfig(max_rows=5, max_context=72)) as engine:  # nine pages, no power of two
        # as for captured graphs, which need CUDA
        engine.config = replace(engine.config, cuda_graphs=True)
        assert engine.generate(rows, config).tokens == expected
        assert empty(engine)


def plain_varlen_attn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: None, max_q: int,
    max_k: int, *, scale: float, enable_gqa: bool, seqused_k: torch.Tensor, block_table: torch.Tensor, num_splits: int,
) -> torch.Tensor:  # fmt: skip
    """What torch documents of `varlen_attn` with a block table, row by row, for any device."""
    assert enable_gqa == (query.shape[1] != key.shape[2])
    assert cu_seq_q.dtype == seqused_k.dtype == block_table.dtype == torch.int32
    out = torch.empty_like(query)
    for row, (begin, end) in enumerate(itertools.pairwise(cu_seq_q.tolist())):
        assert end - begin <= max_q
        assert seqused_k[row] <= max_k
        k, v = (x[block_table[row]].flatten(0, 1)[: seqused_k[row]].transpose(0, 1) for x in (key, value))
        q = query[begin:end].transpose(0, 1)
        mine = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale, enable_gqa=True)
        out[begin:end] = mine[0].transpose(0, 1)
    return out


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
def test_attention_that_reads_pages_in_place(model: Any, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen_attn)  # needs CUDA
    config = replace(BASE, mode=mode)
    with pb.Engine(model, pb.EngineConfig(max_rows=5)) as engine:
        assert not engine.runner._paged
        engine.runner._paged = True
        assert engine.generate(ROWS, config).tokens == pb.generate(model, ROWS, config).tokens


@pytest.mark.skipif(" " in torch.__file__, reason="torch.compile builds nothing where torch's own path has a space")
def test_compiled_engines_give_the_same_tokens_each_on_its_own_model(model: Any) -> None:
    other = small_model(seed=1)
    config = pb.EngineConfig(compile=True)
    with pb.Engine(model, config) as first, pb.Engine(other, config) as second:
        for mode in ("diffusion", "autoregressive"):
            decode = replace(BASE, mode=mode)
            for _ in range(2):
                assert first.generate(ROWS, decode).tokens == pb.generate(model, ROWS, decode).tokens
                assert second.generate(ROWS, decode).tokens == pb.generate(other, ROWS, decode).tokens


def test_eager_attention_and_the_model_beside_the_engine() -> None:
    model = small_model()
    before = pb.generate(model, ROWS, BASE).tokens
    model.set_attn_implementation("eager")
    with pb.Engine(model) as engine:
        assert engine.generate(ROWS, BASE).tokens == before
        assert pb.generate(model, ROWS, BASE).tokens == before  # the model still serves others
        hf = model.generate(torch.tensor([ROWS[0]]), max_new_tokens=5, do_sample=False, pad_token_id=0)
        with pb.Engine(model) as second:  # one model, two engines
            assert second.generate(ROWS, BASE).tokens == before
        assert engine.generate(ROWS, BASE).tokens == before
    assert model.config._attn_implementation == "eager"
    assert torch.equal(hf, model.generate(torch.tensor([ROWS[0]]), max_new_tokens=5, do_sample=False, pad_token_id=0))


def test_a_finished_row_costs_nothing_more(model: Any, engine: pb.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = replace(BASE, sub_block_cache=False, stop_token_ids=())
    ran = queries(engine, monkeypatch)
    engine.generate([ROWS[0], ROWS[3]], whole)
    together = sum(ran)
    ran.clear()
    for row in (ROWS[0], ROWS[3]):
        engine.batch.pool.clear()
        engine.generate(row, whole)
    assert together == sum(ran)
    assert set(ran) == {D}


def test_steps_are_as_many_as_the_reference_takes(model: Any, engine: pb.Engine) -> None:
    for row in ROWS:
        if len(row) + 24 <= SMALL.prefill_chunk:  # one chunk, as the reference prefills
            expected = pb.generate(model, row, BASE)
            assert engine.generate(row, BASE).forwards == expected.forwards  # no commit of the last block among them


def test_a_narrow_step_runs_a_sub_block_beside_whole_blocks(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(BASE, threshold=1.0, stop_token_ids=())
    with pb.Engine(model, pb.EngineConfig(max_rows=4)) as engine:
        ran = queries(engine, monkeypatch)
        engine.generate(ROWS[:4], config)
    assert any(n % D for n in ran)
    assert any(n > D and n % D == S for n in ran)


def test_a_long_prompt_does_not_stall_the_others(model: Any) -> None:
    with pb.Engine(model, pb.EngineConfig(max_rows=2, prefill_chunk=16)) as engine:
        short = engine.submit(pb.Request(ROWS[0], replace(BASE, threshold=1.0, stop_token_ids=())))
        engine.step()
        long = engine.submit(pb.Request(prompt(3, 200), BASE))
        for _ in range(12):
            before = engine.batch.rows.forwards_R.copy()
            engine.step()
            assert long.tokens == []
            assert (engine.batch.rows.forwards_R - before).sum() == 1  # the short one moves on in every step
        assert long.result() == pb.generate(model, prompt(3, 200), BASE).tokens[0]
        assert short.result() == pb.generate(model, ROWS[0], replace(BASE, threshold=1.0, stop_token_ids=())).tokens[0]


def test_short_prompts_are_prefilled_together(model: Any) -> None:
    with pb.Engine(model, pb.EngineConfig(prefill_chunk=64)) as engine:
        for i in range(8):
            engine.submit(pb.Request(prompt(i, D + 1), BASE))
        engine.step()
        assert (engine.batch.rows.start_R[:8] == D).all()
