"""K/V in bfloat16 under float32 weights: half the memory, answers that still come, and the engine as ever."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import BASE, ENDLESS, MODES, ROWS, D, empty, prompt

import parablock as pb
from parablock.data.chat import encode_prompt
from parablock.engine import admission
from parablock.evals.word_problems import test_problems as problems
from parablock.server.command import run_server
from parablock.server.config import ServeConfig

HALF = pb.EngineConfig(kv_dtype="bfloat16")


def test_memory_holds_twice_as_many_tokens(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 2**18}))
    monkeypatch.setitem(admission.SHARE_OF_FREE_MEMORY, "cpu", 0.5)
    with pb.Engine(model) as whole, pb.Engine(model, HALF) as half:
        sizes = [engine.runner.kv.bytes_per_token for engine in (whole, half)]
        assert sizes == [2 * 2 * 2 * 8 * 4, 2 * 2 * 2 * 8 * 2]  # K and V, layers, heads, width, bytes
        assert [engine.stats["pages"] for engine in (whole, half)] == [2**17 // (size * D) for size in sizes]
        for pages in (pages for layer in half.runner.kv.layers for pages in layer):
            assert pages.pages.dtype == torch.bfloat16
        assert all(half.generate(ROWS, BASE).tokens)


@pytest.mark.parametrize("mode", MODES)
def test_known_beginnings_and_pages_that_are_given_back(model: Any, mode: Any) -> None:
    config = replace(ENDLESS, mode=mode, max_new_tokens=40)
    rows = [prompt(i, n) for i, n in enumerate((5, 8, 16, 17))]
    with pb.Engine(model, HALF) as engine:
        expected = engine.generate(rows, config).tokens
        assert engine.generate(rows, config).tokens == expected
        assert engine.stats["pages_cached"] > 0
        assert empty(engine)
    with pb.Engine(model, replace(HALF, max_rows=4, kv_tokens=9 * D, max_context=64)) as engine:
        assert engine.generate(rows, config).tokens == expected
        assert engine.preemptions > 1


def test_answers_are_nearly_those_of_whole_kv() -> None:
    model, tokenizer = pb.load("bundled", dtype="float32")
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": p.question}]) for p in problems(3, 20)]
    answers = []
    for size in (pb.EngineConfig(), HALF):
        with pb.Engine(model, size) as engine:
            answers.append(engine.generate(prompts, pb.DecodeConfig(max_new_tokens=96)).tokens)
    assert sum(whole == half for whole, half in zip(*answers, strict=True)) >= 15


def test_a_server_hands_it_to_its_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def load_models(names: Any, config: pb.EngineConfig, dtype: Any) -> Any:
        given.append(config)
        raise ValueError("enough")

    monkeypatch.setattr("parablock.server.command.load_models", load_models)
    with pytest.raises(ValueError, match="enough"):
        run_server(["bundled"], ServeConfig(port=0, max_rows=3, kv_dtype="bfloat16", compile=True), None)
    assert given == [pb.EngineConfig(max_rows=3, max_queue=128, kv_dtype="bfloat16", compile=True)]
    with pytest.raises(ValueError, match="kv_dtype='int4' is out of range; use 'bfloat16'"):
        pb.EngineConfig(kv_dtype="int4")  # type: ignore[arg-type]
