"""`parablock bench`: the load it makes, the table it writes, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import small_model
from processes import run

import parablock as pb
from parablock.bench.config import BenchConfig
from parablock.bench.load import run_load
from parablock.bench.shapes import SHAPES, random_model
from parablock.bench.throughput import Workload, cases, markdown, measure, summarise

PROMPTS = [[i % 50 + 1, (3 * i) % 50 + 1, 7] for i in range(20)]
TINY = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 512,
}  # fmt: skip


def test_a_load_keeps_so_many_in_flight_and_loses_none() -> None:
    model = small_model()
    config = pb.DecodeConfig(sub_block_size=4, max_new_tokens=12, stop_token_ids=())
    for concurrency in (1, 4):
        with pb.Engine(model, pb.EngineConfig(max_rows=4)) as engine:
            seen: list[int] = []
            step = engine.step
            engine.step = lambda step=step, engine=engine, seen=seen: (  # type: ignore[method-assign]
                step(), seen.append(engine.stats["running"])
            )[0]  # fmt: skip
            out, answers = run_load(engine, PROMPTS, config, concurrency)
            assert max(seen) == concurrency
        assert answers == [tokens for prompt in PROMPTS for tokens in pb.generate(model, prompt, config).tokens]
        assert out.requests == len(PROMPTS)
        assert out.tokens == 12 * len(PROMPTS)
        assert out.tokens_per_second == pytest.approx(out.tokens / out.seconds)
        alone = [pb.generate(model, prompt, config) for prompt in PROMPTS]
        assert out.tokens_per_forward == pytest.approx(out.tokens / sum(o.decode_forwards[0] for o in alone))
        # a short prompt has no prefill: every query is one of a block or a sub-block
        assert 8 * out.tokens / out.tokens_per_forward >= out.queries_per_token * out.tokens >= 4 * len(PROMPTS)
        assert 0 < out.ttft <= out.ttft_95 <= out.seconds
        # at most two pages a request, of eight tokens: the second is taken when the answer reaches it
        assert concurrency <= out.kv_bytes / (8 * (2 * 2 * 2 * 8 * 4)) <= 2 * concurrency


def test_cases_and_speed_ups() -> None:
    config = BenchConfig(
        concurrency=(1, 2), thresholds=(0.5, 0.9), sub_block_sizes=(4, 8), compile=(False,), new_tokens=8, requests=2,
        repeats=2,
    )  # fmt: skip
    lines = cases(config, ("diffusion", "autoregressive"))
    assert len(lines) == 2 * (1 + 4)
    assert len({(case.name, case.concurrency) for case in lines}) == len(lines)
    model = small_model()
    results = measure(Workload({"diffusion": model, "autoregressive": model}, PROMPTS, 60), config)
    rows = summarise(results)
    for row, (case, measured) in zip(rows, results, strict=True):
        baseline = next(m for c, m in results if c.mode == "autoregressive" and c.concurrency == case.concurrency)
        ratios = [a.tokens_per_second / b.tokens_per_second for a, b in zip(measured, baseline, strict=True)]
        assert row["speed_up_range"] == (min(ratios), max(ratios))
        assert row["requests"] == max(2, 2 * case.concurrency)
    assert [row["speed_up"] for row in rows if row["mode"] == "autoregressive"] == [1.0, 1.0]
    assert markdown(rows).count("\n") == len(rows) + 2
    assert model.config._attn_implementation == "sdpa"


def test_the_command_on_the_bundled_models(tmp_path: Path) -> None:
    out = run(
        "bench", "bundled", "--concurrency", "1,2", "--repeats", 1, "--requests", 2, "--folder", tmp_path, cold=True
    )
    assert out.returncode == 0, out.stderr
    report: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    assert [row["mode"] for row in report["rows"]] == ["autoregressive", "diffusion"] * 2
    assert all(row["tokens_per_second"] > 0 for row in report["rows"])
    assert report["rows"][1]["tokens_per_forward"] > 3
    assert {"processor", "torch", "transformers", "threads"} <= set(report["setting"])
    assert (tmp_path / "report.md").read_text().startswith("| decoder |")
    assert (tmp_path / "concurrency.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "context.png").exists()
    assert "diffusion, sub-block 8, threshold 0.9" in out.stdout


def test_the_command_on_a_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    out = run(
        "bench", "--random-weights", str(tmp_path / "config.json"), "--prompt-tokens", "16,64", "--new-tokens", "32",
        "--tokens-per-step", "2", "--concurrency", "1", "--requests", "1", "--repeats", "1", "--folder", str(tmp_path),
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["tokens"] for row in rows] == [64] * 4  # two requests: rounds times one in flight
    for row in rows:
        if row["mode"] == "diffusion":
            assert 1.5 < row["tokens_per_forward"] <= 2  # two a step, and the commits
    assert (tmp_path / "context.png").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--concurrency", "1,x"], "concurrency='1,x' is no list; write it like 1,8,32"),
        (["--sub-block-cache", "yes"], "write it like on,off"),
        (["--threshold", "2"], "use values in [0, 1]"),
        (["--concurrency", ""], "name at least one value"),
        (["--repeats", "0"], "repeats=0 is out of range"),
        (["--random-weights", "3b"], "shape '3b' is unknown; use 135m, 0.5b, 1.5b, 7b"),
        (["--dtype", "int4"], "dtype 'int4' is unknown"),
        (["--prompts", "missing.txt"], "missing.txt"),
    ],
)
def test_wrong_arguments(args: list[str], message: str) -> None:
    out = run("bench", "bundled", *args)
    assert out.returncode == 2
    assert message in out.stderr
    assert out.stderr.count("\n") == 1


def test_shapes_are_the_published_ones() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.init.normal_", lambda tensor, *_, **__: tensor)
        sizes = {}
        for name in SHAPES:
            model = random_model(name, block_size=32, dtype=None, device="meta")
            sizes[name] = sum(p.numel() for p in model.parameters()) / 1e9
    assert sizes == pytest.approx({"135m": 0.1345, "0.5b": 0.494, "1.5b": 1.544, "7b": 7.616}, rel=1e-3)
