"""The demo's live part, a few seconds long (the command and its files are in test_cli.py)."""

import io
import json
from pathlib import Path

from rich.console import Console

from parablock.demo import LIVE_RECIPE, DemoConfig, run_demo


def test_live_adaptation_lowers_the_loss_and_is_compared(tmp_path: Path) -> None:
    screen = io.StringIO()
    config = DemoConfig(seed=2, problems=2, live_minutes=0.05, folder=tmp_path)
    run_demo(config, Console(file=screen, highlight=False, width=120))
    report = json.loads((tmp_path / "report.json").read_text())
    live = report["live"]
    assert live["steps"] == LIVE_RECIPE.log_every  # as many as were planned for so short a time, no more
    assert live["log"][-1]["loss"] < 6.5  # an AR model's own masked cross-entropy is about 6
    assert live["log"][-1]["tokens_per_forward"] > 0
    assert [r["name"].split(",")[0] for r in report["results"][:3]] == ["autoregressive", "speculative", "live"]
    assert "adapting live" in screen.getvalue()
