"""Where samples come from: local JSONL and Parquet files, datasets of the hub, and the bundled task."""

import hashlib
import inspect
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock

from parablock.data import chat, formats
from parablock.data.chat import IGNORE, Sample, encode_chat
from parablock.data.formats import to_chat
from parablock.data.word_problems import EncodedProblems
from parablock.settings import require_library

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TooLong = Literal["drop", "truncate", "refuse"]

SHORTHANDS = {
    "alpaca": "tatsu-lab/alpaca",
    "nemotron": "nvidia/Llama-Nemotron-Post-Training-Dataset:SFT@math+code+science+chat+safety",
}
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
JSON_LINE = "a line of JSON"  # the one column of a JSONL file
BUNDLED_TASK = "word-problems"
KEPT, TRUNCATED, TOO_LONG, NOTHING_TO_LEARN = "kept", "truncated", "too long", "nothing to learn"


@dataclass(frozen=True)
class Data:
    """Encoded samples, their token counts (None: not counted yet), and what became of the rows they were made from."""

    samples: Sequence[Sample]
    lengths: Sequence[int] | None
    counts: dict[str, int]


class _Encoded(Sequence[Sample]):
    """Samples in a memory-mapped Arrow table: any number of them takes no memory."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        row = self.table[index]
        return Sample(row["input_ids"], row["labels"])


def load_data(
    tokenizer: "PreTrainedTokenizerBase",
    spec: str,
    *,
    context_length: int,
    too_long: TooLong = "drop",
    max_samples: int | None = None,
    streaming: bool = False,
    workers: int = 1,
) -> Data:
    """Read and encode the samples that `spec` names.

    `spec`: a `.jsonl`, `.json` or `.parquet` file or a folder of them; a hub id with optional config and split,
    `ORG/NAME[:CONFIG][@SPLIT]`; `alpaca`, `nemotron`; or `word-problems[:START]` (the bundled task; `max_samples` of
    them). With `streaming` only as much of a hub dataset is fetched as `max_samples` needs.

    Raises:
        ValueError: nothing there, unknown columns, no sample that can be learned, a tokenizer without a chat template,
            or (`too_long="refuse"`) a sample longer than the context.
    """
    if spec.split(":")[0] == BUNDLED_TASK:
        start = int(spec.partition(":")[2] or 0)
        problems = EncodedProblems(tokenizer, seed=0, start=start, count=max_samples or 10_000)
        return Data(problems, None, {KEPT: len(problems)})
    rows = _rows(spec, max_samples, streaming)
    if not len(rows):
        raise ValueError(f"data={spec!r} has no rows; check the file, or the split")
    to_chat(_row(rows[0]))  # unknown columns are told at once, not by a worker
    encode = {"tokenizer": tokenizer, "context_length": context_length, "too_long": too_long}
    key = _key(rows, tokenizer, context_length, too_long)
    with FileLock(f"{rows.cache_files[0]['filename'] if rows.cache_files else tempfile.gettempdir()}.{key}.lock"):
        # of several processes the first one tokenizes, the others read what it has written
        encoded = rows.map(
            _encode, fn_kwargs=encode, remove_columns=rows.column_names, num_proc=workers if workers > 1 else None,
            desc="tokenizing", new_fingerprint=key,
        )  # fmt: skip
        usable = encoded.filter(_usable, input_columns="fate", new_fingerprint=f"{key}-usable")
    fates = encoded["fate"]
    counts = {fate: sum(f == fate for f in fates) for fate in (KEPT, TRUNCATED, TOO_LONG, NOTHING_TO_LEARN)}
    if not len(usable):
        told = ", ".join(f"{n} {fate}" for fate, n in counts.items() if n)
        raise ValueError(f"data={spec!r} has no sample to learn from ({told}); check the roles and context_length")
    return Data(_Encoded(usable.select_columns(["input_ids", "labels"])), list(usable["length"]), counts)


def _key(rows: Any, tokenizer: Any, *settings: object) -> str:
    """Names the samples that these rows, this tokenizer, these settings and this code make."""
    code = "".join(inspect.getsource(module) for module in (chat, formats, sys.modules[__name__]))
    known = (rows._fingerprint, sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, settings, code)
    return hashlib.blake2b(repr(known).encode(), digest_size=8).hexdigest()


def _rows(spec: str, max_samples: int | None, streaming: bool) -> Any:
    """The raw rows as a `datasets.Dataset`."""
    require_library("datasets", "train")
    import datasets

    path = Path(spec).expanduser()
    options: dict[str, Any]
    if path.exists():
        files = sorted(f for f in path.rglob("*") if f.suffix in READERS) if path.is_dir() else [path]
        kinds = {READERS.get(f.suffix) for f in files}
        if len(kinds) != 1 or None in kinds:
            raise ValueError(f"data={spec!r} holds no {', '.join(READERS)} files, or several kinds; name one kind")
        if all(f.stat().st_size == 0 for f in files):
            raise ValueError(f"data={spec!r} is empty; it needs at least one row")
        name = str(kinds.pop())
        options = {"data_files": [str(f) for f in files], "split": "train"}
        if all(f.suffix == ".jsonl" for f in files):  # each line may have fields, and kinds of values, of its own
            name, options["features"] = "text", datasets.Features({JSON_LINE: datasets.Value("string")})
    else:
        if spec.count("/") > 1 or spec.startswith((".", "/", "~")) or Path(spec).suffix in READERS:
            raise ValueError(f"there is no data at {spec!r}; check the path")
        name, _, split = SHORTHANDS.get(spec, spec).partition("@")
        name, _, config = name.partition(":")
        options = {"name": config or None, "split": split or "train"}
    try:
        rows = datasets.load_dataset(name, streaming=streaming, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(f"data={spec!r} could not be read ({reason}); check the file, the id or the split") from error
    if streaming:
        return datasets.Dataset.from_generator(_take, gen_kwargs={"rows": rows, "count": max_samples})
    return rows if max_samples is None else rows.select(range(min(max_samples, len(rows))))


def _take(rows: Any, count: int | None) -> Iterator[dict[str, Any]]:
    yield from rows if count is None else rows.take(count)


def _encode(row: dict[str, Any], tokenizer: Any, context_length: int, too_long: TooLong) -> dict[str, Any]:
    """A row's sample and its fate."""
    row = _row(row)
    said = to_chat(row)
    if isinstance(said, str):
        ids = [*tokenizer(said)["input_ids"], tokenizer.eos_token_id]
        sample = Sample(ids, list(ids))
    elif any(message["role"] == "assistant" for message in said):
        sample = encode_chat(tokenizer, said)
        if row.get("finish_reason") == "length" and sample.input_ids[-1] == tokenizer.eos_token_id:
            sample = Sample(sample.input_ids[:-1], sample.labels[:-1])  # it was cut off: where it ends is not learned
    else:
        sample = Sample([], [])
    fate = KEPT
    if len(sample.input_ids) > context_length:
        if too_long == "refuse":
            raise ValueError(
                f"a sample has {len(sample.input_ids)} tokens, more than context_length={context_length}; raise it, or "
                "pass too_long='drop' or 'truncate'"
            )
        fate = TOO_LONG if too_long == "drop" else TRUNCATED
        sample = Sample(sample.input_ids[:context_length], sample.labels[:context_length])
    if fate != TOO_LONG and all(label == IGNORE for label in sample.labels[1:]):
        fate = NOTHING_TO_LEARN
    return {
        "input_ids": sample.input_ids, "labels": sample.labels, "length": len(sample.input_ids), "fate": fate
    }  # fmt: skip


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """A row's fields; of a line of JSON, which stands alone, those in it."""
    if JSON_LINE in row:
        text = row[JSON_LINE]
        try:
            row = json.loads(text) if text.strip() else {"error": "an empty line"}
        except json.JSONDecodeError as error:
            raise ValueError(f"the line {text[:60]!r} could not be read ({error}); give one object per line") from error
        if not isinstance(row, dict):
            raise ValueError(f"a line could not be read: it is {type(row).__name__}; write one object per line")
    # a table's missing fields come back as None
    return {name: value for name, value in row.items() if value is not None}


def _usable(fate: str) -> bool:
    return fate in (KEPT, TRUNCATED)
