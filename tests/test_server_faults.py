"""The HTTP server under bad requests, load, failures and signals: errors in OpenAI's shape, and it goes on."""

import asyncio
import json
import random
import re
import signal
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import run, start
from server_process import ASK, LONG, Served, error_of, free_port, in_process, serve, wait_until_idle

from parablock.server.config import ServeConfig
from parablock.server.listener import warn_if_open


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    options = ("--max-rows", "2", "--max-queue", "0", "--max-body", "20000", "--cors-origin", "http://page.test")
    with serve(tmp_path_factory.mktemp("log") / "stderr", "bundled", *options, PARABLOCK_API_KEY="s3cret") as served:
        served.http.headers["Authorization"] = "Bearer s3cret"
        served.client = served.client.with_options(api_key="s3cret")
        yield served


def answers(served: Served) -> bool:
    return bool(served.client.chat.completions.create(**ASK).choices[0].message.content)


def test_the_key(server: Served) -> None:
    for key in ("x", "s3cre", "s3cret2", "S3CRET", "\u00fc"):
        response = httpx.post(
            f"{server.url}/v1/chat/completions", json=ASK, headers={"Authorization": f"Bearer {key}".encode()}
        )
        assert response.status_code == 401
        assert error_of(response)["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        server.client.with_options(api_key="wrong").models.list()
    assert httpx.get(f"{server.url}/metrics").status_code == 401
    assert httpx.get(f"{server.url}/health/ready").status_code == 200
    assert answers(server)
    assert "s3cret" not in server.text()


def test_pages_of_a_named_origin_may_ask(server: Served) -> None:
    asked = {"Origin": "http://page.test", "Access-Control-Request-Method": "POST"}
    allowed = httpx.options(f"{server.url}/v1/chat/completions", headers=asked)
    assert allowed.headers["access-control-allow-origin"] == "http://page.test"
    other = httpx.options(f"{server.url}/v1/chat/completions", headers=asked | {"Origin": "http://evil.test"})
    assert "access-control-allow-origin" not in other.headers


def test_a_body_that_is_too_large(server: Served) -> None:
    for content in (b"x" * 30_000, iter([b"x" * 15_000] * 2)):  # with a length, and in chunks
        response = server.http.post("/v1/chat/completions", content=content)
        assert response.status_code == 413
        assert error_of(response)["code"] == "request_too_large"
    assert answers(server)


def test_a_full_queue(server: Served) -> None:
    streams = [server.client.chat.completions.create(**LONG, stream=True) for _ in range(2)]
    with pytest.raises(openai.RateLimitError) as refused:
        server.client.chat.completions.create(**ASK)
    assert refused.value.code == "queue_full"
    assert int(refused.value.response.headers["Retry-After"]) >= 1
    assert server.metric("parablock_http_responses_total", status="429") == 1
    with pytest.raises(openai.BadRequestError, match="ask for fewer"):
        server.client.chat.completions.create(**ASK, n=3)
    for stream in streams:
        stream.close()
    server.wait_until_idle()
    assert answers(server)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
BASES: dict[str, Any] = {
    "/v1/chat/completions": ASK | {"max_tokens": 2},
    "/v1/completions": {"prompt": "2 + 2", "max_tokens": 2},
    "/v1/responses": {"input": "2 + 2", "max_output_tokens": 2},
    "/tokenize": {"prompt": "2 + 2"},
}
FIELDS = ["model", "messages", "prompt", "stream", "stream_options", "stop", "max_tokens", "n", "temperature", "top_p",
          "seed", "mode", "threshold", "sub_block_size", "strategy", "factor", "tokens_per_step", "top_k",
          "denoising", "logprobs", "tools", "tool_choice", "input", "instructions", "text", "previous_response_id",
          "store", "metadata", "max_completion_tokens", "top_logprobs", "echo", "logit_bias", "presence_penalty",
          "frequency_penalty", "repetition_penalty", "min_p", "min_tokens", "ignore_eos",
          "stop_token_ids"]  # fmt: skip


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from([*BASES]), fields=st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=3))
def test_bodies_with_wrong_fields(server: Served, path: str, fields: dict[str, Any]) -> None:
    response = server.http.post(path, content=json.dumps({**BASES[path], **fields}))
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        error_of(response)


def test_malformed_bodies(server: Served) -> None:
    rng = random.Random(0)
    good = json.dumps(ASK | {"max_tokens": 2}).encode()
    nasty = [
        b"", b"null", b"[]", b"1", b'"x"', b"{", b"\xff\xfe", b"[" * 15_000, b'{"a":' * 3_000, b"1" * 15_000, b"NaN",
        b'{"messages":[{"role":"user","content":"\\ud800"}]}', b'{"\\ud800":1}', b'{"prompt":"\\udfff"}',
        b'{"prompt":[-1]}', b'{"prompt":[99999999999999]}', b'{"prompt":[640]}', b'{"prompt":[]}', b'{"prompt":[[]]}',
        b'{"prompt":""}', b'{"prompt":[1,"a"]}', b'{"prompt":[true]}',
    ]  # fmt: skip
    strange = [
        '"seed":1e400', '"temperature":1e-300', '"temperature":1e-45,"top_p":1e-300', '"factor":1e308',
        '"factor":1e-320,"strategy":"factor"', '"seed":-9223372036854775808,"temperature":1',
        '"top_k":2147483647,"temperature":1', '"min_p":1e-320,"temperature":1', '"echo":true,"logprobs":20',
        '"repetition_penalty":0.01,"logit_bias":{"1":100},"presence_penalty":1e-300', '"min_tokens":2147483647',
        '"logit_bias":{"00001":-100,"1":3},"min_tokens":2,"stop_token_ids":[2147483647,1]',
        '"tokens_per_step":2147483647,"strategy":"fixed"', '"stop":"\\u0000"',
    ]  # fmt: skip
    nasty += [f'{{"prompt":"x\\u0000\\ufdd0","max_tokens":2,{fields}}}'.encode() for fields in strange]
    for _ in range(970):  # two thousand bodies with those above, on two paths
        body = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(body))
            body[at : at + rng.randint(0, 5)] = rng.randbytes(rng.randint(0, 4))
        nasty.append(bytes(body))
    nasty += [b'{"input":"\\ud800"}', b'{"input":[[]]}', b'{"input":[{}]}', b'{"input":[{"type":[]}]}']
    nasty += [b'{"tokens":[-1]}', b'{"tokens":[1e9]}']
    tool = b'{"messages":[{"role":"user","content":"x"}],"tools":[{"type":"function","function":{"name":"f",'
    ends = (
        b'{"\\ud800":1}}}]}', b'{"a":1e999}}}]}', b'{"a":' + b"[" * 9_000,
        b'{"a":' + b"[" * 900 + b"]" * 900 + b"}}}]}", b'{"properties":7}}}],"tool_choice":"required"}',
        b'{"required":[[]]},"strict":true}}]}',
    )  # fmt: skip
    nasty += [tool + b'"parameters":' + end for end in ends]
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"):
        for body in nasty:
            response = server.http.post(path, content=body)
            assert response.status_code < 500, (body[:200], response.text)
            if response.status_code >= 400:
                error_of(response)
    form = server.http.post("/v1/completions", content=b'{"prompt":"x"}', headers={"Content-Type": "text/plain"})
    assert "Content-Type: application/json" in error_of(form)["message"]
    half = error_of(server.http.post("/v1/chat/completions", content=nasty[11]))
    assert half["param"] == "messages.0.content"
    assert "surrogate" in half["message"]
    assert answers(server)
    server.wait_until_idle()


def test_the_openapi_document(server: Served) -> None:
    """Requests made from the document itself."""
    schema = schemathesis.openapi.from_dict(server.http.get("/openapi.json").json())
    schema.config.update(base_url=server.url)

    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(max_examples=15, suppress_health_check=list(HealthCheck), deadline=None)
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            response = case.call(headers={"Authorization": "Bearer s3cret"}, timeout=60)
            assert response.status_code < 500, response.text

        ask()
    assert answers(server)


def test_a_deadline_and_a_port_that_is_taken(tmp_path: Path) -> None:
    with serve(tmp_path / "stderr", "bundled", "--deadline", "0.1") as served:
        with pytest.raises(openai.APIStatusError) as late:
            served.client.chat.completions.create(**LONG)
        assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")
        with pytest.raises(openai.APIError, match="deadline"):
            list(served.client.chat.completions.create(**LONG, stream=True))
        served.wait_until_idle()
        assert served.metric("parablock_requests_total", outcome="error") == 2

        taken = run("serve", "bundled", "--port", served.url.rsplit(":", 1)[1])
        assert (taken.returncode, len(taken.stderr.splitlines())) == (2, 1)
        assert "--port" in taken.stderr
        served.process.send_signal(signal.SIGTERM)  # nothing is running
        assert served.process.wait(timeout=60) == 0


def test_sigterm_lets_running_requests_end(tmp_path: Path) -> None:
    with serve(tmp_path / "stderr", "bundled") as served:
        stream = served.client.chat.completions.create(**LONG, stream=True)
        chunks = [next(stream)]
        served.process.send_signal(signal.SIGTERM)
        while served.http.get("/health/ready").status_code == 200:
            pass
        with pytest.raises(openai.InternalServerError) as refused:
            served.client.chat.completions.create(**ASK)
        assert (refused.value.status_code, refused.value.code) == (503, "shutting_down")
        assert 5 < int(refused.value.response.headers["Retry-After"]) <= 65
        chunks += stream
        assert chunks[-1].choices[0].finish_reason == "length"
        assert served.process.wait(timeout=60) == 0
    assert "Traceback" not in served.text()


def test_killed_and_started_again(tmp_path: Path) -> None:
    port = free_port()
    with serve(tmp_path / "first", "bundled", port=port) as served:
        stream = served.client.chat.completions.create(**LONG, stream=True)
        next(stream)
        served.process.kill()
        with pytest.raises((openai.APIError, httpx.TransportError)):
            list(stream)
        with pytest.raises(openai.APIConnectionError):
            answers(served)
    with serve(tmp_path / "second", "bundled", port=port) as again:  # the same address, at once
        assert answers(again)
        assert answers(served)  # a client of the first one goes on


def test_a_log_that_cannot_be_written() -> None:
    port = free_port()
    with start("serve", "bundled", "--port", port, stderr="/dev/full") as process:
        ends_at = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < ends_at:
            try:
                assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        for _ in range(3):
            assert client.chat.completions.create(**ASK).choices[0].message.content
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


def test_a_client_that_reads_slowly_loses_nothing_and_holds_nobody_up(server: Served) -> None:
    asked = {**LONG, **LONG["extra_body"], "stream": True, "denoising": True}
    body = json.dumps({name: value for name, value in asked.items() if name != "extra_body"})
    address = urlparse(server.url)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer s3cret\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(60)
        slow.connect((address.hostname, address.port))
        slow.sendall((head + body).encode())
        received = slow.recv(100)
        assert all(answers(server) for _ in range(3))  # the other row goes on
        while piece := slow.recv(1000):
            received += piece
    events = re.findall(rb"^data: (\{.*\})\r?$", received, re.M)
    steps = [event["denoising"] for event in map(json.loads, events) if event.get("denoising")]
    assert len(steps) == LONG["max_tokens"]  # one token per forward
    assert b"data: [DONE]" in received
    server.wait_until_idle()


def test_a_client_that_never_reads_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from parablock.server import delivery

    monkeypatch.setattr(delivery, "READ_SECONDS", 0.1)
    served, app = in_process(ServeConfig(max_rows=2, deadline=0.5))
    body = json.dumps({"prompt": "hello", "max_tokens": 300, "stream": True, "mode": "autoregressive"}).encode()
    sent: list[str] = []
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"", "query_string": b"",
        "headers": headers, "http_version": "1.1", "scheme": "http", "server": ("x", 80), "client": ("y", 1),
    }  # fmt: skip

    async def ask() -> None:
        asked = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if asked.is_set():
                await asyncio.Event().wait()  # it does not go away, either
            asked.set()
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message["type"])
            if len(sent) > 2:
                await asyncio.Event().wait()  # the connection is full

        await app(scope, receive, send)

    try:
        asyncio.run(asyncio.wait_for(ask(), 60))
        assert sent == ["http.response.start", "http.response.body", "http.response.body"]
        wait_until_idle(served)
    finally:
        served.engine.close()


def test_an_address_that_others_reach_needs_a_key(server: Served) -> None:
    for address in ("0.0.0.0", "::", "192.168.1.7"):
        with pytest.warns(UserWarning, match="PARABLOCK_API_KEY"):
            warn_if_open(address, asks=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_open("0.0.0.0", asks=True)
        for address in ("127.0.0.1", "::1"):
            warn_if_open(address, asks=False)
    assert "PARABLOCK_API_KEY" not in server.text()
