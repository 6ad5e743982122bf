"""`parablock batch --replicas` on a real, small Ray cluster: workers and drivers are killed, and nothing is lost."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import ray_head
from processes import run, start, start_function

import parablock as pb
from parablock.data.chat import encode_prompt
from parablock.data.word_problems import word_problem

QUESTIONS = [word_problem("test", 3, i).question for i in range(40)]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}  # Ray asks for one by default
    with patch.dict(os.environ, token), start_function(ray_head.main, environment={"TMPDIR": "/tmp"}) as cluster:
        yield cluster.wait_for(r"address \S+").split()[1]


def lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith(b"\n")]


def workers() -> list[psutil.Process]:
    """The actors' processes."""
    return [process for process in psutil.process_iter(["cmdline"]) if _is_worker(process)]


def _is_worker(process: psutil.Process) -> bool:
    return "ray::Remote" in " ".join(process.info["cmdline"] or [])


def wait_for_lines(part: Path, count: int, process: Any) -> None:
    while len(lines(part)) < count:
        assert process.poll() is None, process.err
        time.sleep(0.02)


def test_workers_and_drivers_are_killed(address: str, tmp_path: Path) -> None:
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text(
        "".join(json.dumps({"prompt": question, "id": f"q{i}"}) + "\n" for i, question in enumerate(QUESTIONS))
    )
    part = tmp_path / "answers.jsonl.part"
    # slow: few rows, one token per forward
    command = [
        "batch", source, "--model", "bundled", "-o", output, "--replicas", "2", "--address", address, "--max-rows", "2",
        "--max-new-tokens",
        "24", "--threshold", "1",
    ]  # fmt: skip
    with start(*command) as driver:
        wait_for_lines(part, 3, driver)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    kept = lines(part)
    assert 3 <= len(kept) < len(QUESTIONS)
    while workers():  # of a driver that is gone
        time.sleep(0.1)
    with start(*command, "--ordered") as driver:
        wait_for_lines(part, len(kept) + 3, driver)
        workers()[0].kill()
        assert driver.wait() == 0, driver.err
        assert driver.err == ""
    found = lines(output)
    assert [record["id"] for record in found] == [f"q{i}" for i in range(len(QUESTIONS))]
    assert all(record in found for record in kept)
    model, tokenizer = pb.load("bundled")
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]
    out = pb.generate(model, prompts, pb.DecodeConfig(max_new_tokens=24, threshold=1.0))
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in out.tokens]
    assert [record["messages"][-1]["content"] for record in found] == texts


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--replicas", "3", "--cpus-per-replica", "2"], "need 6, and the cluster has 4; use fewer --replicas"),
        (["--gpus-per-replica", "1"], "replicas=1 with 1 GPUs each need 1, and the cluster has 0"),
        (["--max-new-tokens", "600"], "max_new_tokens=600"),
    ],
)
def test_what_the_cluster_cannot_run(args: list[str], message: str, address: str, tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "Two and two?"}\n')
    out = run("batch", source, "--model", "bundled", "-o", tmp_path / "out.jsonl", "--address", address, *args)
    assert out.returncode == 2, out.stderr
    assert message in out.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize(
    ("address", "message"),
    [("127.0.0.1:9", "--address 127.0.0.1:9: nobody listens there"), ("ray://here", "is no address; use 'auto'")],
)
def test_an_address_nobody_listens_at(address: str, message: str, tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "Two and two?"}\n')
    out = run("batch", source, "--model", "bundled", "-o", tmp_path / "out.jsonl", "--address", address)
    assert (out.returncode, len(out.stderr.splitlines())) == (2, 1), out.stderr
    assert message in out.stderr


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from parablock.batch.command import run_batch
    from parablock.batch.config import BatchConfig

    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("parablock.settings.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'parablock\[ray\]'"):
        run_batch("bundled", tmp_path / "p", tmp_path / "o", pb.DecodeConfig(), BatchConfig(replicas=2))
