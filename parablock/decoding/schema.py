"""A JSON schema before llguidance compiles it: what it would take, though no answer would fit, or ever end."""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

MAPS = ("properties", "patternProperties", "$defs", "definitions")  # of names to schemas
LISTS = ("prefixItems", "anyOf", "oneOf", "allOf")
SINGLE = ("items", "additionalProperties", "additionalItems")


def check_schema(text: str) -> None:
    """Refuse what is no JSON, what nothing finite fits, and what an object could only seem to fit.

    Raises:
        ValueError: that names the keyword.
    """
    try:
        schema = json.loads(text)
        nodes = [*_nodes(schema)]
        for node in nodes:
            _check_count(node)
        if not _ends(schema, nodes):
            raise ValueError("$ref: the schema is recursive without end, no finite JSON fits it; make a part optional")
    except json.JSONDecodeError as error:
        raise ValueError(f"the schema is no JSON ({error}); write an object") from None
    except RecursionError:
        raise ValueError("the schema is nested too deeply; use fewer levels") from None


def _nodes(schema: Any) -> Iterator[dict[str, Any]]:
    """All schemas inside a schema, those inside first."""
    if not isinstance(schema, dict):
        return
    for name in MAPS:
        inner = schema.get(name)
        for part in inner.values() if isinstance(inner, dict) else ():
            yield from _nodes(part)
    for name in LISTS:
        inner = schema.get(name)
        for part in inner if isinstance(inner, list) else ():
            yield from _nodes(part)
    for name in SINGLE:
        yield from _nodes(schema.get(name))
    yield schema


def _check_count(node: dict[str, Any]) -> None:
    """An object may repeat a name that is not listed, so its names cannot be counted."""
    least = node.get("minProperties", 0)
    listed = node.get("additionalProperties", True) is False and not node.get("patternProperties")
    if isinstance(least, int | float) and least > max(1, len(set(node.get("required", ())))) and not listed:
        raise ValueError(
            f"minProperties={least} is supported only with additionalProperties=false, or up to the number of required "
            "properties; list the properties"
        )


def _ends(schema: Any, nodes: list[dict[str, Any]]) -> bool:
    """Whether something finite fits: what surely does is found from the inside out, until nothing is added."""
    known: set[int] = set()

    def fits(node: Any) -> bool:
        return node is not False and (not isinstance(node, dict) or id(node) in known)

    def refers(pointer: Any) -> bool:
        return fits(_target(schema, pointer)) if isinstance(pointer, str) else True

    left, before = nodes, -1
    while len(left) != before:
        before = len(left)
        known.update(id(node) for node in left if _node_ends(node, fits, refers))
        left = [node for node in reversed(left) if id(node) not in known]  # chains may run either way
    return fits(schema)


def _node_ends(node: dict[str, Any], fits: Any, refers: Any) -> bool:
    alternatives = all(
        any(fits(part) for part in node[name]) for name in ("anyOf", "oneOf") if isinstance(node.get(name), list)
    )
    every = node.get("allOf")
    if not alternatives or not all(fits(part) for part in (every if isinstance(every, list) else ())):
        return False
    if "$ref" in node and not refers(node["$ref"]):
        return False
    kinds = node.get("type", "any")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "enum" in node or "const" in node or any(kind not in ("object", "array") for kind in kinds):
        return True
    return ("object" in kinds and _object_ends(node, fits)) or ("array" in kinds and _array_ends(node, fits))


def _object_ends(node: dict[str, Any], fits: Any) -> bool:
    properties, required = node.get("properties"), node.get("required")
    if not isinstance(properties, dict) or not isinstance(required, list):
        return True
    return all(fits(properties[name]) for name in required if isinstance(name, str) and name in properties)


def _array_ends(node: dict[str, Any], fits: Any) -> bool:
    least, first = node.get("minItems", 0), node.get("prefixItems")
    first = first if isinstance(first, list) else []
    if not isinstance(least, int | float):
        return True
    return all(fits(part) for part in first[: int(least)]) and (least <= len(first) or fits(node.get("items")))


def _target(schema: Any, pointer: str) -> Any:
    """What a pointer inside the schema refers to; others are llguidance's to refuse."""
    at = schema
    for part in unquote(pointer).split("/")[1:] if pointer.startswith("#") else ():
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(at, list) and name.isdecimal() and int(name) < len(at):
            at = at[int(name)]
        elif isinstance(at, dict) and name in at:
            at = at[name]
        else:
            return None
    return at if pointer.startswith("#") else None
