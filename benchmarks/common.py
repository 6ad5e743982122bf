"""What every benchmark writes beside its figures: the machine, the versions, the commit."""

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from parablock.bench.machine import processor

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parent.parent / "docs" / "images"


def setting(command: str) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "command": command,
        "commit": commit.stdout.strip(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write(name: str, report: dict[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    scratch = RESULTS / f"{name}.part"
    scratch.write_text(json.dumps(report, indent=2) + "\n")
    scratch.replace(RESULTS / f"{name}.json")
    print(json.dumps(report))
