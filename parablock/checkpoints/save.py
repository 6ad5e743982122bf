"""Write checkpoints, whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parablock.config import Model


def save(model: Model, tokenizer: Any, path: str | Path) -> None:
    """Write model and tokenizer to `path` (safetensors), whole or not at all; `export` writes other layouts.

    Raises:
        ValueError: `path` exists and is not an empty directory.
    """
    with new_directory(path) as whole:
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)


def require_new(path: Path) -> None:
    """ValueError if `path` exists and is not an empty directory."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{str(path)!r} exists and is not empty; name a new directory")


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """A scratch directory beside `path` that takes its place when the block ends without an error.

    Raises:
        ValueError: `path` exists and is not an empty directory.
    """
    path = Path(path)
    require_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        whole = Path(scratch) / path.name
        whole.mkdir()
        yield whole
        if path.exists():
            path.rmdir()
        shutil.move(whole, path)
