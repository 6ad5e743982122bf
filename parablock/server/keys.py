"""The keys that clients may send: one from the environment, or several from a file, each with its limits."""

import hashlib
import hmac
import re
import stat
import tomllib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIMITS = ("requests_per_minute", "tokens_per_minute")
EXAMPLE = "write [NAME], and below it key = 'what NAME sends'"


@dataclass(frozen=True)
class Key:
    """Who may ask, and how much; of the key itself only the hash is kept."""

    name: str | None  # None: the only one, which has no name
    digest: bytes = field(repr=False)
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


def given_keys(path: str | None, key: str | None) -> tuple[Key, ...]:
    """Those of a file, or the one of the environment; none: everybody may ask.

    Raises:
        ValueError: both are given, or the file is wrong; the message says where.
        OSError: the file cannot be read.
    """
    if path is None:
        return () if key is None else (Key(None, _digest(key)),)
    if key is not None:
        raise ValueError(f"api_keys={path!r} and PARABLOCK_API_KEY are both given; write that key into the file, too")
    return _read(Path(path))


def find_key(keys: Sequence[Key], authorization: bytes) -> Key | None:
    """Whose key this header holds; however many there are and whatever it is, that takes as long."""
    digest = hashlib.sha256(authorization).digest()
    found = [key for key in keys if hmac.compare_digest(key.digest, digest)]
    return found[0] if found else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(b"Bearer " + key.encode()).digest()


def _read(path: Path) -> tuple[Key, ...]:
    """The keys of a file in TOML: a table for each."""
    try:
        text = path.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except OSError as error:
        raise OSError(f"--api-keys {path} cannot be read ({error.strerror}); name a file") from None
    except ValueError as error:  # of tomllib it names the line
        raise ValueError(f"{path}: no TOML: {error}") from None
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        warnings.warn(f"{path} can be read by others on this machine: chmod 600 {path}", stacklevel=2)
    if not tables:
        raise ValueError(f"{path} holds no keys; {EXAMPLE}")
    keys: dict[bytes, Key] = {}
    for name, table in tables.items():
        try:
            key = _key(name, table)
            if key.digest in keys:
                raise ValueError(f"the key is that of [{keys[key.digest].name}]; give everybody their own")
        except ValueError as error:
            raise ValueError(f"{path}, line {_line(text, name)}: [{name}]: {error}") from None
        keys[key.digest] = key
    return tuple(keys.values())


def _key(name: str, table: Any) -> Key:
    if not isinstance(table, dict):
        raise ValueError(f"this is no table; {EXAMPLE}")
    if unknown := set(table) - {"key", *LIMITS}:
        raise ValueError(f"{min(unknown)} is unknown; a key has: key, {', '.join(LIMITS)}")
    key = table.get("key")
    if not isinstance(key, str) or not re.fullmatch(r"[!-~]{16,}", key):
        raise ValueError("key must be a text of at least 16 ASCII characters without blanks (openssl rand -hex 24)")
    for limit in LIMITS:
        value = table.get(limit, 1)
        if type(value) is not int or value < 1:
            raise ValueError(f"{limit}={value!r} is out of range; use at least 1, or leave it out")
    return Key(name, _digest(key), **{limit: table.get(limit) for limit in LIMITS})


def _line(text: str, name: str) -> int:
    """Where a name stands first."""
    before = re.split(rf"""^[ \t]*\[?[ \t]*["']?{re.escape(name)}\b""", text, maxsplit=1, flags=re.M)[0]
    return before.count("\n") + 1
