"""DemoConfig: how long the demo is, and which models it shows."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parablock.checkpoints.named import SMOLLM2, SMOLLM2_AR
from parablock.settings import require


@dataclass(frozen=True)
class DemoConfig:
    """`questions`: how many, of the eight; their answers have at most `max_new_tokens`. `live_minutes=0`: no training.

    `model` is a causal adapter over `ar`; `problems` of the bundled task are of `seed`.
    """

    seed: int = 1
    questions: int = 8
    max_new_tokens: int = 128
    live_minutes: float = 2.0
    problems: int = 50
    model: str = SMOLLM2
    ar: str = SMOLLM2_AR
    folder: Path = Path("parablock-demo")
    report: Path | None = None

    def __post_init__(self) -> None:
        require(self.problems >= 1, "problems", self.problems, "use at least 1")


QUICK: dict[str, Any] = {"questions": 4, "max_new_tokens": 64, "live_minutes": 0.5, "problems": 15}


def sized(seed: int, problems: int | None, quick: bool, live: bool, folder: Path, report: Path | None) -> DemoConfig:
    """The demo as the command's options want it."""
    changes = QUICK if quick else {}
    changes = changes | ({} if problems is None else {"problems": problems}) | ({} if live else {"live_minutes": 0.0})
    return replace(DemoConfig(seed=seed, folder=folder, report=report), **changes)
