"""`parablock batch` on OpenAI's batch format, Parquet files and folders; output in order and as a table."""

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import run, start

import parablock as pb
from parablock.batch.calls import read_calls
from parablock.batch.finishing import in_order
from parablock.batch.running import Ended
from parablock.data.chat import encode_prompt
from parablock.data.lines import count_lines, list_files, read_lines
from parablock.data.word_problems import word_problem
from parablock.engine.config import EngineConfig
from parablock.server.app import create_app
from parablock.server.config import ServeConfig
from parablock.server.served import ServedModel

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
QUESTIONS = [word_problem("test", 3, i).question for i in range(30)]


def call(number: int, url: str = CHAT, **body: Any) -> dict[str, Any]:
    content: dict[str, Any] = {"messages": [{"role": "user", "content": QUESTIONS[number % 30]}]}
    if url == TEXT:
        content = {"prompt": QUESTIONS[number % 30]}
    body = {"model": "bundled", "max_tokens": 24, **content, **body}
    return {"custom_id": f"request-{number}", "method": "POST", "url": url, "body": body}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_chance(body: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the time, or on what runs beside it."""
    usage = {name: body["usage"][name] for name in ("prompt_tokens", "completion_tokens")} if "usage" in body else None
    return {name: body.get(name) for name in ("object", "model", "choices", "error")} | {"usage": usage}


GOOD = [
    {}, {"temperature": 1.5, "seed": 4}, {"n": 2, "temperature": 1.0, "seed": 1}, {"stop": ["the", "3"]},
    {"max_tokens": None, "max_completion_tokens": 3}, {"mode": "autoregressive", "model": None},
]  # fmt: skip
BAD: list[dict[str, Any]] = [
    {"temperature": "hot"}, {"messages": []}, {"model": "gpt-5"}, {"tools": [{}]}, {"max_tokens": 100_000},
    {"threshold": 2},
]  # fmt: skip


async def answered(requests: list[dict[str, Any]]) -> list[tuple[int, Any]]:
    """Status and body that the server gives."""
    served = ServedModel("bundled", *pb.load("bundled"), EngineConfig(max_rows=2))
    try:
        transport = httpx.ASGITransport(create_app([served], ServeConfig(max_rows=2)))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            replies = [await client.post(request["url"], json=request["body"]) for request in requests]
        return [(reply.status_code, without_chance(reply.json())) for reply in replies]
    finally:
        served.engine.close()


def test_bodies_are_read_and_answered_as_by_the_server(tmp_path: Path) -> None:
    requests = [call(i, **body) for i, body in enumerate([*GOOD, *BAD])] + [call(20, TEXT), call(21, TEXT, prompt=[])]
    invalid: list[tuple[Any, str]] = [
        ("{ no json", "invalid_json"), (call(0), "duplicate_custom_id"),
        (call(22) | {"method": "GET"}, "invalid_method"),
        (call(23) | {"url": "/v1/embeddings"}, "invalid_url"), (call(24) | {"custom_id": 3}, "invalid_custom_id"),
        (call(25, stream=True), "invalid_body"), (call(26) | {"body": [1]}, "invalid_body"),
    ]  # fmt: skip
    source = write(tmp_path / "requests.jsonl", [*requests, *(line for line, _ in invalid)])
    output = tmp_path / "answers.jsonl"
    out = run("batch", source, "--model", "bundled", "-o", output, "--max-rows", "2", "--ordered")
    failures = len(BAD) + 1 + len(invalid)
    assert out.returncode == 1
    assert out.stderr.startswith(f"parablock: {failures} lines have no answer (line 7, 8, 9, 10, 11 ...)"), out.stderr
    found = read(output)
    assert [record["line"] for record in found] == list(range(1, len(found) + 1))
    told, refused = found[: len(requests)], found[len(requests) :]
    expected = asyncio.run(answered(requests))
    for record, request, (status, body) in zip(told, requests, expected, strict=True):
        assert (record["custom_id"], record["error"]) == (request["custom_id"], None)
        assert record["response"]["status_code"] == status
        assert without_chance(record["response"]["body"]) == body
    assert [status for status, _ in expected].count(200) == len(GOOD) + 1
    for record, (_, code) in zip(refused, invalid, strict=True):
        assert (record["response"], record["error"]["code"]) == (None, code)
    ids = [record["custom_id"] for record in found if record["custom_id"]]
    assert len(ids) == len(set(ids))


def test_requests_go_on_after_a_kill_into_a_table(tmp_path: Path) -> None:
    requests = [call(i, max_tokens=20, threshold=1.0) for i in range(30)]
    source, output = write(tmp_path / "requests.jsonl", requests), tmp_path / "answers.parquet"
    part = tmp_path / "answers.parquet.part"
    with start("batch", source, "--model", "bundled", "-o", output, "--max-rows", "1") as process:
        while not (part.exists() and part.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None, process.err
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = part.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    out = run("batch", source, "--model", "bundled", "-o", output, "--ordered")
    assert (out.returncode, out.stderr) == (0, "")
    rows = pq.read_table(output).to_pylist()
    assert [row["custom_id"] for row in rows] == [request["custom_id"] for request in requests]
    before = {record["id"] for record in map(json.loads, kept.splitlines())}
    assert before <= {row["id"] for row in rows}  # these were not run again
    model, tokenizer = pb.load("bundled")
    prompts = [encode_prompt(tokenizer, request["body"]["messages"]) for request in requests]
    texts = pb.generate(model, prompts, pb.DecodeConfig(max_new_tokens=20, threshold=1.0)).tokens
    for row, tokens in zip(rows, texts, strict=True):
        said = json.loads(row["response"]["body"])["choices"][0]["message"]["content"]
        assert said == tokenizer.decode(tokens, skip_special_tokens=True)
    assert {path.name for path in tmp_path.iterdir()} == {"requests.jsonl", "answers.parquet"}


def test_a_folder_of_both_kinds_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    table = pa.Table.from_pylist([
        {"id": "t1", "messages": [{"role": "user", "content": QUESTIONS[2]}], "prompt": None},
        {"id": "t2", "messages": None, "prompt": QUESTIONS[3]},
        {"id": None, "messages": None, "prompt": None},
    ])  # fmt: skip
    pq.write_table(table, folder / "b.parquet", row_group_size=1)
    write(folder / "a.jsonl", [{"prompt": QUESTIONS[0]}, "", {"prompt": QUESTIONS[1], "id": "x"}])
    write(folder / "c.jsonl", [{"prompt": QUESTIONS[4], "id": "x"}, {"prompt": QUESTIONS[4], "id": 7}])
    (folder / "notes.txt").write_text("not read")
    files = list_files(folder)
    assert [file.name for file in files] == ["a.jsonl", "b.parquet", "c.jsonl"]
    assert count_lines(files) == 7
    assert [line.number for line in read_lines(files)] == [1, 3, 4, 5, 6, 7, 8]
    output = tmp_path / "answers.parquet"
    out = run("batch", folder, "--model", "bundled", "-o", output, "--max-new-tokens", "8", "--ordered")
    assert out.returncode == 1
    rows = pq.read_table(output).to_pylist()
    assert [row["id"] for row in rows] == ["1", "x", "t1", "t2", "6", None, "7"]
    asked = [row["messages"][0]["content"] if row["messages"] else None for row in rows]
    assert asked == [*QUESTIONS[:4], None, None, QUESTIONS[4]]
    assert rows[4]["error"]["message"].startswith("b.parquet, line 3: ")
    assert rows[5]["error"]["message"].startswith("c.jsonl, line 1: the id 'x' stands in an earlier line")


def test_bodies_in_a_table(tmp_path: Path) -> None:
    whole = call(0) | {"body": json.dumps(call(0)["body"])}  # a text, since bodies differ in their fields
    pq.write_table(pa.Table.from_pylist([whole, whole | {"custom_id": "b", "body": "{"}]), tmp_path / "a.parquet")
    first, second = read_calls(read_lines([tmp_path / "a.parquet"]))
    assert not isinstance(first, Ended)
    assert json.loads(first.body) == call(0)["body"]
    assert isinstance(second, Ended)
    assert second.record["error"]["code"] == "invalid_body"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--temperature", "1"], "temperature=1.0 would change nothing: each request's body says its own"),
        (["-o", "in/answers.jsonl"], "lies among the files that are read"),
        (["in/broken.parquet"], "is no Parquet file"),
        (["empty"], "holds no .jsonl or .parquet files"),
    ],
)
def test_refusals(args: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "empty").mkdir()
    write(tmp_path / "in" / "a.jsonl", [call(0)])
    if args[0] == "in/broken.parquet":
        (tmp_path / args[0]).write_text("no table")
    source = [] if args[0].startswith("-") else args
    rest = args if args[0].startswith("-") else []
    output = [] if "-o" in rest else ["-o", "answers.jsonl"]
    out = run("batch", *(source or ["in"]), "--model", "bundled", *output, *rest, cwd=tmp_path)
    assert (out.returncode, len(out.stderr.splitlines())) == (2, 1), out.stderr
    assert message in out.stderr


def test_order_of_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "part", [{"line": line, "text": "ä" * line} for line in (5, 1, 30, 2)])
    assert [json.loads(text)["line"] for text in in_order(path)] == [1, 2, 5, 30]
