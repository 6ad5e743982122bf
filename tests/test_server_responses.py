"""`/v1/responses`, `/tokenize` and `/detokenize`: a real process, the real openai client."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from server_process import ASK, QUESTION, Served, error_of, serve

import parablock as pb
from parablock.data.chat import encode_prompt, encode_text
from parablock.server.response_store import Kept, ResponseStore

CUT = {"model": "bundled", "input": QUESTION, "max_output_tokens": 5}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("log") / "stderr", "bundled", "--keep-responses", "3") as served:
        yield served


@pytest.fixture(scope="module")
def answer(server: Served) -> str:
    """What a chat answers."""
    return str(server.client.chat.completions.create(**ASK).choices[0].message.content)


def test_a_response_is_the_answer_of_a_chat(server: Served, answer: str) -> None:
    parts = [{"type": "input_text", "text": QUESTION}]
    for given in (
        QUESTION,
        [{"role": "user", "content": QUESTION}],
        [{"type": "message", "role": "user", "content": parts}],
    ):
        response = server.client.responses.create(model="bundled", input=given)  # type: ignore[arg-type]
        assert response.output_text == answer
        assert (response.status, response.object, response.model) == ("completed", "response", "bundled")
        [item] = response.output
        assert (item.type, item.status) == ("message", "completed")
    chat = server.client.chat.completions.create(**ASK)
    assert chat.usage is not None
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (
        chat.usage.prompt_tokens, chat.usage.completion_tokens,
    )  # fmt: skip
    assert response.to_dict()["parablock"]["forwards"] >= 1  # type: ignore[index]


def test_settings_and_instructions_reach_the_model(server: Served) -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": QUESTION}]
    extra = {"threshold": 0.5, "seed": 3, "mode": "autoregressive"}
    chat = server.client.chat.completions.create(
        model="bundled", messages=messages, temperature=4.0, top_p=0.9, max_tokens=20, extra_body=extra  # type: ignore[arg-type]
    )  # fmt: skip
    response = server.client.responses.create(
        model="bundled", input=QUESTION, instructions="Be short.", temperature=4.0, top_p=0.9, max_output_tokens=20,
        extra_body=extra,
    )  # fmt: skip
    assert response.output_text == chat.choices[0].message.content
    assert (response.temperature, response.top_p, response.instructions) == (4.0, 0.9, "Be short.")


def test_a_cut_response_is_incomplete(server: Served) -> None:
    response = server.client.responses.create(**CUT)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"  # type: ignore[union-attr]
    *_, last = server.client.responses.create(**CUT, stream=True)
    assert last.type == "response.incomplete"


def test_the_events_of_a_stream(server: Served, answer: str) -> None:
    events = list(server.client.responses.create(model="bundled", input=QUESTION, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert deltas > 1
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == answer
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == answer
    with server.client.responses.stream(model="bundled", input=QUESTION) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == answer


def test_a_response_that_was_kept_is_followed(server: Served) -> None:
    first = server.client.responses.create(model="bundled", input=QUESTION, instructions="Be short.")
    second = server.client.responses.create(model="bundled", input="And now?", previous_response_id=first.id)
    chat = server.client.chat.completions.create(
        model="bundled",
        messages=[
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "And now?"},
        ],
    )
    assert second.output_text == chat.choices[0].message.content
    by_items = server.client.responses.create(
        model="bundled",
        input=[{"role": "user", "content": QUESTION}, *first.output, {"role": "user", "content": "And now?"}],  # type: ignore[list-item]
    )
    assert by_items.output_text == second.output_text
    *_, last = server.client.responses.create(
        model="bundled", input="Why?", previous_response_id=second.id, stream=True
    )
    assert last.type == "response.completed"
    assert last.response.previous_response_id == second.id
    assert server.client.responses.retrieve(second.id).output_text == second.output_text
    server.client.responses.delete(second.id)
    for gone in (second.id, "resp_0"):
        with pytest.raises(openai.NotFoundError, match="no response"):
            server.client.responses.retrieve(gone)
        with pytest.raises(openai.NotFoundError, match="no response"):
            server.client.responses.create(model="bundled", input="x", previous_response_id=gone)
    unkept = server.client.responses.create(**CUT, store=False)
    with pytest.raises(openai.NotFoundError):
        server.client.responses.retrieve(unkept.id)
    server.client.responses.retrieve(last.response.id)
    for _ in range(3):
        server.client.responses.create(**CUT)
    with pytest.raises(openai.NotFoundError):
        server.client.responses.retrieve(last.response.id)  # a fourth one has taken its place


def test_a_store_has_bounds() -> None:
    store = ResponseStore(10, most_bytes=1000)
    for number in range(5):
        store.keep(Kept({"id": str(number), "text": "x" * 300}, []))
    assert [store.get(str(number)) is not None for number in range(5)] == [False, False, False, True, True]
    assert store.delete("3")
    assert not store.delete("3")
    store.keep(Kept({"id": "large", "text": "x" * 3000}, []))
    assert store.get("large") is None
    assert store.get("4") is None
    none = ResponseStore(0)
    none.keep(Kept({"id": "0"}, []))
    assert none.get("0") is None


def test_without_a_limit_nothing_is_kept(tmp_path: Any) -> None:
    with serve(tmp_path / "stderr", "bundled") as served:
        response = served.client.responses.create(**CUT)
        assert response.to_dict()["store"] is False
        with pytest.raises(openai.NotFoundError):
            served.client.responses.retrieve(response.id)
        for field in ({"store": True}, {"previous_response_id": response.id}):
            with pytest.raises(openai.BadRequestError, match="--keep-responses"):
                served.client.responses.create(**CUT, **field)  # type: ignore[call-overload]


IMAGE = {"type": "input_image", "image_url": "data:,"}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input.0.message.content", "text alone"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input.0.message.content", "text alone"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input.0", "a message, a function_call"),
        ({"input": []}, "input", "at least 1"),
        ({"input": 3}, "input", "valid list"),
        ({"input": [{"type": "function_call", "name": "x"}]}, "input.0.function_call.call_id", "required"),
        ({"max_tokens": 3}, "max_tokens", "max_output_tokens"),
        ({"n": 2}, "n", "one answer"),
        ({"response_format": {"type": "json_object"}}, "response_format", "text.format"),
        ({"messages": []}, "messages", "not supported"),
        ({"background": True}, "background", "not supported"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "not supported"),
        ({"truncation": "auto"}, "truncation", "not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "function"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater"),
        ({"temperature": -1}, "temperature", "greater"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(server: Served, body: Any, param: str, words: str) -> None:
    response = server.http.post("/v1/responses", json={"input": "x", **body})
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == param
    assert words in error["message"]


def test_values_that_change_nothing_are_accepted(server: Served) -> None:
    neutral = {"background": False, "truncation": "disabled", "include": [], "reasoning": None, "conversation": None,
               "metadata": {"a": "b"}, "user": "me", "text": {"format": {"type": "text"}}, "tools": [],
               "tool_choice": "auto", "service_tier": "auto", "parallel_tool_calls": True}  # fmt: skip
    response = server.http.post("/v1/responses", json={**CUT, **neutral})
    assert response.status_code == 200, response.text


def test_tokenize_and_detokenize(server: Served) -> None:
    _, tokenizer = pb.load("bundled")
    text = "Mara has 4 <|im_end|> boxes, Zoë 数学"
    body = server.http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    ids = encode_text(tokenizer, text)
    assert body == {
        "count": len(ids), "max_model_len": tokenizer.model_max_length, "tokens": ids,
        "token_strs": tokenizer.convert_ids_to_tokens(ids),
    }  # fmt: skip
    assert server.http.post("/detokenize", json={"model": "bundled", "tokens": ids}).json() == {"prompt": text}
    chat = server.http.post("/tokenize", json={"messages": ASK["messages"]}).json()
    assert chat["tokens"] == encode_prompt(tokenizer, ASK["messages"])
    assert "token_strs" not in chat
    without = server.http.post("/tokenize", json={"messages": ASK["messages"], "add_generation_prompt": False}).json()
    assert without["tokens"] == chat["tokens"][: without["count"]]
    assert without["count"] < chat["count"]
    assert len(tokenizer) < (long := server.http.post("/tokenize", json={"prompt": "one two " * 9_000}).json()["count"])
    assert long > 18_000


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": ASK["messages"]}, "prompt"),
        ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, "tools"),
        ("/tokenize", {"prompt": "x", "chat_template": "y"}, "chat_template"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {"tokens": [99999]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_wrong_bodies_of_the_tokenizer(server: Served, path: str, body: Any, param: str) -> None:
    response = server.http.post(path, content=json.dumps(body))
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert server.http.post(path, json={"model": "gpt", "prompt": "x", "tokens": [1]}).status_code in (400, 404)
