"""Recipes: a training written down in YAML, with the names of `AdaptConfig`'s fields."""

import dataclasses
from pathlib import Path
from typing import Any

from parablock.training.config import AdaptConfig


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        ValueError: no such file, not a mapping, or keys that no setting has.
    """
    import yaml

    if not path.is_file():
        raise ValueError(f"there is no recipe at {str(path)!r}; check the path")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{str(path)!r} is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} is not a mapping of settings; write 'name: value' lines")
    known = {field.name for field in dataclasses.fields(AdaptConfig)}
    unknown = sorted(set(map(str, values)) - known)
    if unknown:
        raise ValueError(
            f"{str(path)!r} has unknown settings ({', '.join(unknown)}); known: {', '.join(sorted(known))}"
        )
    return values


def make_config(values: dict[str, Any]) -> AdaptConfig:
    """An `AdaptConfig` of `values`; numbers that YAML reads as text (`1e-5`) become numbers."""
    settings = dict(values)
    for field in dataclasses.fields(AdaptConfig):
        value = settings.get(field.name)
        if field.type is float and isinstance(value, (str, int)):
            try:
                settings[field.name] = float(value)
            except ValueError:
                raise ValueError(f"{field.name}={value!r} is not a number") from None
        elif isinstance(value, list):
            settings[field.name] = tuple(value)
    return AdaptConfig(**settings)


def write_recipe(path: Path, config: AdaptConfig) -> None:
    """The whole recipe of a run, so that it can be run again."""
    import yaml

    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    path.write_text(yaml.safe_dump(values, sort_keys=True))
