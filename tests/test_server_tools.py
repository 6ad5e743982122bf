"""Tools over HTTP: a real process, the real openai client. The model cannot call by itself; grammars have it do so."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest
from server_process import QUESTION, Served, serve

import parablock as pb

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "Of a city", "parameters": PARAMETERS}
WEATHER: Any = {"type": "function", "function": FUNCTION}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
STRICT: Any = {"type": "function", "function": {**FUNCTION, "strict": True}}
FLAT: Any = {"type": "function", **FUNCTION, "strict": True}
MESSAGES: Any = [{"role": "user", "content": "How is the weather in Oslo?"}]
ASK: dict[str, Any] = {"model": "roomy", "messages": MESSAGES, "tools": [WEATHER, CLOCK], "max_tokens": 200}


class Forecast(pydantic.BaseModel):
    """What shall come back, and nothing else."""

    model_config = pydantic.ConfigDict(extra="forbid")

    sky: Literal["clear", "cloudy"]
    degrees: Literal[1, 2, 3]


class Weather(pydantic.BaseModel):
    """Of a city."""

    city: Literal["Rome", "Oslo"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The bundled model with room for tools in its context."""
    folder: Path = tmp_path_factory.mktemp("model") / "roomy"
    model, tokenizer = pb.load("bundled")
    model.config.max_position_embeddings = tokenizer.model_max_length = 4096
    pb.save(model, tokenizer, folder)
    with serve(folder.parent / "stderr", str(folder), "--keep-responses", "9") as served:
        ASK["model"] = served.client.models.list().data[0].id
        yield served


def check(call: Any) -> None:
    assert call.type == "function"
    assert call.id.startswith("call_")
    schema = PARAMETERS if call.function.name == "weather" else {"type": "object", "maxProperties": 0}
    jsonschema.validate(json.loads(call.function.arguments), schema)


@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
def test_required_calls(server: Served, mode: str) -> None:
    for seed in range(4):
        whole = server.client.chat.completions.create(
            **ASK,
            tool_choice="required",
            parallel_tool_calls=False,
            temperature=1.0,
            seed=seed,
            extra_body={"mode": mode},
        )
        [choice] = whole.choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        [call] = choice.message.tool_calls
        check(call)


def test_several_calls_and_choices(server: Served) -> None:
    whole = server.client.chat.completions.create(**ASK, tool_choice="required", temperature=1.0, seed=3, n=4)
    counts = set()
    for choice in whole.choices:
        for call in choice.message.tool_calls[: None if choice.finish_reason == "tool_calls" else -1]:
            check(call)
        counts.add(len(choice.message.tool_calls))
    assert len({call.id for choice in whole.choices for call in choice.message.tool_calls}) == sum(
        len(choice.message.tool_calls) for choice in whole.choices
    )
    assert max(counts) > 1


def test_a_stream_tells_the_name_and_then_the_arguments(server: Served) -> None:
    asked = {**ASK, "tool_choice": "required", "temperature": 1.0, "seed": 3, "parallel_tool_calls": False}
    whole = server.client.chat.completions.create(**asked).choices[0].message.tool_calls[0]
    chunks = [chunk.choices[0] for chunk in server.client.chat.completions.create(**asked, stream=True)]
    told = [chunk.delta.tool_calls[0] for chunk in chunks if chunk.delta.tool_calls]
    first, *pieces = told
    assert (first.index, first.type) == (0, "function")
    assert (first.function.name, first.function.arguments) == (whole.function.name, "")
    assert first.id.startswith("call_")
    assert all(piece.id is None and piece.function.name is None and piece.index == 0 for piece in pieces)
    assert "".join(piece.function.arguments for piece in pieces) == whole.function.arguments
    assert chunks[-1].finish_reason == "tool_calls"
    assert not any(chunk.delta.content for chunk in chunks)
    with server.client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.message.tool_calls[0].function.arguments == whole.function.arguments


def test_a_named_tool_and_a_loop_of_two_turns(server: Served) -> None:
    named: Any = {"type": "function", "function": {"name": "weather"}}
    first = server.client.chat.completions.create(**ASK, tool_choice=named).choices[0]
    [call] = first.message.tool_calls
    check(call)
    assert (call.function.name, first.finish_reason) == ("weather", "tool_calls")
    turns = [*MESSAGES, first.message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": "3 degrees"}]
    second = server.client.chat.completions.create(**{**ASK, "messages": turns, "max_tokens": 20})
    assert second.choices[0].message.content
    assert second.choices[0].message.tool_calls is None
    tokens = server.http.post("/tokenize", json={"messages": turns, "tools": ASK["tools"]}).json()["tokens"]
    assert second.usage is not None
    assert second.usage.prompt_tokens == len(tokens)
    shown = server.http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    arguments = json.dumps(json.loads(call.function.arguments))
    assert f'<tool_call>\n{{"name": "weather", "arguments": {arguments}}}\n</tool_call>' in shown
    assert "<tool_response>\n3 degrees\n</tool_response>" in shown
    assert shown.count("<tools>\n") == 1


def test_without_a_call_an_answer_is_text(server: Served) -> None:
    """`none` shows no tools; under `auto` a strict tool holds calls alone to a schema."""
    asked = {"model": ASK["model"], "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 60}
    plain = server.client.chat.completions.create(**asked)
    none = server.client.chat.completions.create(**asked, tools=[WEATHER], tool_choice="none")
    assert none.choices[0].message == plain.choices[0].message
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens
    texts = set()
    for tools in ([WEATHER], [STRICT, CLOCK]):
        auto = server.client.chat.completions.create(**asked, tools=tools, extra_body={"mode": "autoregressive"})
        assert auto.choices[0].message.tool_calls is None
        texts.add(auto.choices[0].message.content)
        assert auto.usage.prompt_tokens > plain.usage.prompt_tokens
    assert all(texts)


def test_parse_with_pydantic_models(server: Served) -> None:
    parsed = server.client.chat.completions.parse(
        model=ASK["model"], messages=MESSAGES, response_format=Forecast, temperature=1.0, seed=1
    )
    assert isinstance(parsed.choices[0].message.parsed, Forecast)
    tool = openai.pydantic_function_tool(Weather)
    called = server.client.chat.completions.parse(
        model=ASK["model"],
        messages=MESSAGES,
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    [call] = called.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)
    either = server.client.chat.completions.parse(
        model=ASK["model"],
        messages=MESSAGES,
        tools=[tool],
        response_format=Forecast,
        temperature=1.0,
        seed=2,
    )
    message = either.choices[0].message
    assert isinstance(message.parsed, Forecast) or message.tool_calls


def test_responses_call_tools(server: Served) -> None:
    asked: dict[str, Any] = {
        "model": ASK["model"], "input": "How is the weather?", "tools": [FLAT], "tool_choice": "required",
        "parallel_tool_calls": False, "max_output_tokens": 200, "temperature": 1.0, "extra_body": {"seed": 5},
    }  # fmt: skip
    whole = server.client.responses.create(**asked)
    [call] = whole.output
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    jsonschema.validate(json.loads(call.arguments), PARAMETERS)
    events = list(server.client.responses.create(**asked, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert kinds == [
        "created", "in_progress", "output_item.added", *["function_call_arguments.delta"] * len(pieces),
        "function_call_arguments.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert "".join(pieces) == call.arguments
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "3 degrees"}
    rest = {"tools": [FLAT], "max_output_tokens": 20}
    by_id = server.client.responses.create(model=ASK["model"], previous_response_id=whole.id, input=[result], **rest)  # type: ignore[call-overload]
    turns = [{"role": "user", "content": "How is the weather?"}, call.to_dict(), result]
    by_items = server.client.responses.create(model=ASK["model"], input=turns, **rest)  # type: ignore[call-overload]
    assert by_id.output_text == by_items.output_text
    named = server.client.responses.create(**{**asked, "tool_choice": {"type": "function", "name": "weather"}})
    assert named.output[0].type == "function_call"


def test_responses_have_a_form(server: Served) -> None:
    parsed = server.client.responses.parse(model=ASK["model"], input="Sky?", text_format=Forecast, temperature=1.0)
    assert isinstance(parsed.output_parsed, Forecast)
    response = server.client.responses.create(
        model=ASK["model"], input="Sky?", 
        text={"format": {"type": "json_schema", "name": "sky", "schema": Forecast.model_json_schema(), "strict": True}},
    )  # fmt: skip
    Forecast.model_validate_json(response.output_text)


CALLED = {"id": "a", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools", "twice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
         "tools.0.function", "use type 'object'"),
        ({"tools": [WEATHER] * 129}, "tools", "at most 128"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "none of the tools"),
        ({"tool_choice": "any"}, "tool_choice", "required"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALLED]}]}, "messages.0",
         "belong to messages of the assistant"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0", "content is missing"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "object",
          "properties": {"a": {"not": {}}}, "required": ["a"]}}}]}, "tools", "not"),
        ({"tool_choice": "auto", "guided_regex": "a+", "tools": [WEATHER]}, "guided_regex", "beside tools"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_tools_is_told(server: Served, change: Any, param: str, words: str) -> None:
    body = {**ASK, **change}
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


def test_a_schema_that_no_grammar_holds_is_kept_to_only_where_strict(server: Served) -> None:
    odd = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": odd}}
    asked = {**ASK, "tools": [tool], "tool_choice": "required", "max_tokens": 5}
    assert server.client.chat.completions.create(**asked).choices[0].finish_reason == "length"
    nested: Any = "x"
    for _ in range(100):
        nested = {"properties": {"a": nested}}
    deep = {**asked, "tools": [{"type": "function", "function": {"name": "f", "parameters": nested}}]}
    with pytest.raises(openai.BadRequestError, match="levels"):
        server.client.chat.completions.create(**deep)


FORM: Any = {"type": "json_schema", "json_schema": {"name": "output", "schema": PARAMETERS}}
NULLS: Any = {"content": None, "refusal": None, "annotations": None, "audio": None, "function_call": None}
CALLED: Any = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
RESULT: Any = {"role": "tool", "content": "3 degrees", "tool_call_id": "call_1"}
STREAM: Any = {"stream": True, "stream_options": {"include_usage": True}}
CHATS: dict[str, Any] = {
    "instructor": {
        "max_tokens": 150,
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "tools": [{"type": "function", "function": {**FUNCTION, "parameters": {**PARAMETERS, "title": "Weather"}}}],
    },
    "langchain": {
        "max_completion_tokens": 100, "temperature": 0.0, "parallel_tool_calls": False, "tool_choice": "required",
        "tools": [STRICT], **STREAM,
    },
    "langchain, a result": {
        "max_completion_tokens": 100, "stream": False, "tool_choice": "none", "tools": [WEATHER],
        "messages": [*MESSAGES, {"role": "assistant", **NULLS, "tool_calls": [CALLED]}, RESULT],
    },
    "llm": {"temperature": 0, "max_tokens": 150, "seed": 1, "response_format": FORM, **STREAM},
    "lm_eval": {"max_tokens": 16, "temperature": 0, "stop": ["<|im_end|>"], "seed": 1234},
    "vllm": {"guided_choice": ["Oslo", "Rome"], "user": "a", "n": 1, "logprobs": None},
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_what_other_clients_send(server: Served, name: str) -> None:
    """The bodies of clients that nobody here wrote (scripts/clients.py runs these themselves)."""
    asked = {"model": ASK["model"], "messages": MESSAGES} | CHATS[name]
    answer = server.http.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 200, answer.text
    if asked.get("stream"):
        *chunks, done = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        usage = json.loads(chunks[-1])
        assert done == "[DONE]"
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] > 0
    else:
        assert answer.json()["choices"][0]["finish_reason"] in ("stop", "length", "tool_calls")
