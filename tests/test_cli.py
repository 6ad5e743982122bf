"""The command as a user meets it: real processes."""

import json
import os
import pty
import signal
import sys
import time
from pathlib import Path

import pytest
from processes import run, run_program, start

import parablock
from parablock.data.word_problems import read_answer, word_problem

QUESTION = word_problem("test", 5, 0).question


def test_version_and_help_import_nothing_heavy() -> None:
    code = (
        "import sys, parablock.engine.config, parablock.cli; parablock.cli.app(['--help'], standalone_mode=False); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    )
    assert run_program([sys.executable, "-c", code]).returncode == 0
    assert run("--version", cold=True).stdout.strip() == f"parablock {parablock.__version__}"


@pytest.mark.parametrize("command", ["generate", "chat", "demo", "bench"])
def test_every_command_explains_itself(command: str) -> None:
    out = run(command, "--help")
    assert out.returncode == 0
    assert "--model" in out.stdout or command in ("demo", "bench")


def test_public_names() -> None:
    for name in parablock.__all__:
        assert getattr(parablock, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        parablock.nothing  # noqa: B018


def test_generate_answers_from_argument_and_stdin() -> None:
    argument = run("generate", "--model", "bundled", QUESTION, cold=True)
    assert argument.returncode == 0, argument.stderr
    assert argument.stderr == ""
    assert read_answer(argument.stdout) is not None
    assert run("generate", "--model", "bundled", input=QUESTION).stdout == argument.stdout


def test_generate_json_and_modes() -> None:
    out = json.loads(run("generate", "--model", "bundled", "--json", QUESTION).stdout)
    assert out["new_tokens"] == len(out["tokens"])
    assert out["tokens_per_forward"] > 1.5
    ar = json.loads(run("generate", "--json", "-m", "bundled-ar", "--mode", "autoregressive", QUESTION).stdout)
    assert ar["forwards"] == ar["new_tokens"]
    limited = json.loads(run("generate", "--model", "bundled", "--json", "--max-new-tokens", "5", QUESTION).stdout)
    assert limited["tokens"] == out["tokens"][:5]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", ""], "the prompt is empty"),
        (["generate", "--threshold", "1.5", "hi"], "threshold=1.5"),
        (["generate", "--model", "bundled", "--sub-block-size", "5", "hi"], "sub_block_size=5"),
        (["generate", "--mode", "fast", "hi"], "mode='fast'"),
        (["generate", "--model", "bundled-ar", "--mode", "diffusion", "hi"], "bundled-ar was never adapted"),
        (["generate", "--model", "./nothing", "hi"], "there is no checkpoint directory at './nothing'"),
        (["generate", "--model", "bundled", "word " * 2000], "exceed the model's context of 512 tokens"),
        (["generate", "--model", "bundled", "--max-new-tokens", "600", "hi"], "max_new_tokens=600"),
        (["chat", "--temperature", "-1"], "temperature=-1.0"),
        (["demo", "--problems", "0"], "problems=0"),
        (["export", "bundled", "-o", "new", "--layout", "gguf"], "layout='gguf' is unknown; use stock, official"),
        (["export", "bundled-ar", "-o", "new"], "nothing to export; adapt it with: parablock adapt bundled-ar"),
        (["export", "./nothing", "-o", "new"], "there is no checkpoint directory at './nothing'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(args: list[str], message: str, tmp_path: Path) -> None:
    out = run(*args, cwd=tmp_path)
    assert out.returncode == 2
    assert message in out.stderr
    assert len(out.stderr.strip().splitlines()) == 1
    assert out.stdout == ""
    assert not list(tmp_path.iterdir())


def test_export_then_generate(tmp_path: Path) -> None:
    expected = json.loads(run("generate", "--model", "bundled", "--json", QUESTION).stdout)["tokens"]
    for layout in ("official", "standalone"):
        out = run("export", "bundled", "--output", str(tmp_path / layout), "--layout", layout)
        assert out.returncode == 0, out.stderr
        assert f"layout {layout}" in out.stdout
        again = run("generate", "--json", "--model", str(tmp_path / layout), QUESTION)
        assert (json.loads(again.stdout)["tokens"], again.stderr) == (expected, "")
    again = run("export", "bundled", "--output", str(tmp_path / "official"))
    assert (again.returncode, len(again.stderr.splitlines())) == (2, 1)


@pytest.mark.parametrize("args", [["generate", "--speed", "3", "hi"], ["fly"]])
def test_unknown_options_and_commands(args: list[str]) -> None:
    out = run(*args)
    assert out.returncode == 2
    assert "No such" in out.stderr
    assert "Traceback" not in out.stderr


def test_chat_in_a_real_terminal() -> None:
    """Ask, recall the question with the arrow key, clear, exit."""
    parent, child = pty.openpty()
    terminal = os.ttyname(child)
    seen = ""

    def wait_for(text: str, times: int) -> None:
        nonlocal seen
        end = time.monotonic() + 120
        while seen.count(text) < times:
            assert time.monotonic() < end, seen
            seen += os.read(parent, 4096).decode(errors="replace")

    try:
        with start(
            "chat", "--model", "bundled", cold=True, stdin=terminal, stdout=terminal, stderr=terminal
        ) as process:
            wait_for("> ", 1)
            os.write(parent, QUESTION.encode() + b"\n")
            wait_for("tokens per forward", 1)
            wait_for("> ", 2)
            os.write(parent, b"\x1b[A\n")  # arrow up: the same question again
            wait_for("tokens per forward", 2)
            os.write(parent, b"clear\nexit\n")
            assert process.wait() == 0
    finally:
        os.close(child)
        os.close(parent)
    assert seen.count("####") == 2
    assert "tokens/s" in seen


def test_chat_reads_piped_questions() -> None:
    out = run("chat", "--model", "bundled", input=f"{QUESTION}\n")
    assert out.returncode == 0
    assert "####" in out.stdout


def test_ctrl_c_is_clean(tmp_path: Path) -> None:
    with start("demo", "--no-live", "--problems", "500", cold=True, cwd=tmp_path) as process:
        process.wait_for(".")  # it has begun
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert "Traceback" not in process.err
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
