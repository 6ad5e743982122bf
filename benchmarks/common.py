"""What every benchmark writes beside its figures: the command, the commit, the machine, the versions."""

import json
import subprocess
from pathlib import Path
from typing import Any

from parablock.bench.machine import machine

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parent.parent / "docs" / "images"


def setting(command: str) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {"command": command, "commit": commit.stdout.strip(), **machine()}


def write(name: str, report: dict[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    scratch = RESULTS / f"{name}.part"
    scratch.write_text(json.dumps(report, indent=2) + "\n")
    scratch.replace(RESULTS / f"{name}.json")
    print(json.dumps(report))
