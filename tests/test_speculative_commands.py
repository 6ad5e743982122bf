"""Speculative decoding in the commands, with a causal adapter: real processes."""

import json
from pathlib import Path
from typing import Any

from gated import gated
from processes import start_function

from parablock.data.word_problems import word_problem

QUESTION = word_problem("test", 5, 0).question


def run(*args: object, stdin: str | None = None, folder: Path | None = None) -> tuple[str, str]:
    """What the command writes to stdout and stderr, where `bundled-ar` has an adapter."""
    options: dict[str, Any] = {} if stdin is None else {"stdin": stdin}
    with start_function(gated, [str(arg) for arg in args], cwd=folder, **options) as process:
        assert process.wait() == 0, process.err
        return process.out, process.err


def test_generate_counts_drafts_by_drafter() -> None:
    speculative = ("generate", "--json", "-m", "bundled-ar", "--mode", "speculative", "--draft-tokens", 4, QUESTION)
    plain = json.loads(run("generate", "--json", "-m", "bundled-ar", "--mode", "autoregressive", QUESTION)[0])
    assert (plain["drafted"], plain["accepted"]) == (0, 0)
    assert plain["drafted_by"] == plain["accepted_by"] == {"masks": 0, "lookup": 0}
    for drafter in ("masks", "both"):
        out = json.loads(run(*speculative, "--drafter", drafter)[0])
        assert out["tokens"] == plain["tokens"]
        assert out["drafted"] == sum(out["drafted_by"].values()) > out["accepted"] == sum(out["accepted_by"].values())
        assert out["forwards"] == plain["forwards"] - out["accepted"]
        assert (out["drafted_by"]["lookup"] > 0) == (drafter == "both")


def test_chat_tells_how_many_drafts_were_right(tmp_path: Path) -> None:
    (tmp_path / "questions").write_text(f"{QUESTION}\n")
    ar, _ = run("chat", "-m", "bundled-ar", "--mode", "autoregressive", stdin=str(tmp_path / "questions"))
    out, _ = run(
        "chat", "-m", "bundled-ar", "--mode", "speculative", "--draft-tokens", 4, stdin=str(tmp_path / "questions")
    )
    *answer, figures = [line for line in out.splitlines() if line.strip("> ")]
    assert answer == [line for line in ar.splitlines() if line.strip("> ")][:-1]
    assert "drafted tokens accepted" in figures
    assert "tokens per forward" in figures
    assert "drafted" not in ar
