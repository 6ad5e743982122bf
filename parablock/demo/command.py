"""`parablock demo`: a real model answers several tokens at a time, word for word; then the paper's trade, in small.

The story in order: a chat model answers eight questions autoregressively; an adapter that drafts for it is trained
live; the bundled adapter answers the same questions; all decoders are compared (`real.py`, `live.py`). Then block
diffusion on the puzzle model, accuracy against threshold (`puzzles.py`).
"""

import json
import time
from dataclasses import asdict
from typing import Any

from rich.console import Console

from parablock.demo.puzzles import show_puzzles
from parablock.demo.real import show_real
from parablock.demo.sizes import DemoConfig
from parablock.evals.files import write_text
from parablock.evals.machine import machine
from parablock.settings import require_library


def run_demo(config: DemoConfig, console: Console) -> dict[str, Any]:
    """Run the demo; returns the report that was also written as JSON."""
    require_library("matplotlib", "plot")
    started = time.perf_counter()
    report_path = config.report or config.folder / "report.json"
    for directory in (config.folder, report_path.parent):
        directory.mkdir(parents=True, exist_ok=True)
    real = show_real(config, console)
    puzzles = show_puzzles(config, console)
    seconds = time.perf_counter() - started
    report = {
        "config": {**asdict(config), "folder": str(config.folder), "report": str(report_path)},
        "machine": machine(),
        "real": real,
        "puzzles": [result.as_dict() for result in puzzles],
        "seconds": seconds,
    }
    write_text(report_path, json.dumps(report, indent=2) + "\n")
    pictures = ", ".join(sorted(path.name for path in config.folder.glob("*.png")))
    console.print(f"{seconds / 60:.1f} min. In {config.folder}: {pictures}; all figures: {report_path}", soft_wrap=True)
    commands = [
        (f"parablock demo --no-live --seed {config.seed + 1}", "other test problems"),
        ("parablock generate --json 'QUESTION'", "tokens and figures of one answer"),
    ]
    if real is not None:
        commands.insert(0, (f"parablock chat --model {config.model}", "talk to the real model"))
    console.print("next:")
    width = max(len(command) for command, _ in commands)
    for command, what in commands:
        console.print(f"  {command:{width}s}  {what}")
    return report
