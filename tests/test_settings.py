"""Every setting explains itself, in one place: the options, the server's schema and the document say the same."""

import dataclasses
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import settings_tables
import typer

from parablock.batch.config import BatchConfig
from parablock.bench.config import BenchConfig
from parablock.cli import app
from parablock.decoding.config import DecodeConfig
from parablock.evals.config import EvalConfig
from parablock.server.config import ServeConfig
from parablock.server.protocol import DECODING, ChatBody
from parablock.settings import help_of
from parablock.training.config import AdaptConfig

ROOT = Path(__file__).parent.parent


def config_classes() -> list[Any]:
    rooms = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "parablock").glob("*/config.py")]
    modules = [import_module(".".join(room.parts)) for room in rooms]
    found = [c for m in modules for c in vars(m).values() if dataclasses.is_dataclass(c) and c.__module__ == m.__name__]
    return sorted(found, key=lambda c: c.__name__)


def test_every_setting_has_a_help_text() -> None:
    assert len(config_classes()) == 9
    for config_class in config_classes():
        for field in dataclasses.fields(config_class):
            assert field.metadata.get("help", "").endswith("."), (config_class.__name__, field.name)


def test_the_document_is_current() -> None:
    assert {*settings_tables.CLASSES} == {*config_classes()}
    assert settings_tables.PAGE.read_text() == settings_tables.page(), "run: python scripts/settings_tables.py"


@pytest.mark.parametrize(
    ("command", "config_class", "apart"),
    [
        ("generate", DecodeConfig, ()),
        ("chat", DecodeConfig, ()),
        ("batch", DecodeConfig, ()),
        ("batch", BatchConfig, ()),
        ("eval", DecodeConfig, ()),
        ("eval", EvalConfig, ()),
        ("bench", BenchConfig, ()),
        ("serve", ServeConfig, ()),
        ("adapt", AdaptConfig, ("model",)),
    ],
)
def test_commands_have_an_option_for_every_setting(command: str, config_class: Any, apart: tuple[str, ...]) -> None:
    known = {option.name: option.help for option in typer.main.get_command(app).commands[command].params}  # type: ignore[attr-defined]
    for field in dataclasses.fields(config_class):
        if field.name not in apart and field.metadata["command"]:
            assert known[field.metadata["option"] or field.name] == field.metadata["help"]


def test_options_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists, switches, repeated options and other names arrive as the class holds them; the rest is the default."""
    bench: list[Any] = []
    evaluation: list[Any] = []
    monkeypatch.setattr("parablock.bench.command.run_bench", lambda *given, **_: bench.extend(given))
    monkeypatch.setattr("parablock.evals.command.run_eval", lambda *given, **_: evaluation.extend(given))
    line = "bench --threshold 0.5,0.9 --sub-block-cache on,off --compile off,on --requests 3"
    app(line.split(), standalone_mode=False)
    assert bench[0] == BenchConfig(
        thresholds=(0.5, 0.9), sub_block_cache=(True, False), compile=(False, True), requests=3
    )
    line = "eval --tasks a,b --data a=x --data b=y --question-seed 4 --seed 5 --no-chat --threshold 0.8"
    app([*line.split(), "--stop-token-ids", "7"], standalone_mode=False)
    assert evaluation[1] == EvalConfig(tasks=("a", "b"), data=("a=x", "b=y"), seed=4, chat=False)
    assert evaluation[2] == {"seed": 5, "threshold": 0.8, "stop_token_ids": (7,)}


def test_the_servers_schema_says_the_same() -> None:
    schema = ChatBody.model_json_schema()["properties"]
    for name in DECODING:
        assert schema[name]["description"] == help_of(DecodeConfig, name)
    assert schema["max_tokens"]["description"] == help_of(DecodeConfig, "max_new_tokens")
