"""What decoding does on CUDA alone, rehearsed on a stand-in: devices, waits, captured graphs, attention over pages."""

import inspect
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import BASE, ENDLESS, MODES, D, empty, prompt
from stand_in_cuda import FIRST, SECOND, StandIn, moved, spread, turned_on
from test_windows import capped, windowed
from torch import Tensor

import parablock as pb
from parablock.bench.load import run_load
from parablock.engine import runner
from parablock.engine.admission import kv_pages
from parablock.engine.graphs import Graphs
from parablock.engine.paged import paged_attention, paged_attention_works

GRAPHS = pb.EngineConfig(max_rows=3, max_context=72, prefix_cache=False, cuda_graphs=True)  # 9 pages: no power of two
FEW = [prompt(40, 5), prompt(41, 16), prompt(42, 23), prompt(43, 1)]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with turned_on(monkeypatch) as devices:
        yield devices


@pytest.fixture
def there(model: Any, stand_in: StandIn) -> Any:
    return moved(model)


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: None, max_q: int, max_k: int, *,
    scale: float, enable_gqa: bool, seqused_k: Tensor, block_table: Tensor, num_splits: int,
) -> Tensor:  # fmt: skip
    """What torch documents of it, and what its kernels refuse, for rows of equal width on any device."""
    rows, (_, page, kv_heads, d) = len(block_table), key.shape
    assert cu_seq_q.dtype == seqused_k.dtype == block_table.dtype == torch.int32
    assert all(x.is_contiguous() for x in (query, cu_seq_q, seqused_k, block_table))
    assert key.stride(-1) == value.stride(-1) == 1
    assert (cu_seq_q.shape, seqused_k.shape) == ((rows + 1,), (rows,))
    assert query.shape == (rows * max_q, query.shape[1], d)
    assert max_k == block_table.shape[1] * page
    assert enable_gqa == (query.shape[1] != kv_heads)
    assert num_splits == 1
    k, v = (x.index_select(0, block_table.flatten()).view(rows, max_k, kv_heads, -1) for x in (key, value))
    share = query.shape[1] // kv_heads
    q, k, v = (
        x.transpose(1, 2) for x in (query.view(rows, max_q, -1, d), *(x.repeat_interleave(share, 2) for x in (k, v)))
    )
    hidden = torch.arange(max_k, device=query.device) >= seqused_k[:, None]
    weights = (q @ k.mT * scale).masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(query.shape)


@pytest.fixture
def over_pages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """`varlen_attn` in torch's place. The widths that attended, and whether over the pages where they lie."""
    seen: list[tuple[int, bool]] = []
    attend = runner.attend

    def watched(query: Tensor, keys: Any, values: Any, group: Any, *more: Any) -> Tensor:
        seen.append((group.shape.width, group.limit_n is not None))
        return attend(query, keys, values, group, *more)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(runner, "attend", watched)
    return seen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_tokens_of_the_host(model: Any, there: Any, stand_in: StandIn, mode: Any, temperature: float) -> None:
    config = replace(BASE, mode=mode, temperature=temperature)
    expected = pb.generate(model, FEW, config).tokens
    stand_in.waits.clear()
    out = pb.generate(there, FEW, config)
    assert out.tokens == expected
    assert stand_in.waits.count("to the host") == out.forwards
    with pb.Engine(there, pb.EngineConfig(max_rows=3)) as engine:
        stand_in.waits.clear()
        assert engine.generate(FEW, config).tokens == expected
        assert stand_in.waits == ["to the host"] * engine.steps  # a step waits for the device once


def test_requests_of_many_kinds_in_one_forward(model: Any, there: Any, stand_in: StandIn) -> None:
    """Both modes; greedy beside sampled, cut in different ways; different mask tokens."""
    kinds: list[dict[str, Any]] = [
        {}, {"mode": "autoregressive", "temperature": 0.8, "top_p": 0.7}, {"temperature": 1.5, "top_k": 3},
        {"mode": "autoregressive", "mask_token_id": 60},
    ]  # fmt: skip
    configs = [replace(BASE, **kind) for kind in kinds]
    with pb.Engine(there) as engine:
        stand_in.waits.clear()
        handles = [engine.submit(pb.Request(row, config)) for row, config in zip(FEW, configs, strict=True)]
        results = [handle.result() for handle in handles]
        assert stand_in.waits == ["to the host"] * engine.steps
    assert results == [pb.generate(model, row, c).tokens[0] for row, c in zip(FEW, configs, strict=True)]


@pytest.mark.parametrize("mode", MODES)
def test_a_model_over_two_devices(model: Any, stand_in: StandIn, mode: Any) -> None:
    config = replace(BASE, mode=mode, temperature=0.8)
    expected = pb.generate(model, FEW, config).tokens
    two = spread(model)
    assert pb.generate(two, FEW, config).tokens == expected
    with pb.Engine(two, pb.EngineConfig(max_rows=5, kv_tokens=20 * D)) as engine:
        assert [keys.pages.device for keys, _ in engine.runner.kv.layers] == [FIRST, SECOND]
        assert engine.generate(FEW, config).tokens == expected
        assert empty(engine)
    with pytest.raises(ValueError, match="cuda_graphs=True needs a model on one device, and it is spread over 2"):
        pb.Engine(two, GRAPHS)


@pytest.mark.parametrize("mode", MODES)
def test_captured_graphs(model: Any, there: Any, stand_in: StandIn, mode: Any) -> None:
    """A replay reads what the capture read, so the key covers all that decides the operations."""
    with pb.Engine(there, GRAPHS) as engine:
        captured: list[int] = []
        for temperature in (0.8, 0.0, 0.8):
            config = replace(BASE, mode=mode, temperature=temperature, max_new_tokens=10)
            before = engine.steps
            stand_in.waits.clear()
            assert engine.generate(FEW, config).tokens == pb.generate(model, FEW, config).tokens
            assert stand_in.waits.count("to the host") == engine.steps - before
            captured.append(len(stand_in.graphs))
        assert captured[2] == captured[1] == len(engine.runner._graphs or ())  # all shapes were known
        assert sum(graph.replays for graph in stand_in.graphs) == engine.steps
        assert empty(engine)
    assert len(engine.runner._graphs or ()) == 0


@pytest.mark.parametrize("size", [pb.EngineConfig(max_rows=3), GRAPHS])
def test_verified_drafts(model: Any, there: Any, stand_in: StandIn, size: pb.EngineConfig) -> None:
    config = replace(BASE, mode="diffusion", strategy="verified", sub_block_size=8)
    expected = pb.generate(model, FEW, config).tokens
    assert pb.generate(there, FEW, config).tokens == expected
    with pb.Engine(there, size) as engine:
        stand_in.waits.clear()
        assert engine.generate(FEW, config).tokens == expected
        assert stand_in.waits.count("to the host") == engine.steps
        assert empty(engine)


@pytest.mark.parametrize("make", [lambda: windowed(13), capped, lambda: windowed(3, full_layers=0)])
@pytest.mark.parametrize("mode", MODES)
def test_layers_with_windows(stand_in: StandIn, make: Any, mode: Any) -> None:
    """What a window hides is worked out on the host, and belongs to the key of a graph."""
    model = make()
    there, config = moved(model), replace(BASE, mode=mode, max_new_tokens=10, temperature=0.8)
    expected = pb.generate(model, FEW, config).tokens
    assert pb.generate(there, FEW, config).tokens == expected
    for settings in (GRAPHS, replace(GRAPHS, cuda_graphs=False)):
        with pb.Engine(there, settings) as engine:
            for _ in range(2):
                stand_in.waits.clear()
                before = engine.steps
                assert engine.generate(FEW, config).tokens == expected
                assert stand_in.waits.count("to the host") == engine.steps - before


def test_graphs_and_pages_of_little_room(
    model: Any, there: Any, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parablock.engine.graphs.MOST", 2)
    rows, config = [prompt(i, 5) for i in range(3)], replace(ENDLESS, max_new_tokens=19)
    with pb.Engine(there, replace(GRAPHS, kv_tokens=5 * D)) as engine:
        assert engine.generate(rows, config).tokens == pb.generate(model, rows, config).tokens
        assert engine.preemptions > 0
        assert len(engine.runner._graphs or ()) == 2
        assert len(stand_in.graphs) > 3


def test_what_cannot_be_captured_is_told(stand_in: StandIn) -> None:
    graphs = Graphs(FIRST)
    with pytest.raises(RuntimeError, match=r"cannot be captured .*_local_scalar_dense.*; use cuda_graphs=False"):
        graphs.run("a", torch.ones(3), lambda x: x * x.sum().item())
    assert len(graphs) == 0
    assert graphs.run("b", torch.ones(3), lambda x: x * x.sum()).tolist() == [3.0, 3.0, 3.0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("captured", [False, True])
def test_attention_over_pages(
    model: Any, there: Any, stand_in: StandIn, over_pages: list[tuple[int, bool]], mode: Any, captured: bool
) -> None:
    config = replace(BASE, mode=mode, max_new_tokens=10)
    with pb.Engine(there, replace(GRAPHS, cuda_graphs=captured)) as engine:
        assert engine.runner._paged
        stand_in.waits.clear()
        assert engine.generate(FEW, config).tokens == pb.generate(model, FEW, config).tokens
        assert stand_in.waits.count("to the host") == engine.steps
    widest = D if mode == "diffusion" else 1  # in wider pieces, of prompts, a query sees more than the one before it
    assert {there for width, there in over_pages if width <= widest} == {True}


def test_attention_over_pages_is_tried(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pages = torch.zeros(3, D, 2, 8, device=FIRST)
    caplog.set_level(logging.INFO, "parablock")

    def works(function: Any) -> bool:
        caplog.clear()
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
        return paged_attention_works(pages, pages, 4)

    def refuses(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("Paged KV cache block size must be divisible by 256")

    def misses_the_limit(*args: Any, seqused_k: Tensor, **kwargs: Any) -> Tensor:
        return varlen_attn(*args, seqused_k=seqused_k + 1, **kwargs)

    def forgets_a_row(*args: Any, **kwargs: Any) -> Tensor:
        out = varlen_attn(*args, **kwargs)
        out[-1] = torch.nan
        return out

    assert works(varlen_attn)
    assert not works(refuses)
    assert "pages are gathered before attention: Paged KV cache" in caplog.text
    for wrong in (misses_the_limit, forgets_a_row):
        assert not works(wrong)
        assert "computes something else here" in caplog.text
    assert not paged_attention_works(pages, pages[..., :4], 4)  # keys and values of different widths


def test_torch_takes_these_arguments() -> None:
    """As far as torch checks them without a kernel."""
    from torch.nn.attention.varlen import varlen_attn

    if "block_table" not in inspect.signature(varlen_attn).parameters:
        pytest.skip(f"torch {torch.__version__} has no attention over pages")
    with torch.device("meta"):
        keys = torch.empty(7, 32, 2, 64, dtype=torch.bfloat16)
        for width in (1, 32):
            query, table = torch.empty(3 * width, 14, 64, dtype=torch.bfloat16), torch.empty(3, 5, dtype=torch.int32)
            got = paged_attention(query, keys, keys, table, table[:, 0].contiguous(), width, 0.125)
            assert (got.shape, got.dtype) == (query.shape, query.dtype)


def test_memory_of_the_device(there: Any, stand_in: StandIn) -> None:
    stand_in.free.update({FIRST: 64_000, SECOND: 4_000})
    config = pb.EngineConfig(max_rows=4)
    assert kv_pages(config, 10, 8, {FIRST: 100}) == 40  # what all rows can need
    assert kv_pages(config, 1000, 8, {FIRST: 100}) == 64_000 * 3 // 4 // 800
    assert kv_pages(config, 1000, 8, {FIRST: 100, SECOND: 20}) == 4_000 * 3 // 4 // 160  # the least room decides
    with pb.Engine(there) as engine:
        assert engine.stats["pages"] == 64_000 * 3 // 4 // (D * engine.runner.kv.bytes_per_token)
        assert run_load(engine, FEW[:2], BASE, 2)[0].memory_bytes == stand_in.allocated
