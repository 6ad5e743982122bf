"""What the rooms' settings have in common: a field with its help text, and refusals that name value and remedy.

Every room that reads settings has them in its `config.py`, as a frozen dataclass. A field's help text stands in its
metadata: the command's options, the server's request schema and docs/settings.md take it from there.
"""

import dataclasses
from importlib.util import find_spec
from typing import Any, TypeVar, get_args

Model = Any  # a decoder-only language model of transformers; what its config holds depends on the architecture
T = TypeVar("T")


def setting(
    default: T, *, help: str, option: str | None = None, joined: bool = False, command: bool = True
) -> T:  # fmt: skip
    """A dataclass field with its help text.

    `option`: the command's option where it is not named like the field. `joined`: the option takes several values as
    one text ("1,8,32"), instead of being repeatable. `command`: whether commands have an option for it at all.
    """
    metadata = {"help": help, "option": option, "joined": joined, "command": command}
    field: Any = dataclasses.field(default=default, metadata=metadata)
    return field  # type: ignore[no-any-return]


def inherited(base: type, name: str, default: T) -> T:
    """The field of a base class, with another default."""
    metadata = _field(base, name).metadata
    field: Any = dataclasses.field(default=default, metadata=metadata)
    return field  # type: ignore[no-any-return]


def help_of(config_class: type, name: str) -> str:
    """The help text of a field."""
    text: str = _field(config_class, name).metadata["help"]
    return text


def _field(config_class: Any, name: str) -> Any:
    return next(field for field in dataclasses.fields(config_class) if field.name == name)


def require(ok: bool, name: str, value: object, remedy: str) -> None:
    """ValueError that names the setting, its value and the remedy, unless `ok`."""
    if not ok:
        raise ValueError(f"{name}={value!r} is out of range; {remedy}")


def require_choice(name: str, value: object, choices: Any) -> None:
    """ValueError unless `value` is one of a Literal's."""
    *others, last = [repr(choice) for choice in get_args(choices)]
    remedy = f"use {', '.join(others)} or {last}" if others else f"use {last}"
    require(value in get_args(choices), name, value, remedy)


def require_at_least(config: object, least: int, *names: str) -> None:
    """ValueError unless each of these settings is `None` or at least `least`."""
    for name in names:
        value = getattr(config, name)
        require(
            value is None or value >= least, name, value, f"use {'0 or more' if least == 0 else f'at least {least}'}"
        )


def require_library(name: str, extra: str) -> None:
    """ValueError that names the remedy unless the library of an optional extra is installed."""
    parts = name.split(".")
    if any(find_spec(".".join(parts[: count + 1])) is None for count in range(len(parts))):
        raise ValueError(f"this needs {name}; install it with: pip install 'parablock[{extra}]'")
