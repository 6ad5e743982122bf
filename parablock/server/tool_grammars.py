"""What holds an answer to its tools: calls alone where they are required, and arguments that fit a strict function."""

import json
import re
from collections.abc import Mapping
from typing import Any

from parablock.decoding.grammar import JSON, CompiledGrammar, Grammar
from parablock.decoding.schema import check_schema
from parablock.server.errors import ApiError
from parablock.server.protocol import Body
from parablock.server.served import ServedModel
from parablock.server.tool_formats import HERMES, LLAMA, Format
from parablock.server.tools import Function, ToolUse

ANY_TEXT = "TEXT: /(.|\\n)*/"
NO_OBJECT = "TEXT: /(\\s*[^{\\s](.|\\n)*)?/"  # which would be a call without its mark
ONE_LINE = {**JSON, "whitespace_pattern": " "}  # as models write arguments
JSON_KINDS = ("json_object", "json_schema")


def compile_grammar(served: ServedModel, body: Body) -> CompiledGrammar | None:
    """What the answers to a request are held to, by its form and by its tools.

    Raises:
        ApiError: a grammar that cannot be used; it names the field.
    """
    use, form = body.tool_use(), body.grammar()
    if use is None or not (use.forced or form or any(function.strict for function in use.callable)):
        if form is None:
            return None
        return _compiled(served, form, body.grammar_field())
    if form and not use.forced and form.kind not in JSON_KINDS:
        field = body.grammar_field()
        message = f"{field}: beside tools an answer can be held to JSON alone; use response_format, or leave one out"
        raise ApiError(400, message, field, "invalid_grammar")
    try:
        return _of_tools(served, use, form, every=use.forced)
    except ApiError:
        if not use.forced or all(function.strict for function in use.callable):
            raise
        return _of_tools(served, use, form, every=False)  # others' schemas are kept to where that is possible


def _of_tools(served: ServedModel, use: ToolUse, form: Grammar | None, *, every: bool) -> CompiledGrammar:
    held = {function.name for function in use.callable if every or function.strict}
    try:
        grammar = tool_grammar(use, served.tool_format, served.tool_marks, form, held)
    except ValueError as error:
        raise ApiError(400, f"tools: {error}", "tools", "invalid_grammar") from None
    return _compiled(served, grammar, "tools")


def _compiled(served: ServedModel, grammar: Grammar, field: str) -> CompiledGrammar:
    try:
        return served.grammars.compile(grammar)
    except ValueError as error:
        told = re.sub(r"at \d+\(\d+\): | \d+ \| .*", "", str(error))  # nobody has seen the lines of this grammar
        raise ApiError(400, f"{field}: {told}", field, "invalid_grammar") from None


def tool_grammar(
    use: ToolUse, format: Format, marks: Mapping[int, str], form: Grammar | None, held: set[str]
) -> Grammar:
    """Calls alone, or else text or calls.

    Args:
        use: the tools.
        format: how the model writes calls.
        marks: the marks of this format that are tokens of their own.
        form: what an answer without calls is held to.
        held: the functions whose arguments fit their schema; others' are any object.

    Raises:
        ValueError: a schema that cannot be used.
    """
    tokens = {mark: f"<[{token}]>" for token, mark in marks.items()}
    mark, closer = (tokens.get(text, json.dumps(text)) for text in (format.mark, format.closer))
    if format is HERMES:
        item, behind = f'"\\n{{\\"name\\": " (functions) "}}\\n" {closer}', f'("\\n" {mark} item)*'
    elif format is LLAMA:
        item, behind = '"{\\"name\\": " (functions) "}"', ""
    else:
        item, behind = '"{\\"name\\": " (functions) "}"', '(", " item)*'
    calls = f"item {'' if use.one else behind}"
    if format.again and not format.bare:
        calls = f'" "? "[" {calls} "]"'
    lines = [f"calls: {calls}", f"item: {item}"]
    lines += ["functions: " + " | ".join(_function(function, format, held) for function in use.callable)]
    return Grammar("lark", "\n".join([*_starts(use, format, mark, form, special=format.mark in tokens), *lines]))


def _starts(use: ToolUse, format: Format, mark: str, form: Grammar | None, *, special: bool) -> list[str]:
    """What an answer begins with."""
    plain = "calls" if format.bare else f"{mark} calls"
    if use.forced:
        return [f"start: {plain}"]
    if form:
        schema = json.loads(form.source or '{"type": "object"}')
        _check(schema)
        return [f"start: {plain} | %json {_with(JSON, schema)}"]
    text = NO_OBJECT if format.bare else ANY_TEXT
    bare = "calls | " if format.bare else ""
    if special:
        return [f"start: {bare}TEXT | TEXT {mark} calls", text]
    return [f"start: {bare}TEXT | behind_text calls", text, f"behind_text[lazy]: TEXT {mark}"]


def _function(function: Function, format: Format, held: set[str]) -> str:
    schema: Any = {"type": "object"}
    if function.name in held:
        schema = function.schema_of_arguments()
        try:
            _check(schema)
        except ValueError as error:
            raise ValueError(f"{function.name}: {error}") from None
        schema = {"type": "object", **schema}
    head = json.dumps(f'"{function.name}", "{format.key}": ')
    return f"{head} %json {_with(ONE_LINE, schema)}"


def _check(schema: Any) -> None:
    check_schema(json.dumps(schema))


def _with(options: Any, schema: Any) -> str:
    return json.dumps({**schema, "x-guidance": options})
