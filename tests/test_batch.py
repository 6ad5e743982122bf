"""`parablock batch` as users run it: answers, refusals, what is left after a kill, what adapt makes of it."""

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from processes import run, start

import parablock as pb
from parablock.batch.output import AnswerFile
from parablock.batch.plain import PromptWorker, encode
from parablock.batch.running import IN_FLIGHT, Local, StoppedError, answers
from parablock.data.chat import IGNORE, encode_chat, encode_prompt
from parablock.data.lines import read_lines
from parablock.data.prompts import Prompt, Unusable, read_prompts, to_prompt
from parablock.data.sources import load_data
from parablock.data.word_problems import word_problem

QUESTIONS = [word_problem("test", 3, i).question for i in range(40)]
USER = {"role": "user", "content": "Two and two?"}
MODEL = ("--model", "bundled")
ASSISTANT = {"role": "assistant", "content": "Four."}


@pytest.fixture(scope="module")
def bundled() -> Any:
    return pb.load("bundled")


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected(bundled: Any, questions: list[str], **settings: Any) -> list[str]:
    """What `pb.generate` answers, all in one batch."""
    model, tokenizer = bundled
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": question}]) for question in questions]
    out = pb.generate(model, prompts, pb.DecodeConfig(**settings))
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in out.tokens]


def said(record: dict[str, Any]) -> str:
    content: str = record["messages"][-1]["content"]
    return content


@pytest.mark.parametrize("sampled", [False, True])
def test_the_answers_are_those_of_generate(bundled: Any, tmp_path: Path, sampled: bool) -> None:
    formats: list[Any] = [
        {"prompt": QUESTIONS[0], "custom_id": "a", "id": 7},
        {"messages": [{"role": "user", "content": QUESTIONS[1]}], "id": "b", "weight": 2},
        {"messages": [{"role": "user", "content": QUESTIONS[2]}, ASSISTANT], "id": 99},
        {"question": QUESTIONS[3], "answer": "Four."},
        {"instruction": QUESTIONS[4], "input": "", "output": "Four."},
        {"question": QUESTIONS[5], "id": None},
    ]
    prompts = write(tmp_path / "prompts.jsonl", formats)
    options = ["--temperature", "1.5", "--seed", "4"] if sampled else []
    settings: dict[str, Any] = {"temperature": 1.5, "seed": 4} if sampled else {}
    out = run(
        "batch",
        prompts,
        *MODEL,
        "-o",
        tmp_path / "answers.jsonl",
        "--max-rows",
        "2",
        "--max-new-tokens",
        "40",
        *options,
    )
    assert (out.returncode, out.stderr) == (0, "")
    assert "6 answers" in out.stdout
    found = sorted(read(tmp_path / "answers.jsonl"), key=lambda record: record["line"])
    assert [(record["id"], record["line"]) for record in found] == [
        *zip(("a", "b", 99, 4, 5, 6), range(1, 7), strict=True)
    ]
    assert [said(record) for record in found] == expected(bundled, QUESTIONS[:6], max_new_tokens=40, **settings)
    for record, question in zip(found, QUESTIONS, strict=False):
        assert record["messages"][:-1] == [{"role": "user", "content": question}]
        assert 0 < record["completion_tokens"] <= 40
        assert record["finish_reason"] == "stop" or record["completion_tokens"] == 40
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "answers.jsonl"}
    again = run("batch", prompts, *MODEL, "-o", tmp_path / "answers.jsonl")
    assert (again.returncode, len(again.stderr.splitlines())) == (2, 1)
    assert "is there already, finished; name another file" in again.stderr


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_what_was_stopped_goes_on(bundled: Any, tmp_path: Path, how: int) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": question} for question in QUESTIONS])
    output, part = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.part"
    # slow: one row, one token per forward; sampled with a seed that is drawn and must be kept
    command = [
        "batch",
        prompts,
        *MODEL,
        "-o",
        output,
        "--max-new-tokens",
        "24",
        "--threshold",
        "1",
        "--temperature",
        "1",
    ]
    with start(*command, "--max-rows", "1") as process:
        while not (part.exists() and part.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None, process.err
        process.send_signal(how)
        assert process.wait() == (130 if how == signal.SIGINT else -signal.SIGKILL)
        if how == signal.SIGINT:
            assert "of 40 lines are done, the same command goes on from there" in process.err
    kept = part.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert 3 <= kept.count(b"\n") < 40
    assert not output.exists()
    part.write_bytes(kept + b'{"id": 17, "li')  # as a kill can leave it
    other = run(*command, "--top-k", "5")
    assert other.returncode == 2
    assert "belongs to another job (decoding:" in other.stderr
    seed = json.loads((tmp_path / "answers.jsonl.job").read_text())["seed"]
    out = run(*command)  # with more rows
    assert (out.returncode, out.stderr) == (0, "")
    assert "going on" in out.stdout
    assert output.read_bytes().startswith(kept)
    found = sorted(read(output), key=lambda record: record["line"])
    assert [record["id"] for record in found] == list(range(1, 41))
    texts = expected(bundled, QUESTIONS, max_new_tokens=24, threshold=1.0, temperature=1.0, seed=seed)
    assert [said(record) for record in found] == texts
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "answers.jsonl"}


def test_lines_that_cannot_be_used_and_what_adapt_makes_of_the_rest(tmp_path: Path) -> None:
    rows: list[Any] = [
        "{ no json",
        {"prompt": QUESTIONS[0], "id": "x"},
        "",
        {"prompt": "word " * 600},
        {"prompt": QUESTIONS[1], "id": "x"},
        {"prompt": QUESTIONS[2]},
        {"title": "a"},
        {"prompt": QUESTIONS[3]},
    ]
    prompts, output = write(tmp_path / "prompts.jsonl", rows), tmp_path / "answers.jsonl"
    out = run("batch", prompts, *MODEL, "-o", output, "--max-new-tokens", "64", "--limit", "6")
    assert out.returncode == 1
    assert out.stderr.strip().splitlines() == [
        f"parablock: 4 lines have no answer (line 1, 4, 5, 7); {output} says why"
    ]
    found = {record["line"]: record for record in read(output)}
    assert {line: record["id"] for line, record in found.items()} == {1: 1, 2: "x", 4: 4, 5: None, 6: 6, 7: 7}
    errors = {line: record["error"]["message"] for line, record in found.items() if "error" in record}
    assert sorted(errors) == [1, 4, 5, 7]
    assert "it is no JSON" in errors[1]
    assert "exceed" in errors[4]
    assert "the id 'x' stands in an earlier line" in errors[5]
    assert "the columns title are no known format" in errors[7]
    dry = run("adapt", "bundled-ar", "--data", output, "-o", tmp_path / "run", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "data: 2 kept, 4 nothing to learn" in dry.stdout


def test_adapt_learns_an_answer_and_its_end_only_where_it_has_one(bundled: Any, tmp_path: Path) -> None:
    tokenizer = bundled[1]
    rows = [
        {"id": 1, "error": {"message": "no"}},
        {"id": "b", "messages": [USER, ASSISTANT], "finish_reason": "stop"},
        {"id": 3, "messages": [USER, ASSISTANT], "finish_reason": "length"},
    ]
    data = load_data(tokenizer, str(write(tmp_path / "answers.jsonl", rows)), context_length=256)
    whole = encode_chat(tokenizer, [USER, ASSISTANT])
    assert whole.labels[-1] == tokenizer.eos_token_id
    stop, cut = data.samples
    assert stop == whole
    assert (cut.input_ids, cut.labels) == (whole.input_ids[:-1], whole.labels[:-1])
    assert any(label != IGNORE for label in cut.labels)
    assert data.counts["nothing to learn"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", "bundled-ar"], "belongs to another job (model: 'bundled' there, 'bundled-ar' here)"),
        (["--threshold", "0.5"], "belongs to another job (decoding:"),
        (["--limit", "1"], "belongs to another job (limit: None there, 1 here)"),
        (["more"], "belongs to another job (files:"),
        (["no job"], "nothing says which job"),
        (["locked"], "another process writes"),
        (["--max-rows", "0"], "max_rows=0"),
        (["--limit", "0"], "limit=0"),
        (["--max-new-tokens", "600"], "max_new_tokens=600"),
        (["none"], "there is no file at"),
        (["empty"], "is empty; it needs at least one line"),
    ],
)
def test_refusals(change: list[str], message: str, tmp_path: Path) -> None:
    prompts, output = write(tmp_path / "prompts.jsonl", [{"prompt": QUESTIONS[0]}] * 2), tmp_path / "answers.jsonl"
    decoding = vars(pb.DecodeConfig())
    files = {prompts.name: prompts.stat().st_size}
    file = AnswerFile(output, {"model": "bundled", "dtype": None, "decoding": decoding, "limit": None, "files": files})
    if change[0] not in ("--max-new-tokens", "--max-rows"):
        with file:
            file.write({"id": 1, "line": 1, "error": {"message": "no"}})
    if change == ["more"]:
        write(prompts, [{"prompt": QUESTIONS[0]}] * 3)
    elif change == ["no job"]:
        (tmp_path / "answers.jsonl.job").unlink()
    elif change == ["none"]:
        prompts.unlink()
    elif change == ["empty"]:
        prompts.write_text("\n")
    elif change == ["locked"]:
        file.__enter__()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".lock"}
    out = run("batch", prompts, *MODEL, "-o", output, *(change if change[0].startswith("-") else []))
    if change == ["locked"]:
        file.__exit__()
    told = [line for line in out.stderr.splitlines() if "never adapted" not in line]
    assert (out.returncode, len(told)) == (2, 1), out.stderr
    assert message in told[0]
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".lock"}
    assert left == before  # one that could not begin leaves nothing behind
    assert not output.exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "Two and two?"}, "'messages' is neither a text nor a list of messages"),
        ({"messages": [{"role": ["user"], "content": "?"}]}, "'messages' is neither"),
        ({"messages": []}, "no user message at its end"),
        ({"messages": [USER, ASSISTANT, ASSISTANT]}, "no user message at its end"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content is list"),
        ({"messages": [{"role": "user"}]}, "expected role and content"),
        ({"prompt": 3}, "'prompt' is neither a text nor a list"),
        ({"prompt": "  "}, "the prompt is empty"),
        ({"text": "All of this."}, "'text' has no question"),
        ({"error": "no"}, "no user message at its end"),
        ({}, "no known format"),
    ],
)
def test_rows_without_a_prompt(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_prompt(row)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER]},
        {"messages": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four."}]},
        {"prompt": "Two and two?"},
        {"prompt": [USER], "answer": 4},
        {"question": "Two and two?", "answer": 4},
        {"instruction": "Two and two?", "input": ""},
        {"input": [USER], "output": "Four."},
    ],
)
def test_questions_in_every_format(row: dict[str, Any]) -> None:
    assert to_prompt(row) == [USER]


def test_ids(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "a", "id": true}',
        "\ufeff[1]",
        '{"prompt": "a", "id": 4}',
        '{"prompt": "a"}',
        "ÿ",
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8").replace("ÿ".encode(), b"\xff"))
    found = list(read_prompts(read_lines([path])))
    assert [entry.id for entry in found] == [1, 2, 4, None, 5]
    assert [type(entry) for entry in found] == [Unusable, Unusable, Prompt, Unusable, Unusable]
    messages = [entry.message for entry in found if isinstance(entry, Unusable)]
    for message, part in zip(messages, ("id=True", "no JSON object", "the id 4", "not UTF-8"), strict=True):
        assert part in message


def test_few_prompts_are_read_ahead_and_failures_are_their_own(bundled: Any) -> None:
    model, tokenizer = bundled
    taken = 0

    def prompts() -> Any:
        nonlocal taken
        for line, question in enumerate([*QUESTIONS[:10], "?" * 2000, *QUESTIONS[10:20]], start=1):
            taken += 1
            yield Prompt(line, line, [{"role": "user", "content": question}])

    worker = PromptWorker(model, tokenizer, pb.DecodeConfig(max_new_tokens=8), pb.EngineConfig(max_rows=1))
    with Local(worker, 1) as local:
        found = []
        for ended in answers(local, prompts()):
            assert ended is not None
            found.append(ended.record)
            assert taken <= len(found) + IN_FLIGHT
    assert Counter("error" in record for record in found) == {False: 20, True: 1}


def test_an_engine_that_stops_ends_the_job(bundled: Any) -> None:
    model, tokenizer = bundled
    prompts = [Prompt(line, line, [{"role": "user", "content": q}]) for line, q in enumerate(QUESTIONS, start=1)]
    worker = PromptWorker(model, tokenizer, pb.DecodeConfig(), pb.EngineConfig(max_rows=1))
    with Local(worker, 1) as local:
        running = answers(local, prompts)
        next(running)
        worker.engine.close()
        with pytest.raises(StoppedError, match="the engine has stopped"):
            list(running)


def test_half_a_character_stays_spelled_out(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "answers.jsonl", {"decoding": {"seed": 3}}) as file:
        file.write({"id": "\ud800ä", "line": 1, "error": {"message": "no"}})
        file.finish()
    assert file.seed == 3
    assert read(tmp_path / "answers.jsonl")[0]["id"] == "\ud800ä"


def test_without_a_chat_template_a_prompt_is_used_as_it_is(bundled: Any) -> None:
    tokenizer = pb.load("bundled")[1]
    tokenizer.chat_template = None
    assert encode(tokenizer, [USER]) == tokenizer("Two and two?")["input_ids"]
    with pytest.raises(ValueError, match="has no chat template"):
        encode(tokenizer, [USER, ASSISTANT, USER])
