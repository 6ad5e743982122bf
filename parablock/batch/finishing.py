"""A finished file of answers written once more: in the order of its input, or as a Parquet table."""

import json
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from parablock.data.lines import tables

TABLE = ".parquet"
ROWS = 1024  # of a table that are in memory


def write_lines(file: BinaryIO, lines: Iterable[bytes]) -> None:
    """As they are."""
    file.writelines(lines)


def in_order(path: Path) -> Iterator[bytes]:
    """The lines of a file, by the `line` that each is about. Their places alone are held in memory."""
    numbers, starts = array("q"), array("q")
    with path.open("rb") as file:
        start = 0
        for text in file:
            numbers.append(json.loads(text)["line"])
            starts.append(start)
            start += len(text)
        for index in np.argsort(np.asarray(numbers), kind="stable"):
            file.seek(starts[index])
            yield file.readline()


def write_table(file: BinaryIO, lines: Iterable[bytes]) -> None:
    """As a table: an id is a text, the body of a response is JSON."""
    pyarrow, parquet = tables()
    writer = None
    for records in _groups(lines):
        schema = _schema("response" in records[0])
        if writer is None:
            writer = parquet.ParquetWriter(file, schema)
        writer.write_table(pyarrow.Table.from_pylist([_plain(record) for record in records], schema))
    assert writer is not None, "there is a line at least"
    writer.close()


def _groups(lines: Iterable[bytes]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    for text in lines:
        group.append(json.loads(text))
        if len(group) == ROWS:
            yield group
            group = []
    if group:
        yield group


def _schema(responses: bool) -> Any:
    pa, _ = tables()
    text, number = pa.string(), pa.int64()
    if responses:
        response = pa.struct({"status_code": number, "request_id": text, "body": text})
        fields = {"id": text, "custom_id": text, "line": number, "response": response}
        return pa.schema({**fields, "error": pa.struct({"code": text, "message": text})})
    message = pa.struct({"role": text, "content": text})
    fields = {"id": text, "line": number, "messages": pa.list_(message), "finish_reason": text}
    counts = {"prompt_tokens": number, "completion_tokens": number}
    return pa.schema({**fields, **counts, "error": pa.struct({"message": text})})


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """As the table takes it."""
    row = record | {name: _text(record[name]) for name in ("id", "custom_id") if record.get(name) is not None}
    if record.get("response") is not None:
        row["response"] = record["response"] | {"body": json.dumps(record["response"]["body"])}
    if record.get("error") is not None:
        row["error"] = {name: _text(value) for name, value in record["error"].items()}
    return row


def _text(value: object) -> str:
    """Half a character, which JSON can spell, is no text of a table: it stays spelled out."""
    return str(value).encode("utf-8", "backslashreplace").decode()
