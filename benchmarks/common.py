"""What every benchmark writes beside its figures: the command, the commit, the machine, the versions."""

import json
import subprocess
from pathlib import Path
from typing import Any

from parablock.evals.files import write_text
from parablock.evals.machine import machine

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parent.parent / "docs" / "images"


def setting(command: str) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {"command": command, "commit": commit.stdout.strip(), **machine()}


def write_json(file: Path, report: Any, indent: int | None = None) -> None:
    """Whole or not at all."""
    write_text(file, json.dumps(report, indent=indent) + "\n")


def write(name: str, report: dict[str, Any]) -> None:
    write_json(RESULTS / f"{name}.json", report, indent=2)
    print(json.dumps(report))
