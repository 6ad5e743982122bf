"""Reading of tool calls: every format, and any cut of the text into pieces."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parablock.server.tool_formats import HERMES, LLAMA, MISTRAL, Format, format_of
from parablock.server.tool_reader import Arguments, Begun, Ended, Event, Reader, Said

NAMES = ("f", "weather")
FORMATS = (HERMES, LLAMA, MISTRAL)


def read(format: Format, pieces: list[str], *, one: bool = False) -> tuple[str, list[list[Any]]]:
    """The text, and every call: its name, its arguments, whether it is whole."""
    reader = Reader(format, NAMES, one=one)
    events: list[Event] = [event for piece in pieces for event in reader.push(piece)]
    text, calls = "", list[list[Any]]()
    for event in [*events, *reader.push("", last=True)]:
        match event:
            case Said(more):
                text += more
            case Begun(name):
                calls.append([name, "", False])
            case Arguments(more):
                assert not calls[-1][2]
                calls[-1][1] += more
            case Ended():
                calls[-1][2] = True
    return text, calls


CASES = [
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": "}</tool_call>\\""}}\n</tool_call>', "",
     [("f", '{"a": "}</tool_call>\\""}')]),
    (HERMES, 'I look.\n<tool_call>{"name":"f","arguments":{}}</tool_call>\n<tool_call>\n'
     '{"arguments": {"b": [1]}, "name": "weather"}\n</tool_call>\n', "I look.",
     [("f", "{}"), ("weather", '{"b": [1]}')]),
    (HERMES, '<tool_call>{"name": "f"}</tool_call> so', " so", [("f", "{}")]),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": 1}\n</tool_call>', "", [("f", '{"a": 1}')]),
    (LLAMA, '{"name": "f", "parameters": {"a": {"b": 1}}}', "", [("f", '{"a": {"b": 1}}')]),
    (LLAMA, ' <|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}; '
     '{"name": "f", "parameters": {}}', "", [("f", '{"a": 1}'), ("f", "{}")]),
    (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, '
     '{"name": "weather", "arguments": {}, "id": "x"}]', "", [("f", '{"a": 1}'), ("weather", "{}")]),
    (MISTRAL, 'See: [TOOL_CALLS][{"name": "f", "arguments": {}}] done', "See: done", [("f", "{}")]),
]  # fmt: skip
PLAIN = [
    (HERMES, " Just text with <tool and <tool_call> in it. \n"),
    (HERMES, '<tool_call>{"name": "g", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": "a"}</tool_call>'),
    (HERMES, '<tool_call>\n{"name": "f" "arguments": {"a": 1}}\n</tool_call>'),
    (HERMES, '<tool_call>{"name": "f"'),
    (HERMES, '{"name": "f", "arguments": {}}'),
    (LLAMA, '{"answer": {"name": "f"}}'),
    (LLAMA, '{"name": "Bob", "parameters": {}}'),
    (LLAMA, 'It is {"name": "f", "parameters": {}}'),
    (MISTRAL, "[TOOL_CALLS] none [TOOL_CALLS"),
    (MISTRAL, '[{"name": "f", "arguments": {}}]'),
]


@pytest.mark.parametrize(("format", "text", "said", "calls"), CASES)
def test_calls(format: Format, text: str, said: str, calls: list[tuple[str, str]]) -> None:
    assert read(format, [text]) == (said, [[*call, True] for call in calls])
    assert read(format, list(text)) == (said, [[*call, True] for call in calls])
    assert read(format, [text], one=True)[1] == [[*calls[0], True]]


@pytest.mark.parametrize(("format", "text"), PLAIN)
def test_what_is_no_call_stays_text(format: Format, text: str) -> None:
    assert read(format, [text]) == (text, [])


def test_arguments_that_are_no_json_are_told_as_they_are() -> None:
    broken = '<tool_call>{"name": "f", "arguments": {"a": oops}}</tool_call> and'
    assert read(HERMES, [broken]) == (" and", [["f", '{"a": oops}}', True]])
    cut = '<tool_call>{"name": "f", "arguments": {"a": "oo'
    assert read(HERMES, [cut]) == ("", [["f", '{"a": "oo', False]])


def test_arguments_come_as_they_are_written() -> None:
    reader = Reader(HERMES, NAMES)
    assert reader.push('Hi <tool_call>\n{"name": "f", "argu') == [Said("Hi")]
    assert reader.push('ments": {"te') == [Begun("f"), Arguments('{"te')]
    assert reader.push('xt": "a') == [Arguments('xt": "a')]
    assert reader.push('"}}') == [Arguments('"}'), Ended()]


WRITTEN = [text for _, text, *_ in CASES] + [text for _, text in PLAIN]
BITS = st.sampled_from(
    ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", '{"name": "f", ', '"arguments": {',
     '"parameters": {', '"a": ', '"', "\\", "{", "}", "[", "]", "1", ",", ";", " ", "\n", "x", "<", '"name": "weather"']
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    text=st.one_of(st.sampled_from(WRITTEN), st.lists(BITS, max_size=14).map("".join)),
    cuts=st.lists(st.integers(0, 120), max_size=12),
    one=st.booleans(),
)
def test_any_cut_gives_the_same(format: Format, text: str, cuts: list[int], one: bool) -> None:
    at = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[a:b] for a, b in pairwise(at)]
    whole = read(format, [text], one=one)
    assert read(format, pieces, one=one) == whole
    assert read(format, list(text), one=one) == whole


VALUES = st.text(max_size=9) | st.integers() | st.lists(st.booleans() | st.none() | st.text(max_size=2), max_size=2)


@settings(max_examples=100, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    arguments=st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=2), min_size=1, max_size=3),
)
def test_arguments_survive(format: Format, arguments: list[dict[str, Any]]) -> None:
    calls = [json.dumps({"name": "f", format.key: given}) for given in arguments]
    if format is HERMES:
        text = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
    else:
        text = "[TOOL_CALLS] [" + ", ".join(calls) + "]" if format is MISTRAL else "; ".join(calls)
    said, read_calls = read(format, [text])
    assert said == ""
    assert [json.loads(call[1]) for call in read_calls] == arguments


def test_long_answers_are_read_in_linear_time() -> None:
    """Minutes, were it quadratic."""
    for text in (
        '<tool_call>{"name": "f", "arguments": {"a": "' + "x" * 100_000,
        '<tool_call>{"name' * 6_000,
        '<tool_call>{"id":{"a":{}},' + '"id":{},"arguments":{},' * 5_000,
        "<" * 100_000,
        '<tool_call>{"name": "f", "arguments": ' + "[" * 50_000,
    ):
        read(HERMES, [text[i : i + 10] for i in range(0, len(text), 10)])


def test_a_template_tells_the_format() -> None:
    assert format_of("{{ '<tool_call>' }}") is HERMES
    assert format_of("<|start_header_id|>ipython") is LLAMA
    assert format_of("[TOOL_CALLS]") is MISTRAL
    assert format_of("{{ messages }}") is HERMES
