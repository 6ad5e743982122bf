"""The options of a command that come from a config class: one for every field, explained by the field's own text."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

Given = dict[str, Any]  # settings of a config class, by field
NOTHING: Given = {}
Command = Callable[..., None]
SWITCHES = {"on": True, "off": False}


def options(
    config_class: Any, panel: str, *, into: str = "given", sparse: bool = False, without: Sequence[str] = ()
) -> Callable[[Command], Command]:
    """Give a command one option per field of `config_class`; its parameter `into` gets their values by field.

    With `sparse` only what the user gave is in there, which leaves the rest to a recipe.
    """

    def decorate(command: Command) -> Command:
        hints = get_type_hints(config_class)
        every = [field for field in dataclasses.fields(config_class) if field.metadata["command"]]
        fields = [field for field in every if field.name not in without]
        names = {field.metadata["option"] or field.name: field for field in fields}
        own = [p for p in inspect.signature(command).parameters.values() if p.name != into]
        extra = [_option(name, field, hints[field.name], panel, sparse) for name, field in names.items()]

        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            given = {field.name: _value(values.pop(name), name, hints[field.name]) for name, field in names.items()}
            command(**values, **{into: {name: v for name, v in given.items() if v is not None}})

        wrapper.__signature__ = inspect.Signature([*own, *extra])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in [*own, *extra]}
        return wrapper

    return decorate


def _option(name: str, field: Any, hint: Any, panel: str, sparse: bool) -> inspect.Parameter:
    """A field as the command line spells it; without a value where the field has none, or where it is left open."""
    kind, default = _kind(hint), field.default
    if get_origin(kind) is Literal:
        kind = str
    elif get_origin(kind) is tuple:
        kind = str if field.metadata["joined"] else list[get_args(kind)[0]]  # type: ignore[misc]
    if isinstance(default, tuple):
        default = ",".join(map(_spelled, default)) or None
    shown = default not in (None, "") and (_spelled(default) if sparse else True)
    option = typer.Option(help=field.metadata["help"], rich_help_panel=panel, show_default=shown)
    given = None if sparse else default
    annotation: Any = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=given, annotation=annotation)


def _kind(hint: Any) -> Any:
    """`int` of `int | None`."""
    if get_origin(hint) is UnionType or type(None) in get_args(hint):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def _spelled(value: object) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _value(value: Any, name: str, hint: Any) -> Any:
    """What the user gave, as the field holds it."""
    if isinstance(value, list):
        return tuple(value) or None
    if isinstance(value, str) and get_origin(_kind(hint)) is tuple:
        return parse_list(value, name, get_args(_kind(hint))[0])
    return value


def parse_list(text: str, name: str, kind: type) -> tuple[Any, ...]:
    """ "1,8,32" as numbers, "on,off" as bools; nothing as nothing."""
    try:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        return tuple(SWITCHES[part] if kind is bool else kind(part) for part in parts)
    except (ValueError, KeyError):
        example = "on,off" if kind is bool else "1,8,32" if kind is int else "0.7,0.9"
        raise ValueError(f"{name}={text!r} is no list; write it like {example}") from None
