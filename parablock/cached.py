"""What is made once and kept in the user's cache folder: whole or not at all, by one process, within a bound."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

BOUND = "PARABLOCK_CACHE_GB"  # the environment variable
DEFAULT_GB = 20.0
IN_USE = 600.0  # seconds since its last use in which an entry is never removed


def cache_folder() -> Path:
    """`parablock` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "parablock"


def cached_directory(folder: Path, key: str, make: Callable[[Path], None]) -> Path:
    """The directory `key` in `folder`, filled by `make` on first use.

    Processes that want it at once wait for the one that makes it. What one that was killed has left is removed. Then
    the least recently used directories go until all fit into PARABLOCK_CACHE_GB, but for those used just now.

    Raises:
        ValueError: PARABLOCK_CACHE_GB is no positive number.
    """
    bound = cache_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    entry, scratch = folder / key, _scratch(folder, key)
    with FileLock(_lock(folder, key)):
        shutil.rmtree(scratch, ignore_errors=True)
        if not entry.is_dir():
            scratch.mkdir()
            try:
                make(scratch)
                scratch.rename(entry)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        os.utime(entry)  # its last use
    _tidy(folder, bound)
    return entry


def cache_bytes() -> float:
    """How much may be kept; ValueError where the environment says something else than a positive number."""
    value = os.environ.get(BOUND) or str(DEFAULT_GB)
    try:
        size = float(value)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise ValueError(f"{BOUND}={value!r} is no positive number; set it to gigabytes, or leave it out")
    return size * 1e9


def _tidy(folder: Path, bound: float) -> None:
    """Remove what killed processes have left, and the least recently used entries beyond the bound."""
    for scratch in folder.glob(".*.part"):
        with _unless_locked(folder, scratch.name[1:].removesuffix(".part")) as free:
            if free:
                shutil.rmtree(scratch, ignore_errors=True)
    entries = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    sizes = {entry: sum(file.stat().st_size for file in entry.iterdir()) for entry in entries}
    total = sum(sizes.values())
    for entry in sorted(entries, key=_last_used):
        if total <= bound:
            return
        with _unless_locked(folder, entry.name) as free:
            if free and time.time() - _last_used(entry) > IN_USE:
                gone = _scratch(folder, entry.name)
                entry.rename(gone)  # at once; half of it would be taken for whole
                shutil.rmtree(gone)
                total -= sizes[entry]


def _last_used(entry: Path) -> float:
    return entry.stat().st_mtime


def _scratch(folder: Path, key: str) -> Path:
    return folder / f".{key}.part"


def _lock(folder: Path, key: str) -> Path:
    return folder / f".{key}.lock"


@contextmanager
def _unless_locked(folder: Path, key: str) -> Iterator[bool]:
    """Whether no other process makes or looks for this entry; none does until the block ends."""
    try:
        with FileLock(_lock(folder, key), blocking=False):
            yield True
    except Timeout:
        yield False
