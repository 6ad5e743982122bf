"""Structured output over HTTP: OpenAI's and vLLM's fields, whole and streamed, and what is refused."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pytest
from jsonschema import validate
from pydantic import BaseModel
from server_process import ASK, Served, error_of, serve

SCHEMA = {
    "type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"], "additionalProperties": False,
}  # fmt: skip
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
MODES: list[dict[str, Any]] = [
    {}, {"strategy": "verified"}, {"model": "bundled-causal"}, {"model": "bundled-causal", "mode": "autoregressive"}
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("log") / "stderr", "bundled", "--also", "bundled-causal") as served:
        yield served


def chat(server: Served, **fields: Any) -> str:
    response = server.http.post("/v1/chat/completions", json={**ASK, "max_tokens": 300, "temperature": 1, **fields})
    assert response.status_code == 200, response.text
    content: str = response.json()["choices"][0]["message"]["content"]
    return content


@pytest.mark.parametrize("mode", MODES)
def test_every_field_holds_the_answer_to_its_form(server: Served, mode: dict[str, Any]) -> None:
    for fields in ({"response_format": JSON_SCHEMA}, {"structured_outputs": {"json": SCHEMA}}, {"guided_json": SCHEMA}):
        validate(json.loads(chat(server, **mode, **fields)), SCHEMA)
    validate(json.loads(chat(server, **mode, guided_json=json.dumps(SCHEMA))), SCHEMA)
    for fields in (
        {"structured_outputs": {"choice": ["north", "south"]}}, {"guided_choice": ["north", "south"]},
        {"structured_outputs": {"regex": "north|south"}}, {"guided_regex": "north|south"},
        {"structured_outputs": {"grammar": 'start: "north" | "south"'}}, {"guided_grammar": 'start: "north" | "south"'},
    ):  # fmt: skip
        assert chat(server, **mode, **fields) in ("north", "south")
    for fields in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        assert chat(server, **mode, **fields).startswith("{")
    assert chat(server, **mode, response_format={"type": "text"}, temperature=0) == chat(server, **mode, temperature=0)


class Move(BaseModel):
    direction: Literal["north", "south"]
    fast: bool


def test_the_real_client_parses(server: Served) -> None:
    parsed = server.client.chat.completions.parse(**ASK, response_format=Move, max_tokens=300, seed=4, temperature=1)
    assert isinstance(parsed.choices[0].message.parsed, Move)
    stream = server.client.chat.completions.create(
        **ASK, response_format=JSON_SCHEMA, stream=True, temperature=1, seed=2, max_tokens=300
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    validate(json.loads(text), SCHEMA)
    assert text == chat(server, response_format=JSON_SCHEMA, seed=2)
    several = server.client.completions.create(
        model="bundled",
        prompt=["How many?", "How much?"],
        n=2,
        temperature=1,
        extra_body={"guided_regex": "[0-9]{1,3}"},
    )
    assert all(choice.text.isdecimal() and choice.finish_reason == "stop" for choice in several.choices)


def test_other_requests_beside_it_change_nothing(server: Served) -> None:
    asked = [
        mode | form | {"seed": seed, "max_tokens": 40}
        for seed, form in enumerate(({}, {"response_format": JSON_SCHEMA}, {"guided_regex": "[0-9 +]{3,20}"}))
        for mode in MODES
    ]
    alone = [chat(server, **fields) for fields in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        assert [*pool.map(lambda fields: chat(server, **fields), asked)] == alone
    server.wait_until_idle()


def test_a_stop_string_ends_it_early(server: Served) -> None:
    assert chat(server, guided_regex="ab+c", stop="b") == "a"


@pytest.mark.parametrize(
    ("fields", "param", "named"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
        ({"response_format": JSON_SCHEMA | {"strict": True}}, "response_format.strict", "not supported"),
        ({"guided_json": {"not": {}}}, "guided_json", '"not"'),
        ({"structured_outputs": {"json": {"uniqueItems": True}}}, "structured_outputs", '"uniqueItems"'),
        ({"guided_json": {"$ref": "#"}}, "guided_json", "$ref"),
        ({"guided_json": "{"}, "guided_json", "no JSON"),
        ({"guided_json": {"const": "x" * 70_000}}, "guided_json", "at most 65536"),
        ({"guided_regex": "("}, "guided_regex", "unclosed"),
        ({"guided_regex": "a{1000000}"}, "guided_regex", "smaller"),
        ({"guided_choice": []}, "guided_choice", "at least 1"),
        ({"guided_grammar": "start: other"}, "guided_grammar", "other"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "regex"),
        ({"guided_regex": "a", "response_format": JSON_SCHEMA}, "guided_regex", "response_format"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml", "not supported"),
    ],
)
def test_what_cannot_be_is_refused_by_name(server: Served, fields: dict[str, Any], param: str, named: str) -> None:
    response = server.http.post("/v1/chat/completions", json=ASK | fields)
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == param
    assert named in error["message"]


def test_schemas_nested_too_deeply_are_no_crash(server: Served) -> None:
    for depth in (100, 1000, 8000):
        form = '{"items":' * depth + "{}" + "}" * depth
        for body in (f'{{"prompt": "a", "guided_json": {form}}}', json.dumps({"prompt": "a", "guided_json": form})):
            response = server.http.post("/v1/completions", content=body)
            assert response.status_code in (200, 400)
    assert server.http.get("/health").status_code == 200
