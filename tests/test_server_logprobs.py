"""Sampling settings and log-probabilities over HTTP: a real server, the real client, OpenAI's shapes."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from server_process import ASK, Served, error_of, serve

import parablock as pb
from parablock.data.chat import encode_prompt, encode_text
from parablock.decoding.generate import resolve
from parablock.evals.likelihood import log_likelihood
from parablock.server.logprobs import Tokens

TEXT = "Mara has 4 boxes"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("log") / "stderr", "bundled", "--also", "bundled-ar", cold=True) as served:
        yield served


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Any, Any]]:
    return {name: pb.load(name) for name in ("bundled", "bundled-ar")}


def alone(model: Any, prompt: list[int], config: pb.DecodeConfig, **more: Any) -> Any:
    with pb.Engine(model, pb.EngineConfig(max_rows=1)) as engine:
        handle = engine.submit(pb.Request(prompt, config, **more))
        handle.result()
        return handle


@pytest.mark.parametrize("name", ["bundled", "bundled-ar"])
def test_settings_reach_the_decoder(server: Served, models: Any, name: str) -> None:
    model, tokenizer = models[name]
    body: dict[str, Any] = {"repetition_penalty": 1.2, "min_p": 0.1, "min_tokens": 12, "stop_token_ids": [20, 21]}
    plain: dict[str, Any] = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "temperature": 0.8, "seed": 3}
    whole = server.client.chat.completions.create(
        **ASK | {"model": name}, **plain, max_tokens=30, logit_bias={"30": 3.5, "31": -100}, extra_body=body
    )
    own = model.generation_config.eos_token_id
    stops = (20, 21, *([own] if isinstance(own, int) else own))
    config: Any = pb.DecodeConfig(
        **plain, **body | {"stop_token_ids": stops}, max_new_tokens=30, logit_bias=((30, 3.5), (31, -100.0))
    )
    tokens = pb.generate(model, encode_prompt(tokenizer, ASK["messages"]), config).tokens[0]
    assert whole.choices[0].message.content == tokenizer.decode(tokens, skip_special_tokens=True)
    endless = server.client.chat.completions.create(
        **ASK | {"model": name}, max_tokens=80, extra_body={"ignore_eos": True}
    )
    assert endless.usage is not None
    assert (endless.usage.completion_tokens, endless.choices[0].finish_reason) == (80, "length")


@pytest.mark.parametrize("name", ["bundled", "bundled-ar"])
def test_chats(server: Served, models: Any, name: str) -> None:
    model, tokenizer = models[name]
    asked = ASK | {"model": name, "max_tokens": 40}
    expected = alone(model, encode_prompt(tokenizer, ASK["messages"]), pb.DecodeConfig(max_new_tokens=40), logprobs=3)
    whole = server.client.chat.completions.create(**asked, logprobs=True, top_logprobs=3).choices[0]
    assert whole.logprobs is not None
    assert whole.logprobs.content is not None
    assert len(whole.logprobs.content) == len(expected.tokens)
    for said, token, told in zip(whole.logprobs.content, expected.tokens, expected.logprobs, strict=True):
        assert said.token == tokenizer.decode([token])
        assert bytes(said.bytes or []).decode() == said.token
        assert said.logprob == pytest.approx(told.logprob, abs=1e-3)
        assert [top.token for top in said.top_logprobs] == [tokenizer.decode([i]) for i, _ in told.top]
    text = b"".join(bytes(said.bytes or []) for said in whole.logprobs.content[:-1]).decode()
    assert text == whole.message.content  # the last one is the stop token
    chunks = [c for c in server.client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, stream=True)]
    streamed = [said for c in chunks if c.choices and (found := c.choices[0].logprobs) for said in found.content or []]
    assert [(s.token, s.bytes) for s in streamed] == [(s.token, s.bytes) for s in whole.logprobs.content]
    shown = ""
    for chunk in chunks:  # a token comes with its text
        shown += chunk.choices[0].delta.content or ""
        for said in (chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or []:
            assert said.token in (*shown, "<|im_end|>") or said.token in shown
    for extra in ({}, {"logprobs": False}):
        assert server.client.chat.completions.create(**asked, **extra).choices[0].logprobs is None


def test_stop_strings_end_what_is_told(server: Served) -> None:
    for stream in (False, True):
        asked: Any = {**ASK, "logprobs": True, "stop": [" lost"], "stream": stream}
        got = server.client.chat.completions.create(**asked)
        choices = [c.choices[0] for c in got] if stream else [got.choices[0]]
        text = "".join((c.delta.content if stream else c.message.content) or "" for c in choices)
        told = [said.token for c in choices if c.logprobs for said in c.logprobs.content]
        assert text
        assert "".join(told).startswith(text)
        assert " lost" not in text
        assert "".join(told[:-1]) != text  # none more than the text's own
    server.wait_until_idle()


@pytest.mark.parametrize("name", ["bundled", "bundled-ar"])
@pytest.mark.parametrize("stream", [False, True])
def test_completions_with_echo(server: Served, models: Any, name: str, stream: bool) -> None:
    model, tokenizer = models[name]
    ids = encode_text(tokenizer, TEXT)
    expected = alone(model, ids, pb.DecodeConfig(max_new_tokens=6), logprobs=2, prompt_logprobs=True)
    asked: Any = {"model": name, "prompt": TEXT, "max_tokens": 6, "logprobs": 2, "echo": True, "stream": stream}
    got = server.client.completions.create(**asked)
    choices = [c.choices[0] for c in got] if stream else [got.choices[0]]
    text = "".join(c.text for c in choices)
    assert text == TEXT + tokenizer.decode(expected.tokens, skip_special_tokens=True)
    told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for choice in choices:
        for field, values in told.items():
            values += getattr(choice.logprobs, field) if choice.logprobs else []
    assert "".join(told["tokens"]).startswith(text)
    assert len(told["tokens"]) == len(ids) + len(expected.tokens)
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        assert text[offset:].startswith(token) or offset == len(text)
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    reference = [*expected.prompt_logprobs[1:], *expected.logprobs]
    assert told["token_logprobs"][1:] == pytest.approx([one.logprob for one in reference], abs=1e-3)
    for token, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        if logprob is None:  # nothing predicts the first
            continue
        assert top[token] == logprob
        assert len(top) in (2, 3)
    plain = server.client.completions.create(**asked | {"stream": False, "logprobs": None})
    assert (plain.choices[0].text, plain.choices[0].logprobs) == (text, None)


@pytest.mark.parametrize("name", ["bundled", "bundled-ar"])
@pytest.mark.parametrize("most", [0, 1])
def test_likelihoods_as_harnesses_ask_for_them(server: Served, models: Any, name: str, most: int) -> None:
    """As lm_eval's local-completions reads them; the same by our own harness's definition."""
    model, tokenizer = models[name]
    context, *others = [encode_text(tokenizer, text) for text in (TEXT, " with 6 pencils", " 24", "\u00e9\U0001f600 x")]
    pairs = [(context, other) for other in others]
    out = server.client.completions.create(
        model=name, prompt=[[*a, *b] for a, b in pairs], max_tokens=most, logprobs=1, echo=True, temperature=0, seed=1
    )
    config = resolve(model, [[0]], pb.DecodeConfig(max_new_tokens=1))
    for choice, (total, greedy), (_, continuation) in zip(
        out.choices, log_likelihood(model, pairs, config), pairs, strict=True
    ):
        assert choice.logprobs is not None
        told = choice.logprobs
        end = None if most == 0 else -1
        own, top = (list(x or [])[len(context) : end] for x in (told.token_logprobs, told.top_logprobs))
        assert len(own) == len(continuation)
        assert sum(own) == pytest.approx(total, abs=1e-3)  # type: ignore[arg-type]
        assert all(a == max(b.values()) for a, b in zip(own, top, strict=True)) == greedy  # type: ignore[type-var]
    assert out.usage is not None
    assert out.usage.completion_tokens == most * len(pairs)
    if most == 0:
        assert out.choices[0].text == TEXT + " with 6 pencils"


def test_tokens_are_parts_of_characters(models: Any) -> None:
    _, tokenizer = models["bundled"]
    tokens = Tokens(tokenizer)
    text = "caf\u00e9 \U0001f600 \u4f60\u597d <|im_end|>\n"
    ids = encode_text(tokenizer, text)
    assert b"".join(tokens.bytes_of(i) for i in ids) == text.encode()
    parts = [tokens.text_of(i) for i in ids if tokens.text_of(i).startswith("bytes:\\x")]
    assert parts
    assert len({tokens.text_of(i) for i in range(len(tokenizer))}) == len(tokenizer)
    assert tokens.bytes_of(10**6) == b""


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"stop_token_ids": list(range(1025))}, "stop_token_ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"9999999999": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(4097)}}, "logit_bias"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": True}, "echo"),
    ],
)
def test_refusals_of_chats(server: Served, change: dict[str, Any], param: str) -> None:
    response = server.http.post("/v1/chat/completions", json={**ASK, **change})
    assert response.status_code == 400
    assert error_of(response)["param"] == param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": 1}, "echo"),
        ({"prompt": [10**30], "echo": True, "logprobs": 1}, None),
        ({"prompt": [-5], "echo": True}, None),
    ],
)
def test_refusals_of_completions(server: Served, change: dict[str, Any], param: str | None) -> None:
    response: httpx.Response = server.http.post("/v1/completions", json={"model": "bundled", "prompt": TEXT} | change)
    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == param or param is None
    server.wait_until_idle()


def test_nothing_is_paid_without(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither log-probabilities nor settings are computed for requests that do not ask."""
    model, _ = models["bundled-ar"]
    called: list[int] = []
    monkeypatch.setattr(torch, "log_softmax", lambda *_: called.append(1))
    monkeypatch.setattr("parablock.decoding.adjust._penalise", lambda *_: called.append(2))
    assert alone(model, [5, 6, 7], pb.DecodeConfig(max_new_tokens=4)).tokens
    assert not called


@pytest.mark.parametrize("name", ["bundled", "bundled-ar"])
def test_beside_a_grammar(server: Served, models: Any, name: str) -> None:
    """Settings and grammar hold together: it ends an answer that `min_tokens` would have go on."""
    model, tokenizer = models[name]
    ids = encode_text(tokenizer, TEXT)
    allowed = ["12 coins", "7 pencils", "40 boxes of apples"]
    body: dict[str, Any] = {"structured_outputs": {"choice": allowed}, "min_tokens": 30, "repetition_penalty": 1.3}
    modes: Any = {"bundled": ("diffusion", "autoregressive"), "bundled-ar": ("autoregressive", "speculative")}[name]
    asked: dict[str, Any] = {"model": name, "prompt": TEXT, "max_tokens": 40, "logprobs": 2, "echo": True}
    for mode in modes:
        expected = alone(model, ids, pb.DecodeConfig(mode=mode), logprobs=2, prompt_logprobs=True)
        prompt = [one.logprob for one in expected.prompt_logprobs[1:]]
        for extra in ({}, {"ignore_eos": True}, {"temperature": 1.0, "seed": 2, "presence_penalty": 1.5}):
            out = server.client.completions.create(**asked, extra_body={**body, **extra, "mode": mode})
            [choice] = out.choices
            assert choice.text.removeprefix(TEXT) in allowed
            assert choice.logprobs is not None
            told = choice.logprobs.token_logprobs or []
            assert len(told) == len(choice.logprobs.tokens or []) > len(ids)
            assert told[1 : len(ids)] == pytest.approx(prompt, abs=1e-3)
    empty = server.client.completions.create(**asked, extra_body={"structured_outputs": {"regex": ""}, "mode": mode})
    assert empty.choices[0].text == TEXT
    assert empty.choices[0].logprobs is not None
    assert (empty.choices[0].logprobs.token_logprobs or [])[1 : len(ids)] == pytest.approx(prompt, abs=1e-3)
    server.wait_until_idle()


@pytest.mark.parametrize("name", ["bundled", "bundled-ar"])
def test_the_real_harness(server: Served, models: Any, name: str) -> None:
    """lm_eval's own client of completions finds what our harness finds, answers and likelihoods."""
    for library in ("lm_eval", "tenacity"):
        pytest.importorskip(library, reason="the harness and its clients: pip install 'lm_eval[api]'")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from parablock.checkpoints.named import BUNDLED
    from parablock.evals.harness import ParablockLM

    model, tokenizer = models[name]
    pairs = [("Mara has 4 boxes with 6", " pencils"), ("Mara has 4 boxes", " of\n 24"), ("2 + 2 =", " 4")]
    asked: Any = [Instance("loglikelihood", {}, pair, 0, ("task", i, 1)) for i, pair in enumerate(pairs)]
    remote = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model=name, tokenizer=str(BUNDLED / "ar"),
        tokenizer_backend="huggingface", batch_size=2, max_length=512,
    )  # fmt: skip
    ours = ParablockLM(model, tokenizer)
    for (total, greedy), (expected, best) in zip(remote.loglikelihood(asked), ours.loglikelihood(asked), strict=True):
        assert total == pytest.approx(expected, abs=1e-3)
        assert greedy == best
