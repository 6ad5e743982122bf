"""JSON schemas of many kinds, drawn over the constructs of the JSON-Schema test suite and of JSONSchemaBench.

Shared by `grammars.py` and the tests; schema number n is always the same.
"""

import random
from typing import Any

Schema = dict[str, Any]
WORDS = ["id", "name", "tags", "size", "owner", "a b", "é", "x-y", "$price", "list/of"]
FORMATS = ["date", "time", "date-time", "email", "ipv4", "ipv6", "uuid", "hostname", "uri", "duration"]
PATTERNS = [
    "^[A-Z]{2}[0-9]{1,4}$", "^(red|green|blue)$", r"^\d{3}-\d{4}$", "^[a-z]+(_[a-z]+){0,2}$", "ab?c", r"^\S{1,6}$"
]  # fmt: skip
VALUES: list[Any] = ["north", "", 'quo"te', "ü\n", 0, -7, 3.5, True, None, [1, "b"], {"k": 1}]


def schema(number: int) -> Schema:
    """The schema of this number: kinds of roots in turns, what is inside drawn."""
    rng = random.Random(number)
    kinds = [_object, _array, _tuple, _any_of, _one_of, _all_of, _leaf, _recursive_list, _recursive_tree, _object]
    return kinds[number % len(kinds)](rng, 2) | {"$defs": {"name": _string(rng), "count": _number(rng)}}


def _any(rng: random.Random, depth: int) -> Schema:
    inner = [_object, _array, _tuple, _any_of, _one_of, _all_of, _reference]
    return rng.choice(inner)(rng, depth - 1) if depth and rng.random() < 0.5 else _leaf(rng, depth)


def _leaf(rng: random.Random, depth: int) -> Schema:
    kinds = [_string, _string, _number, _number, _fixed]
    if rng.random() < 0.2:
        return {"type": rng.choice(["boolean", "null", ["integer", "null"], ["boolean", "number"]])}
    return rng.choice(kinds)(rng) | rng.choice([{}, {"title": "A title", "description": "What it is.", "default": 1}])


def _string(rng: random.Random) -> Schema:
    low = rng.randrange(4)
    return {"type": "string"} | rng.choice(
        [
            {"maxLength": rng.randint(1, 8)}, {"minLength": low, "maxLength": low + rng.randrange(5)},
            {"pattern": rng.choice(PATTERNS), "maxLength": 12}, {"pattern": rng.choice(PATTERNS[:3])},
            {"format": rng.choice(FORMATS)}, {},
        ]
    )  # fmt: skip


def _number(rng: random.Random) -> Schema:
    low = rng.randint(-50, 50)
    high = low + rng.randint(3, 400)
    whole = [
        {}, {"minimum": low, "maximum": high}, {"exclusiveMinimum": low, "exclusiveMaximum": high}, {"minimum": low},
        {"multipleOf": rng.choice([2, 3, 10])},
    ]  # fmt: skip
    broken = [{}, {"minimum": low, "maximum": high - 0.5}, {"exclusiveMinimum": low + 0.25}, {"maximum": high}]
    if rng.random() < 0.5:
        return {"type": "integer"} | rng.choice(whole)
    return {"type": "number"} | rng.choice(broken)


def _fixed(rng: random.Random) -> Schema:
    if rng.random() < 0.4:
        return {"const": rng.choice(VALUES)}
    return {"enum": rng.sample(VALUES, rng.randint(1, 4))}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(WORDS, rng.randint(1, 4))
    whole: Schema = {"type": "object", "properties": {name: _any(rng, depth) for name in names}}
    whole["required"] = rng.sample(names, rng.randint(0, len(names)))
    more = rng.random()
    if more < 0.6:
        whole["additionalProperties"] = False
    elif more < 0.75:
        whole["additionalProperties"] = _leaf(rng, 0)
    elif more < 0.85:
        whole |= {"patternProperties": {"^s_[a-z]{1,3}$": {"type": "boolean"}}, "additionalProperties": False}
    elif more < 0.95:  # names are counted where all are required
        whole |= {"required": names, "minProperties": len(names), "maxProperties": len(names) + 1}
    return whole


def _array(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(3)
    return {"type": "array", "items": _any(rng, depth)} | rng.choice(
        [{"maxItems": low + 2, "minItems": low}, {"minItems": low}, {"maxItems": 3}]
    )


def _tuple(rng: random.Random, depth: int) -> Schema:
    first = [_any(rng, depth) for _ in range(rng.randint(1, 3))]
    return {"type": "array", "prefixItems": first, "items": rng.choice([False, _leaf(rng, 0)]), "minItems": len(first)}


def _any_of(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, depth) for _ in range(rng.randint(2, 3))]}


def _one_of(rng: random.Random, depth: int) -> Schema:
    return {"oneOf": [_string(rng), rng.choice([_number(rng), {"type": "boolean"}]), {"type": "null"}]}


def _all_of(rng: random.Random, depth: int) -> Schema:
    one, other = rng.sample(WORDS, 2)
    parts = [
        {"type": "object", "properties": {one: _leaf(rng, 0)}, "required": [one]},
        {"properties": {other: _any(rng, depth)}},
    ]
    numbers = [{"type": "integer", "minimum": rng.randint(-9, 9)}, {"maximum": rng.randint(20, 90)}]
    return {"allOf": rng.choice([parts, numbers, [{"type": "string", "minLength": 2}, {"maxLength": 5}]])}


def _reference(rng: random.Random, depth: int) -> Schema:
    return {"$ref": rng.choice(["#/$defs/name", "#/$defs/count"])}


def _recursive_list(rng: random.Random, depth: int) -> Schema:
    rest = {"anyOf": [{"type": "null"}, {"$ref": "#"}]}
    named = {"type": "object", "properties": {"value": _leaf(rng, 0), "next": rest}, "additionalProperties": False}
    return named | {"required": rng.choice([["value"], ["value", "next"]])}


def _recursive_tree(rng: random.Random, depth: int) -> Schema:
    return {"type": "array", "items": {"anyOf": [{"$ref": "#"}, _leaf(rng, 0)]}, "maxItems": rng.randint(1, 3)}
