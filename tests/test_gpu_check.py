"""The check of a GPU machine, rehearsed on the CPU with a tiny shape: it compares, goes on after failures, tells."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import gpu_check
import pytest
import torch
from gpu_check import Speed, all_checks, checked, table

TINY = {
    "model_type": "qwen2", "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 64, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY))
    return str(file)


def test_a_rehearsal_on_the_cpu(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything runs but what needs a GPU, which is told and stops nothing."""
    monkeypatch.setattr(gpu_check, "ENGINES", {name: e for name, e in gpu_check.ENGINES.items() if "compile" not in e})
    found = checked(all_checks(Speed("cpu", 2, copied=2**20, matrix=64), 1, [tiny], tiny, rows=2, length=64))
    failed = {name: row["told"] for name, row in found.items() if not row["ok"]}
    assert set(failed) == {
        "tokens: engine, cuda_graphs", "training: flex, float32", "training: flex, bfloat16",
        f"{tiny}, engine, cuda_graphs",
    }  # fmt: skip
    assert failed["tokens: engine, cuda_graphs"] == (
        "FAILED: ValueError: cuda_graphs=True needs a CUDA device, and the model is on cpu"
    )
    assert found["tokens: engine"]["answers"] == len(gpu_check.CONFIGS)
    assert found["attention over pages, bfloat16"] == found["attention over pages, bfloat16"] | {"used": False}
    assert found["training: block, float32"]["gradients"] < 1e-3
    steps = found[f"{tiny}, engine"]
    assert set(steps["steps"]) == {1, 8, 32}
    weights = sum(
        p.numel() for p in gpu_check.random_model(tiny, block_size=32, dtype=None, device="meta").parameters()
    )
    assert steps["floor"] == pytest.approx(2 * weights / found["copy"]["bytes_per_second"])
    assert found[f"{tiny}, training"]["tokens_per_second"] > 0
    text = table(found)
    assert all(text.count(f"| {name} |") == 1 for name in found)
    json.dumps(found)


def test_other_tokens_and_gradients_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    load = gpu_check.pb.load

    def broken(name: str, *, device: str, dtype: str) -> Any:
        model, tokenizer = load(name, device="cpu", dtype=dtype)
        if device == "cpu:0":  # it computes something else
            model.model.norm.weight.data *= -1
        return model, tokenizer

    monkeypatch.setattr(gpu_check.pb, "load", broken)
    checks = (*gpu_check.right_tokens("cpu:0", 1), *gpu_check.right_gradients("cpu:0"))
    found = checked(
        check for check in checks if check[0] in ("tokens: generate, AR, sampled", "training: block, float32")
    )
    tokens, gradients = found.values()
    assert tokens["told"] == "FAILED: ValueError: only 0 of 1 answers are the CPU's; others with AR, sampled"
    assert gradients["told"].startswith("FAILED: ValueError: loss ")


def test_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def breaks() -> Any:
        raise RuntimeError("CUDA error: no kernel | image\nand more lines of advice")

    for name, value in {
        "is_available": lambda: True, "get_device_name": lambda: "a GPU",
        "get_device_properties": lambda number: SimpleNamespace(total_memory=2**34),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--repeats", "7"])
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    checks = [("breaks", breaks), ("works", lambda: {"told": "1 GB/s", "bytes_per_second": 1e9})]
    monkeypatch.setattr(gpu_check, "all_checks", lambda *args, **size: iter(checks))
    assert gpu_check.main() == 1
    printed = capsys.readouterr().out
    assert "gpu: a GPU\n" in printed
    assert "| breaks | FAILED: RuntimeError: CUDA error: no kernel / image |\n| works | 1 GB/s |" in printed
    written = json.loads((tmp_path / "gpu_check.json").read_text())
    assert written["setting"]["command"] == "python benchmarks/gpu_check.py --problems 8 --repeats 7"
    assert written["checks"]["works"]["bytes_per_second"] == 1e9
    checks.pop(0)
    assert gpu_check.main() == 0


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(common, "write", lambda *args: pytest.fail("nothing was measured"))
    assert gpu_check.main() == 2
    assert f"gpu_check needs a GPU, and torch {torch.__version__}" in capsys.readouterr().err
