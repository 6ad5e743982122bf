"""The rows of files, one after the other, however large: JSONL and Parquet, single files or folders of them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parablock.settings import require_library

KINDS = (".jsonl", ".parquet")
ROWS = 256  # of a Parquet file that are in memory


@dataclass(frozen=True)
class Line:
    """A row, or why there is none.

    `number` is its place, from 1, in all files together; `where` names it where there are several, and is empty in a
    single file. Rows of Parquet files have their missing fields left out.
    """

    number: int
    where: str
    row: dict[str, Any] | None
    problem: str = ""


def list_files(path: Path) -> list[Path]:
    """A file, or those of a folder in the order of their names.

    Raises:
        ValueError: nothing there, or a Parquet file and nothing that reads it.
    """
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in KINDS)
        if not files:
            raise ValueError(f"{str(path)!r} holds no {' or '.join(KINDS)} files; check the path")
    elif not path.is_file():
        raise ValueError(f"there is no file at {str(path)!r}; check the path")
    if any(file.suffix == ".parquet" for file in files):
        tables()
    return files


def read_lines(files: Sequence[Path]) -> Iterator[Line]:
    """The rows of all files; empty lines are counted, and passed over."""
    before = 0
    for file in files:
        last = 0
        rows: Iterator[Any] = _parquet(file) if file.suffix == ".parquet" else _lines(file)
        for row in rows:
            last += 1
            where = "" if len(files) == 1 else f"{file.name}, line {last}: "
            if isinstance(row, dict):
                yield Line(before + last, where, row)
            elif row.strip():
                try:
                    yield Line(before + last, where, _object(row))
                except ValueError as error:
                    yield Line(before + last, where, None, str(error))
        before += last


def count_lines(files: Sequence[Path]) -> int:
    """How many rows `read_lines` would give."""
    return sum(_count(file) for file in files)


def tables() -> tuple[Any, Any]:
    """The library for Parquet: pyarrow and its part for files.

    Raises:
        ValueError: it is not installed.
    """
    require_library("pyarrow", "train")
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    return pyarrow, pyarrow.parquet


def _count(file: Path) -> int:
    if file.suffix == ".parquet":
        with _opened(file) as table:
            return int(table.metadata.num_rows)
    return sum(1 for line in _lines(file) if line.strip())


def _lines(file: Path) -> Iterator[bytes]:
    with file.open("rb") as lines:
        yield from lines


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    with _opened(file) as table:
        for batch in table.iter_batches(batch_size=ROWS):
            for row in batch.to_pylist():
                yield _without_missing(row)


def _opened(file: Path) -> Any:
    pyarrow, parquet = tables()
    try:
        return parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{str(file)!r} is no Parquet file ({str(error).splitlines()[0]}); check it") from None


def _without_missing(value: Any) -> Any:
    """A table has every field in every row."""
    if isinstance(value, dict):
        return {name: _without_missing(part) for name, part in value.items() if part is not None}
    return [_without_missing(part) for part in value] if isinstance(value, list) else value


def _object(text: bytes) -> dict[str, Any]:
    try:
        row = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8; save the file in that encoding") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({error}); write one object per line") from None
    if not isinstance(row, dict):
        raise ValueError("it is no JSON object; write one object per line")
    return row
