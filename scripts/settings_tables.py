"""Write docs/settings.md from the config classes: every setting with its type, default and help text."""

import dataclasses
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from parablock.batch.config import BatchConfig
from parablock.bench.config import BenchConfig
from parablock.cluster.config import ClusterConfig
from parablock.decoding.config import DecodeConfig
from parablock.engine.config import EngineConfig
from parablock.evals.config import EvalConfig
from parablock.server.config import ServeConfig
from parablock.settings import help_of
from parablock.training.config import AdaptConfig, TrainConfig

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
CLASSES = {  # and where they are read
    DecodeConfig: "`parablock generate`, `chat`, `batch`, `eval`; `pb.generate`, `pb.stream`, `pb.Engine`; requests to "
    "a server",
    TrainConfig: "`pb.train`",
    AdaptConfig: "`parablock adapt` and its recipes, with all settings of `TrainConfig`; those that are new or differ",
    EngineConfig: "`pb.Engine`",
    ServeConfig: "`parablock serve`",
    ClusterConfig: "`parablock serve`; any of them starts replicas on Ray",
    EvalConfig: "`parablock eval`",
    BenchConfig: "`parablock bench`",
    BatchConfig: "`parablock batch`, with all settings of `DecodeConfig`",
}
HEAD = """# Settings

Written by `python scripts/settings_tables.py`, from the texts that stand beside the settings in the code. A command's
option is named like the setting (`--max-new-tokens`), or as noted.
"""


def type_text(hint: Any) -> str:
    """A type as a reader writes its values."""
    if get_origin(hint) is Literal:
        return " or ".join(f'`"{value}"`' for value in get_args(hint))
    if get_origin(hint) is tuple:
        kinds = [type_text(kind) for kind in get_args(hint) if kind is not ...]
        return f"tuple of {kinds[0]}" if ... in get_args(hint) else f"({', '.join(kinds)})"
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return type_text(kinds[0]) if kinds else str(hint.__name__)


def table(config_class: Any) -> list[str]:
    """The rows of one class; of a class that extends another, what it adds or changes."""
    hints = get_type_hints(config_class)
    rows = ["| setting | type | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(config_class):
        base = next(
            (f for f in getattr(config_class.__base__, "__dataclass_fields__", {}).values() if f is field), None
        )
        if base is not None:
            continue
        option = field.metadata["option"]
        name = f"`{field.name}`" + (f" (`--{option.replace('_', '-')}`)" if option else "")
        default = "" if field.default is None else f"`{field.default!r}`".replace("'", '"')
        text = help_of(config_class, field.name).replace("|", "\\|")
        rows.append(f"| {name} | {type_text(hints[field.name])} | {default} | {text} |")
    return rows


def page() -> str:
    """The whole document."""
    parts = [HEAD]
    for config_class, readers in CLASSES.items():
        story = " ".join((config_class.__doc__ or "").split())
        parts += [f"## {config_class.__name__}\n", f"{story}\n", f"Read by {readers}.\n", *table(config_class), ""]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
