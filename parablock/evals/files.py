"""Files with figures."""

from pathlib import Path


def write_text(file: Path, text: str) -> Path:
    """Write a file whole or not at all; its folder is made where it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f"{file.name}.part")
    scratch.write_text(text, encoding="utf-8")
    return scratch.replace(file)
