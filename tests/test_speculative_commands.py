"""Speculative decoding in the commands, with a causal adapter: real processes."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import run

from parablock.bench.load import share_equal
from parablock.data.word_problems import word_problem
from parablock.evals.results import read

QUESTION = word_problem("test", 5, 0).question


def test_generate_counts_drafts_by_drafter(causal_adapter: Path) -> None:
    speculative = ("generate", "--json", "-m", causal_adapter, "--mode", "speculative", "--draft-tokens", 4, QUESTION)
    plain = json.loads(run("generate", "--json", "-m", causal_adapter, "--mode", "autoregressive", QUESTION).stdout)
    assert (plain["drafted"], plain["accepted"]) == (0, 0)
    assert plain["drafted_by"] == plain["accepted_by"] == {"masks": 0, "lookup": 0}
    for drafter in ("masks", "both"):
        out = json.loads(run(*speculative, "--drafter", drafter).stdout)
        assert out["tokens"] == plain["tokens"]
        assert out["drafted"] == sum(out["drafted_by"].values()) > out["accepted"] == sum(out["accepted_by"].values())
        assert out["forwards"] == plain["forwards"] - out["accepted"]
        assert (out["drafted_by"]["lookup"] > 0) == (drafter == "both")


def test_chat_tells_how_many_drafts_were_right(causal_adapter: Path) -> None:
    ar = run("chat", "-m", causal_adapter, "--mode", "autoregressive", input=f"{QUESTION}\n")
    out = run("chat", "-m", causal_adapter, "--mode", "speculative", "--draft-tokens", 4, input=f"{QUESTION}\n")
    *answer, figures = [line for line in out.stdout.splitlines() if line.strip("> ")]
    assert answer == [line for line in ar.stdout.splitlines() if line.strip("> ")][:-1]
    assert "drafts accepted" in figures
    assert "tokens per forward" in figures
    assert "drafts" not in ar.stdout


def test_bench_compares_it_with_ar_at_the_same_load(causal_adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bench"
    few = "--requests 3 --rounds 1 --repeats 2 --concurrency 1,2 --new-tokens 24 --drafter lookup,both"
    out = run("bench", causal_adapter, *few.split(), "--folder", folder)
    report = json.loads((folder / "report.json").read_text())
    names = ["AR", "speculative, lookup", "speculative, both"]
    assert [(row["name"], row["concurrency"]) for row in report["rows"]] == [(n, c) for c in (1, 2) for n in names]
    for row in report["rows"]:
        if row["mode"] == "autoregressive":
            assert (row["drafted"], row["equal"]) == (0, None)
        else:
            assert row["equal"] == 1
            assert row["accepted"] <= row["drafted"]
    assert "equal to AR" in out.stdout
    assert "100.00 %" in (folder / "report.md").read_text()
    assert (folder / "over-ar.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "concurrency.png").exists()


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5), st.data())
def test_the_share_of_equal_tokens(reference: list[list[int]], data: Any) -> None:
    assert share_equal(reference, reference) == 1
    answers = [[*row[: data.draw(st.integers(0, len(row)))], 9] for row in reference]  # right so far, then never
    kept = sum(len(row) - 1 for row in answers)
    assert share_equal(answers, reference) == kept / sum(map(len, reference))


def test_eval_finds_the_scores_of_ar(causal_adapter: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'parablock[eval]'")
    reports, answers = {}, {}
    for mode in ("autoregressive", "speculative"):
        tasks = ("--tasks", "word_problems", "--limit", 6, "--max-new-tokens", 60)
        more = ("--draft-tokens", 4) if mode == "speculative" else ()
        out = run("eval", causal_adapter, "--mode", mode, *tasks, *more, "-o", tmp_path / mode, cwd=tmp_path)
        report, samples = read(tmp_path / mode)
        reports[mode], answers[mode] = report["tasks"]["word_problems"], [sample.response for sample in samples]
        assert ("drafts accepted" in " ".join(out.stdout.split())) == (mode == "speculative")
    ar, speculative = reports["autoregressive"], reports["speculative"]
    assert speculative["metrics"] == ar["metrics"]
    assert answers["speculative"] == answers["autoregressive"]
    pace = speculative["speed"]
    assert pace["drafted"] == sum(pace["drafted_by"].values()) > pace["accepted"] == sum(pace["accepted_by"].values())
    assert pace["accepted_by"]["masks"] > 0
    assert pace["response_tokens"] == ar["speed"]["response_tokens"]
    assert pace["tokens_per_forward"] > ar["speed"]["tokens_per_forward"]
    assert ar["speed"]["drafted"] == 0
