"""The engine: the reference loop's tokens whatever runs beside, memory that comes back, errors that stay put."""

import itertools
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_model
from hypothesis import given, settings
from hypothesis import strategies as st

import parablock as pb
from parablock.engine.pages import PagePool

D, S, MASK, STOP = 8, 4, 63, 62
BASE = pb.DecodeConfig(sub_block_size=S, max_new_tokens=24, threshold=0.5, stop_token_ids=(7, 21), seed=5)
SMALL = pb.EngineConfig(max_rows=3, max_context=64, prefill_chunk=16)


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(0, 60, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


ROWS = [prompt(40 + n, n) for n in (5, 8, 16, 1, 23, 12, 40, 24, 9)]


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


@pytest.fixture
def engine(model: Any) -> Iterator[pb.Engine]:
    with pb.Engine(model, SMALL) as engine:
        yield engine


def empty(engine: pb.Engine) -> bool:
    """No row, page or request is left behind."""
    left = engine.stats
    assert not engine.rows.active_R.any()
    assert not engine.memory.table_RP.any()
    assert not any(engine._handles)
    return left["waiting"] == left["running"] == left["pages_held"] == 0


# --- the same tokens ---


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
ALIKE = [prompt(1, 24) + prompt(i, n) for i, n in ((3, 0), (4, 3), (5, 8))]
ALIKE += [prompt(i, n) for i, n in enumerate((2, 8, 9, 17, 31))]
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
        running = []
        for which, length, mode, temperature, pause, patience in requests:
            decode = replace(BASE, mode=mode, max_new_tokens=length, temperature=temperature)
            running.append((engine.submit(pb.Request(ALIKE[which], decode)), which, decode, patience, engine.steps))
            for _ in range(pause):
                engine.step()
                for handle, *_, patience, began in running:
                    if patience is not None and engine.steps - began >= patience:
                        handle.cancel()
        while engine.step():
            pass
        for handle, which, decode, patience, _ in running:
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
    max_k: int, *, scale: float, enable_gqa: bool, seqused_k: torch.Tensor, block_table: torch.Tensor,
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


# --- no waste ---


def queries(engine: pb.Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each step's forward runs, as the steps happen."""
    ran: list[int] = []
    inner = engine.runner._forward
    monkeypatch.setattr(engine.runner, "_forward", lambda *a: (ran.append(a[0].shape[1]), inner(*a))[1])
    return ran


def test_a_finished_row_costs_nothing_more(model: Any, engine: pb.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = replace(BASE, sub_block_cache=False, stop_token_ids=())
    ran = queries(engine, monkeypatch)
    engine.generate([ROWS[0], ROWS[3]], whole)
    together = sum(ran)
    ran.clear()
    for row in (ROWS[0], ROWS[3]):
        engine.pool.clear()
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
            before = engine.rows.forwards_R.copy()
            engine.step()
            assert long.tokens == []
            assert (engine.rows.forwards_R - before).sum() == 1  # the short one moves on in every step
        assert long.result() == pb.generate(model, prompt(3, 200), BASE).tokens[0]
        assert short.result() == pb.generate(model, ROWS[0], replace(BASE, threshold=1.0, stop_token_ids=())).tokens[0]


def test_short_prompts_are_prefilled_together(model: Any) -> None:
    with pb.Engine(model, pb.EngineConfig(prefill_chunk=64)) as engine:
        for i in range(8):
            engine.submit(pb.Request(prompt(i, D + 1), BASE))
        engine.step()
        assert (engine.rows.start_R[:8] == D).all()


# --- prefix cache ---


def test_a_known_beginning_is_not_run_again(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = prompt(2, 3 * D)
    with pb.Engine(model) as engine:
        first = engine.submit(pb.Request([*shared, 1, 2], BASE))
        first.result()
        ran = queries(engine, monkeypatch)
        for tail, mode, cached in (
            ([3, 4], "diffusion", 3 * D),
            ([], "diffusion", 2 * D),  # its last block predicts the answer's first token
            ([5, 6], "autoregressive", 0),  # other K/V
            ([7], "autoregressive", 3 * D),
        ):
            ran.clear()
            config = replace(BASE, mode=mode)
            handle = engine.submit(pb.Request([*shared, *tail], config))
            assert handle.result() == pb.generate(model, [*shared, *tail], config).tokens[0]
            assert handle.cached_tokens == cached
            assert (ran[0] > D) == (cached == 0)


def test_an_answer_is_a_known_beginning_of_the_next_turn(model: Any) -> None:
    config = replace(BASE, stop_token_ids=(), max_new_tokens=27)  # with the prompt: four blocks
    with pb.Engine(model) as engine:
        first = engine.submit(pb.Request(ROWS[0], config))
        turn = [*ROWS[0], *first.result(), 9, 9]
        second = engine.submit(pb.Request(turn, config))
        assert second.result() == pb.generate(model, turn, config).tokens[0]
        assert second.cached_tokens == 3 * D  # the last block was never committed


def test_memory_for_reuse_is_given_up_when_it_is_needed(model: Any) -> None:
    with pb.Engine(model, pb.EngineConfig(max_rows=2, kv_tokens=10 * D, max_context=64)) as engine:
        for i in range(12):
            row = prompt(i, 20)
            assert engine.generate(row, BASE).tokens == pb.generate(model, row, BASE).tokens
            left = engine.stats
            assert left["pages_held"] == 0
            assert left["pages_cached"] <= 10
        engine.generate(prompt(11, 20), BASE)
        again = engine.submit(pb.Request(prompt(11, 20), BASE))
        again.result()
        assert again.cached_tokens == 2 * D
    with pb.Engine(model, pb.EngineConfig(prefix_cache=False)) as engine:
        engine.generate(ROWS, BASE)
        assert engine.stats["pages_cached"] == 0


@given(st.data())
def test_pages_are_shared_only_by_equal_beginnings(data: st.DataObject) -> None:
    pool = PagePool(12, 2)
    content: dict[int, tuple[int, ...]] = {}  # page -> all tokens up to its end
    holders: list[tuple[list[int], list[int]]] = []
    for _ in range(data.draw(st.integers(1, 40))):
        if holders and data.draw(st.booleans()):
            tokens, pages = holders.pop(data.draw(st.integers(0, len(holders) - 1)))
            whole = data.draw(st.integers(0, len(tokens) // 2))
            pool.register(tokens, pages[:whole], 0)
            pool.release(pages)
            continue
        tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=8))
        matched = pool.match(tokens, (len(tokens) - 1) // 2, 0)
        for i, page in enumerate(matched):
            assert content[page] == tuple(tokens[: 2 * i + 2])
        needed = -(-len(tokens) // 2) + data.draw(st.integers(0, 3))
        held = pool.held
        pages = pool.reserve(matched, needed)
        if pages is None:
            assert pool.held == held
            others = {p for _, held_pages in holders for p in held_pages}
            assert needed - len(matched) > 12 - len(others | set(matched))
            continue
        assert len(set(pages)) == len(pages) == needed
        assert 0 not in pages
        assert pages[: len(matched)] == matched
        for page in pages[len(matched) :]:
            assert not any(page in other for _, other in holders)
            content.pop(page, None)
        for i in range(len(matched), len(tokens) // 2):
            content[pages[i]] = tuple(tokens[: 2 * i + 2])
        holders.append((tokens, pages))
    for _, pages in holders:
        pool.release(pages)
    assert pool.held == 0


# --- callers ---


def test_updates_add_up_to_the_answer(model: Any, engine: pb.Engine) -> None:
    for mode in ("diffusion", "autoregressive"):
        config = replace(BASE, mode=mode)
        handles = [engine.submit(pb.Request(row, config, stream=True)) for row in ROWS[:6]]
        for handle, row in zip(handles, ROWS[:6], strict=True):
            tokens: list[int] = []
            seen: set[int] = set()
            for update in handle.updates():
                tokens += update.tokens
                assert tokens == handle.tokens[: len(tokens)]
                assert not (update.revealed & update.masked).any()
                for column in update.revealed.nonzero()[0]:
                    position = update.start + int(column)
                    assert position not in seen
                    seen.add(position)
                    assert 0 < update.confidence[column] <= 1
                    settled = position - len(row)
                    if settled < len(tokens):
                        assert update.ids[column] == tokens[settled]
                assert update.done == handle.done or not update.done
            assert update.done
            assert tokens == handle.result() == pb.generate(model, row, config).tokens[0]
            assert handle.first_token is not None
            assert handle.seconds is not None
            assert handle.first_token <= handle.seconds
            assert handle.finish_reason == ("stop" if tokens[-1] in (7, 21) else "length")


def test_a_thread_runs_the_steps_for_many_callers(model: Any) -> None:
    expected = pb.generate(model, ROWS, BASE).tokens
    got: list[Any] = [None] * 24
    with pb.Engine(model, SMALL) as engine:
        engine.start()

        def call(i: int) -> None:
            if i % 3 == 2:
                streamed = engine.submit(pb.Request(ROWS[i % 9], BASE, stream=True))
                got[i] = [t for update in streamed.updates(timeout=60) for t in update.tokens]
            else:
                got[i] = engine.submit(pb.Request(ROWS[i % 9], BASE)).result(timeout=60)

        callers = [threading.Thread(target=call, args=(i,)) for i in range(len(got))]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert engine.generate(ROWS, BASE).tokens == expected
    assert got == [expected[i % 9] for i in range(len(got))]


def test_closing_ends_what_runs(model: Any) -> None:
    for threaded in (False, True):
        engine = pb.Engine(model, SMALL)
        if threaded:
            engine.start()
        handles = [engine.submit(pb.Request(row, replace(BASE, stop_token_ids=()))) for row in ROWS]
        if not threaded:
            engine.step()
        engine.close()
        engine.close()
        for handle in handles:
            assert handle.done
        with pytest.raises(RuntimeError, match="the engine was closed"):
            handles[-1].result()
        with pytest.raises(ValueError, match="the engine is closed"):
            engine.submit(pb.Request(ROWS[0]))
        assert empty(engine)


def test_cancelling(model: Any, engine: pb.Engine) -> None:
    config = replace(BASE, threshold=1.0, stop_token_ids=())
    handles = [engine.submit(pb.Request(row, config)) for row in ROWS[:5]]
    handles[4].cancel()  # before it was even looked at
    for _ in range(6):
        engine.step()
    handles[0].cancel()  # running
    handles[3].cancel()  # waiting
    handles[3].cancel()
    engine.step()
    assert [h.status for h in handles] == ["cancelled", "running", "running", "cancelled", "cancelled"]
    expected = pb.generate(model, ROWS[:5], config).tokens
    assert handles[0].result() == expected[0][: len(handles[0].tokens)]
    assert handles[1].result() == expected[1]
    handles[1].cancel()  # has ended: stays as it is
    assert handles[1].status == "finished"
    assert handles[2].result() == expected[2]
    assert empty(engine)


def test_first_come_first_served(model: Any) -> None:
    with pb.Engine(model, pb.EngineConfig(max_rows=4, kv_tokens=8 * D, max_context=64)) as engine:
        small = replace(BASE, max_new_tokens=8, stop_token_ids=())
        large = replace(BASE, max_new_tokens=50, stop_token_ids=())
        order = [engine.submit(pb.Request(prompt(i, 5), c)) for i, c in enumerate((small, large, small, small))]
        engine.step()
        # the second needs seven of eight pages: it waits, and nobody overtakes it
        assert [h.status for h in order] == ["running", "waiting", "waiting", "waiting"]
        order[1].result()
        assert [h.done for h in order][:2] == [True, True]
        assert [order[i].result() for i in (2, 3)] == [
            pb.generate(model, prompt(i, 5), small).tokens[0] for i in (2, 3)
        ]


def test_ten_thousand_events_leave_nothing_behind(model: Any) -> None:
    rng = np.random.default_rng(0)
    alive: list[Any] = []
    finished = cancelled = 0
    with pb.Engine(model, pb.EngineConfig(max_rows=4, kv_tokens=24 * D, max_context=48)) as engine:
        for _ in range(10_000):
            event = rng.random()
            if event < 0.35 and len(alive) < 40:
                config = replace(
                    BASE, max_new_tokens=int(rng.integers(1, 12)), mode=rng.choice(["diffusion", "autoregressive"])
                )  # fmt: skip
                alive.append(engine.submit(pb.Request(prompt(int(rng.integers(6)), int(rng.integers(1, 30))), config)))
            elif event < 0.45 and alive:
                alive.pop(int(rng.integers(len(alive)))).cancel()
                cancelled += 1
            else:
                engine.step()
            finished += sum(h.done for h in alive)
            alive = [h for h in alive if not h.done]
        for handle in alive:
            handle.cancel()
        engine.step()
        assert finished > 500
        assert cancelled > 500
        assert empty(engine)
        engine.pool.clear()
        assert engine.pool.cached == 0
        assert (engine.pool.holders[1:] == 0).all()
        assert engine.generate(ROWS[:3], BASE).tokens == pb.generate(model, ROWS[:3], BASE).tokens


# --- errors ---


def test_a_failing_step_fails_its_requests_alone(
    model: Any, engine: pb.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(BASE, stop_token_ids=())
    handles = [engine.submit(pb.Request(row, config)) for row in ROWS[:5]]
    engine.step()
    forward = engine.runner._forward

    def broken(*args: Any) -> Any:
        monkeypatch.setattr(engine.runner, "_forward", forward)
        raise torch.OutOfMemoryError("no memory for this step")

    monkeypatch.setattr(engine.runner, "_forward", broken)
    engine.step()
    assert [h.status for h in handles] == ["failed"] * 3 + ["waiting"] * 2
    with pytest.raises(RuntimeError, match="no memory for this step"):
        handles[0].result()
    assert [h.result() for h in handles[3:]] == pb.generate(model, ROWS[3:5], config).tokens
    assert empty(engine)


def test_an_interrupt_leaves_the_engine_usable(model: Any, engine: pb.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = engine.runner._forward
    calls = []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*args)

    monkeypatch.setattr(engine.runner, "_forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(ROWS, BASE)
    assert engine.generate(ROWS, BASE).tokens == pb.generate(model, ROWS, BASE).tokens
    assert empty(engine)


@pytest.mark.parametrize(
    ("row", "config", "message"),
    [
        ([], BASE, "prompt 0 is empty"),
        ([64], BASE, "outside the vocabulary of 64"),
        (prompt(0, 60), BASE, "max_new_tokens=24 exceed the engine's context of 64"),
        ([1], replace(BASE, block_size=16), "block_size=16, but this engine runs blocks of 8"),
        ([1], replace(BASE, sub_block_size=3), "sub_block_size=3"),
    ],
)
def test_wrong_requests(engine: pb.Engine, row: list[int], config: pb.DecodeConfig, message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=message):
            engine.submit(pb.Request(row, config))
    assert empty(engine)


def test_wrong_engines(model: Any) -> None:
    for settings_, message in (
        ({"max_rows": 0}, "max_rows=0"),
        ({"max_context": 1000}, "max_context=1000 exceeds the model's context of 256"),
        ({"cuda_graphs": True}, "cuda_graphs=True needs a CUDA device"),
    ):
        with pytest.raises(ValueError, match=message):
            pb.Engine(model, pb.EngineConfig(**settings_))
    assert model.config._attn_implementation == "sdpa"
    with pb.Engine(model, pb.EngineConfig(kv_tokens=16, max_rows=1)) as engine:
        with pytest.raises(ValueError, match="need more than the K/V memory of 16 tokens"):
            engine.submit(pb.Request(ROWS[0], BASE))
        with pb.Engine(small_model()) as other, pytest.raises(ValueError, match="belongs to another engine"):
            engine.cancel(other.submit(pb.Request(ROWS[0], BASE)))
        quiet = engine.submit(pb.Request([1], replace(BASE, max_new_tokens=2)))
        with pytest.raises(ValueError, match="stream=False"):
            next(quiet.updates())
        with pytest.raises(TimeoutError, match="still waiting after 0 seconds"):
            quiet.result(timeout=0)
        # without max_new_tokens: what the memory leaves
        assert engine.submit(pb.Request([1], replace(BASE, max_new_tokens=None))).config.max_new_tokens == 15
