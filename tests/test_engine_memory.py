"""The engine's K/V memory: shared beginnings, pages on demand, rows that give theirs back and go on."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import BASE, ENDLESS, MODES, ROWS, SMALL, D, empty, prompt, queries
from conftest import small_model
from hypothesis import given
from hypothesis import strategies as st

import parablock as pb
from parablock.engine.attention import _runners
from parablock.engine.pages import PagePool


@pytest.fixture
def engine(model: Any) -> Iterator[pb.Engine]:
    with pb.Engine(model, SMALL) as engine:
        yield engine


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
        engine.batch.pool.clear()
        assert engine.batch.pool.cached == 0
        assert (engine.batch.pool.holders[1:] == 0).all()
        assert engine.generate(ROWS[:3], BASE).tokens == pb.generate(model, ROWS[:3], BASE).tokens


# --- pages on demand ---


def test_first_come_first_served(model: Any) -> None:
    """Eight pages: a long answer takes its pages as it grows, and what waits for one waits in order."""
    with pb.Engine(model, pb.EngineConfig(max_rows=2, kv_tokens=8 * D, max_context=64)) as engine:
        handles = [
            engine.submit(pb.Request(prompt(i, 5), replace(ENDLESS, max_new_tokens=n)))
            for i, n in enumerate((8, 50, 8, 8))
        ]
        engine.step()
        assert [h.status for h in handles] == ["running", "running", "waiting", "waiting"]
        assert engine.stats["pages_held"] == 2
        ended: list[int] = []
        while engine.step():
            ended += [i for i, h in enumerate(handles) if h.done and i not in ended]
        assert ended == [0, 2, 3, 1]
        for i, n in enumerate((8, 50, 8, 8)):
            config = replace(ENDLESS, max_new_tokens=n)
            assert handles[i].result() == pb.generate(model, prompt(i, 5), config).tokens[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_that_gave_its_pages_back_goes_on_as_if_nothing_had_happened(
    model: Any, mode: Any, cache: bool, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(ENDLESS, mode=mode, max_new_tokens=40, temperature=temperature)
    rows = [prompt(i, n) for i, n in enumerate((5, 8, 16, 17))]
    alone = pb.generate(model, rows, config)
    size = pb.EngineConfig(max_rows=4, kv_tokens=9 * D, max_context=64, prefix_cache=cache)
    with pb.Engine(model, size) as engine:
        put_back: list[int] = []
        write = engine.runner.kv.write
        monkeypatch.setattr(engine.runner.kv, "write", lambda *a: (put_back.append(a[0]), write(*a))[1])
        handles = [engine.submit(pb.Request(r, config, stream=True, sample=i)) for i, r in enumerate(rows)]
        ended: list[int] = []
        while engine.step():
            ended += [i for i, h in enumerate(handles) if h.done and i not in ended]
        assert engine.preemptions > 1
        assert bool(put_back) == (mode == "diffusion")  # in the middle of a block
        assert ended == [0, 1, 2, 3]  # the oldest never waits for a younger one
        for i, handle in enumerate(handles):
            updates = list(handle.updates())
            assert [t for update in updates for t in update.tokens] == handle.result() == alone.tokens[i]
            assert handle.forwards == alone.decode_forwards[i]  # no step was made twice
            counts = [update.forwards for update in updates]
            assert counts == sorted(set(counts))
        assert empty(engine)


def test_a_paused_request_can_be_cancelled(model: Any) -> None:
    config = replace(ENDLESS, max_new_tokens=40)
    with pb.Engine(model, pb.EngineConfig(max_rows=3, kv_tokens=8 * D, max_context=64)) as engine:
        handles = [engine.submit(pb.Request(prompt(i, 5), config)) for i in range(3)]
        while not engine.preemptions:
            engine.step()
        paused = next(h for h in handles if h.status == "waiting")
        assert paused is handles[2]  # the youngest
        paused.cancel()
        engine.step()
        assert paused.status == "cancelled"
        alone = pb.generate(model, [prompt(i, 5) for i in range(3)], config).tokens
        assert paused.tokens == alone[2][: len(paused.tokens)] != []
        assert [h.result() for h in handles[:2]] == alone[:2]
        assert empty(engine)


def test_short_answers_do_not_wait_for_memory_that_long_ones_could_need(model: Any) -> None:
    """Memory for two answers of full length serves eight short ones at once, whatever their limit."""
    config = replace(BASE, max_new_tokens=None)
    stop = pb.generate(model, prompt(1, 5), replace(ENDLESS, max_new_tokens=12)).tokens[0][-1]
    with pb.Engine(model, pb.EngineConfig(max_rows=8, kv_tokens=2 * 256, prefix_cache=False)) as engine:
        request = pb.Request(prompt(1, 5), replace(config, stop_token_ids=(stop,)))
        handles = [engine.submit(request) for _ in range(8)]
        engine.step()
        assert engine.stats["running"] == 8
        assert len({tuple(h.result()) for h in handles}) == 1
        assert engine.preemptions == 0


def test_nobody_starves(model: Any) -> None:
    """A long answer ends although short ones keep coming that together need more than the memory."""
    with pb.Engine(model, pb.EngineConfig(max_rows=4, kv_tokens=10 * D, max_context=64)) as engine:
        short = replace(ENDLESS, max_new_tokens=20)
        crowd = [engine.submit(pb.Request(prompt(i, 20), short)) for i in range(3)]
        long = engine.submit(pb.Request(prompt(9, 10), replace(ENDLESS, max_new_tokens=54)))
        for i in range(400):
            engine.step()
            crowd = [h for h in crowd if not h.done]
            if len(crowd) < 6:
                crowd.append(engine.submit(pb.Request(prompt(i % 7, 20), short)))
            if long.done:
                break
        assert engine.preemptions > 0
        assert long.status == "finished"
        assert long.tokens == pb.generate(model, prompt(9, 10), replace(ENDLESS, max_new_tokens=54)).tokens[0]


def test_kv_of_a_layer_lies_where_the_layer_runs() -> None:
    """A model over two devices, the second a stand-in without data: pages and inputs are where they are needed."""
    seen: set[torch.device] = set()

    class Elsewhere(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, runner: torch.Tensor, **kwargs: Any) -> Any:
            q, k, v = (torch.empty(1, heads, hidden_states.shape[1], 8, device="meta") for heads in (4, 2, 2))
            seen.add(_runners[int(runner)].attend(q, k, v, 1.0, None, layer=1).device)
            return torch.zeros_like(hidden_states), None

    split = small_model()
    split.model.layers[1].self_attn = Elsewhere()
    with pb.Engine(split, pb.EngineConfig(max_rows=3, kv_tokens=20 * D)) as engine:
        devices = [{p.pages.device.type for p in layer} for layer in engine.runner.kv.layers]
        assert devices == [{"cpu"}, {"meta"}]
        engine.generate(ROWS[:4], replace(BASE, max_new_tokens=10))
    assert {device.type for device in seen} == {"meta"}


def test_layers_that_share_heads_in_different_ways_are_refused() -> None:
    other = small_model()
    attention = other.model.layers[1].self_attn
    attention.k_proj, attention.v_proj = torch.nn.Linear(32, 8), torch.nn.Linear(32, 8)  # one K/V head instead of two
    attention.num_key_value_groups = 4
    with pytest.raises(ValueError, match="2 heads share one K/V head in some layers and 4 in others"):
        pb.Engine(other)
    assert other.config._attn_implementation == "sdpa"
    assert pb.generate(other, ROWS, BASE).tokens
