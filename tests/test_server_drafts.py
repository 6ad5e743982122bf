"""Speculative decoding over HTTP: a real server process, the real openai client."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from server_process import QUESTION, Served, serve

import parablock as pb
from parablock.data.chat import encode_prompt

ASK: dict[str, Any] = {"model": "", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 60}
BY_MASKS = {"mode": "speculative", "drafter": "masks", "draft_tokens": 4}


@pytest.fixture(scope="module")
def server(causal_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("log") / "stderr", str(causal_adapter), "--also", "bundled") as served:
        ASK["model"] = str(causal_adapter)
        yield served


@pytest.fixture(scope="module")
def expected(causal_adapter: Path) -> Any:
    model, tokenizer = pb.load(causal_adapter)
    prompt = encode_prompt(tokenizer, ASK["messages"])
    out = pb.generate(model, prompt, pb.DecodeConfig(max_new_tokens=60, **BY_MASKS))
    return out, tokenizer.decode(out.tokens[0], skip_special_tokens=True)


def test_an_answer_tells_what_was_drafted(server: Served, expected: Any) -> None:
    out, text = expected
    assert out.accepted[0] > 0
    before = {name: counted(server, name) for name in ("drafted", "accepted")}
    forwards = server.metric("parablock_speculative_forwards_total", model=ASK["model"])
    whole = server.client.chat.completions.create(**ASK, extra_body=BY_MASKS)
    assert whole.choices[0].message.content == text
    figures = whole.model_extra["parablock"]
    assert (figures["drafted"], figures["accepted"]) == (out.drafted[0], out.accepted[0])
    assert (figures["drafted_by"], figures["accepted_by"]) == (out.drafted_by, out.accepted_by)
    assert figures["forwards"] == out.decode_forwards[0]
    assert counted(server, "drafted") == before["drafted"] + out.drafted[0]
    assert counted(server, "accepted") == before["accepted"] + out.accepted[0]
    assert server.metric("parablock_drafted_tokens_total", model=ASK["model"], drafter="lookup") == 0
    added = server.metric("parablock_speculative_forwards_total", model=ASK["model"]) - forwards
    assert added == out.decode_forwards[0]


def counted(server: Served, name: str) -> float:
    return server.metric(f"parablock_{name}_tokens_total", model=ASK["model"], drafter="masks")


def test_what_else_decodes_has_no_drafts(server: Served, expected: Any) -> None:
    for change in ({"extra_body": {"mode": "autoregressive"}}, {"model": "bundled"}):
        figures = server.client.chat.completions.create(**{**ASK, **change}).model_extra["parablock"]
        assert not {"drafted", "accepted", "drafted_by", "accepted_by"} & {*figures}
    assert server.metric("parablock_speculative_forwards_total", model="bundled") == 0
    ar = server.client.chat.completions.create(**ASK, extra_body={"mode": "autoregressive"})
    assert ar.choices[0].message.content == expected[1]


def test_a_stream_shows_drafts_beside_settled_text(server: Served, expected: Any) -> None:
    out, text = expected
    stream = server.client.chat.completions.create(
        **ASK, stream=True, stream_options={"include_usage": True}, extra_body={"denoising": True, **BY_MASKS}
    )
    told, accepted, refused, waiting = "", 0, 0, []
    for chunk in stream:
        if chunk.choices:
            told += chunk.choices[0].delta.content or ""
        assert text.startswith(told)  # a draft is never told as text
        if step := chunk.model_extra.get("denoising"):
            revealed = [token["text"] for token in step["tokens"] if token["revealed"]]
            new = sum(step["accepted"].values()) - accepted
            assert [*revealed[:new], *step["refused"]] == waiting[: new + len(step["refused"])]
            assert new in (len(revealed) - 1, len(revealed))  # the last one is the model's own
            accepted, refused, waiting = accepted + new, refused + len(step["refused"]), step["drafts"]
            assert sum(step["drafted"].values()) == accepted + refused
        if figures := chunk.model_extra.get("parablock"):
            assert figures["accepted"] == accepted
    assert (told, accepted, refused) == (text, out.accepted[0], out.drafted[0] - out.accepted[0])


def test_a_stop_string_keeps_the_counts(server: Served, expected: Any) -> None:
    out, text = expected
    whole = server.client.chat.completions.create(**ASK, stop=text[20:24], n=2, extra_body=BY_MASKS)
    assert {choice.message.content for choice in whole.choices} == {text[: text.find(text[20:24])]}
    assert 0 < whole.model_extra["parablock"]["drafted"] < 2 * out.drafted[0]


def test_the_card_and_wrong_settings(server: Served) -> None:
    cards = {card.id: card.model_extra["parablock"] for card in server.client.models.list()}
    assert cards[ASK["model"]]["modes"] == ["speculative", "autoregressive"]
    assert cards[ASK["model"]]["drafters"] == ["both", "masks", "lookup"]
    assert cards["bundled"]["drafters"] == []
    for body, param in (
        ({**BY_MASKS, "draft_threshold": 1.0}, "draft_threshold"),
        ({**BY_MASKS, "drafter": "oracle"}, "drafter"),
        ({**BY_MASKS, "draft_tokens": 0}, "draft_tokens"),
        ({"mode": "autoregressive", "draft_tokens": 3}, "draft_tokens"),
        ({"mode": "diffusion"}, "mode"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            server.client.chat.completions.create(**ASK, extra_body=body)
        assert refused.value.param == param
    high = server.client.chat.completions.create(**ASK, extra_body={**BY_MASKS, "draft_threshold": 0.999})
    assert high.model_extra["parablock"]["drafted"] == 0
