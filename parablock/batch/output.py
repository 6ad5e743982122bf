"""The file of answers: whole or not at all under its name; killed at any moment, the same job goes on with it."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import SystemRandom
from typing import Any

from filelock import FileLock, Timeout

from parablock.batch.finishing import TABLE, in_order, write_lines, write_table
from parablock.data.lines import tables
from parablock.evals.files import write_text

FEW = 5  # lines that are named where many have failed


@dataclass
class Tally:
    """What lines of an output hold: answers, those of them cut at `max_new_tokens`, lines without one."""

    answered: int = 0
    cut: int = 0
    failed: int = 0
    first_failed: list[int] = field(default_factory=list)

    def add(self, record: dict[str, Any]) -> None:
        """Count one more."""
        if failed(record):
            self.failed += 1
            self.first_failed = sorted([*self.first_failed, record["line"]])[:FEW]
        else:
            self.answered += 1
            self.cut += _is_cut(record)


def failed(record: dict[str, Any]) -> bool:
    """Whether a line of the output holds no answer; a response may be an error, too."""
    return record.get("error") is not None or ("response" in record and record["response"]["status_code"] != 200)


def _is_cut(record: dict[str, Any]) -> bool:
    answers = record["response"]["body"]["choices"] if "response" in record else [record]
    return any(answer["finish_reason"] == "length" for answer in answers)


class AnswerFile:
    """The output. Its lines go to PATH.part, beside PATH.job, which says whose they are, until `finish` names it PATH.

    Args:
        path: the output; with the suffix .parquet a table.
        job: all that the answers depend on. What a process that was killed has written for the same job is kept;
            `lines` are those of the input that it is about.
        ordered: the finished file's lines stand in the order of the input.

    Raises (by `with`):
        ValueError: there is an output, another process writes it, or what is there belongs to another job.
    """

    def __init__(self, path: Path, job: dict[str, Any], *, ordered: bool = False) -> None:
        self.path, self.part = path, path.with_name(f"{path.name}.part")
        self.lines: set[int] = set()
        self.tally = Tally()
        self.seed = 0
        self._ordered = ordered
        self._table = path.suffix == TABLE
        self._job = json.loads(json.dumps(job))
        self._job_file = path.with_name(f"{path.name}.job")
        self._lock = FileLock(path.with_name(f"{path.name}.lock"))

    def __enter__(self) -> "AnswerFile":
        if self.path.exists():
            raise ValueError(f"{str(self.path)!r} is there already, finished; name another file")
        if self._table:
            tables()  # is it installed?
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another process writes {str(self.path)!r}; wait for it, or name another file") from None
        try:
            if self.part.exists() and self.part.stat().st_size:
                self._resume()
            else:
                given = self._job["decoding"]["seed"]
                self.seed = SystemRandom().randrange(2**31) if given is None else given
                write_text(self._job_file, json.dumps({"job": self._job, "seed": self.seed}, indent=1) + "\n")
            self._file = self.part.open("ab")
        except BaseException:
            self._lock.release()
            raise
        return self

    def _resume(self) -> None:
        """Read what is there; a last line that is not whole is cut off."""
        remedy = f"name another output, or remove {str(self.part)!r}"
        if not self._job_file.exists():
            raise ValueError(f"nothing says which job {str(self.part)!r} belongs to; {remedy}")
        known = json.loads(self._job_file.read_text(encoding="utf-8"))
        for name, value in self._job.items():
            if (there := known["job"].get(name)) != value:
                raise ValueError(
                    f"{str(self.part)!r} belongs to another job ({name}: {there!r} there, {value!r} here); {remedy}"
                )
        self.seed = known["seed"]
        whole = 0
        with self.part.open("rb+") as file:
            for text in file:
                if text.endswith(b"\n"):
                    whole += len(text)
                    self._note(json.loads(text))
            file.truncate(whole)

    def write(self, record: dict[str, Any]) -> None:
        """Add a line; from now on a kill does not lose it."""
        # half a character, which JSON can spell, is no UTF-8: it stays spelled out
        text = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")
        self._file.write(text + b"\n")
        self._file.flush()
        self._note(record)

    def _note(self, record: dict[str, Any]) -> None:
        self.lines.add(record["line"])
        self.tally.add(record)

    def finish(self) -> None:
        """All is there: the output gets its name, once it has its order and its format."""
        os.fsync(self._file.fileno())
        self._file.close()
        whole = self.part
        if self._ordered or self._table:
            whole = self.path.with_name(f"{self.path.name}.whole")
            with whole.open("wb") as file, self.part.open("rb") as part:
                (write_table if self._table else write_lines)(file, in_order(self.part) if self._ordered else part)
                file.flush()
                os.fsync(file.fileno())
        whole.replace(self.path)
        self.part.unlink(missing_ok=True)
        self._job_file.unlink()

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
            if not self.lines:  # a beginning that nobody has to go on with
                self.part.unlink(missing_ok=True)
                self._job_file.unlink(missing_ok=True)
        finally:
            with suppress(OSError):
                os.unlink(self._lock.lock_file)
            self._lock.release()
