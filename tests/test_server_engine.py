"""The server when its engine is full, fails or is lost; and how it ends."""

import asyncio
import itertools
import json
import signal
import socket
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from server_process import ASK, LONG, error_of, in_process, serve, wait_until_idle

from parablock.server.config import ServeConfig
from parablock.server.listener import Listener


async def ask(app: Any, **changes: Any) -> httpx.Response:
    """A short request to an application in this process."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        return await client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 8, **changes})


async def health(app: Any, kind: str) -> tuple[int, str]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        response = await client.get(f"/health/{kind}")
    return response.status_code, response.json()["status"]


def code_of(response: httpx.Response, stream: bool) -> str:
    if not stream:
        assert response.status_code == 500
        return str(error_of(response)["code"])
    *_, event, done = [line[6:] for line in response.text.splitlines() if line]
    assert done == "[DONE]"
    return str(json.loads(event)["error"]["code"])


def on_a_device_that_waits(burst: Callable[[Any, Any, threading.Event], Coroutine[Any, Any, None]]) -> None:
    """Room for two answers and one that waits; no forward runs before `burst(served, app, go)` sets `go`."""
    served, app = in_process(ServeConfig(max_rows=2, max_queue=1))
    go = threading.Event()
    served.engine.model.get_decoder().register_forward_pre_hook(lambda *_: go.wait(60) and None)
    try:
        asyncio.run(burst(served, app, go))
        wait_until_idle(served)
    finally:
        go.set()
        served.engine.close()


def test_the_queue_never_holds_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many at once, whose prompts are encoded beside the event loop; the device stands still meanwhile."""
    from parablock.server import conversation as module

    monkeypatch.setattr(module, "LONG", 0)

    async def burst(served: Any, app: Any, go: threading.Event) -> None:
        tasks = [asyncio.create_task(ask(app)) for _ in range(12)]
        refused = [await task for task in itertools.islice(asyncio.as_completed(tasks, timeout=30), 9)]
        assert {response.status_code for response in refused} == {429}
        assert {error_of(response)["code"] for response in refused} == {"queue_full"}
        assert {response.headers["Retry-After"] for response in refused} == {"1"}
        go.set()
        assert sorted([(await task).status_code for task in tasks]) == [200] * 3 + [429] * 9

    on_a_device_that_waits(burst)


def test_all_choices_of_a_request_or_none() -> None:
    async def burst(served: Any, app: Any, go: threading.Event) -> None:
        one = asyncio.create_task(ask(app))
        while not served.engine.stats["running"]:
            await asyncio.sleep(0.01)
        many = await ask(app, n=3)  # two would fit
        assert (many.status_code, error_of(many)["code"]) == (429, "queue_full")
        go.set()
        assert (await one).status_code == 200
        while (again := await ask(app, n=3)).status_code == 429:  # the two are gone within a step
            await asyncio.sleep(0.01)
        assert len(again.json()["choices"]) == 3

    on_a_device_that_waits(burst)


def test_when_to_try_again() -> None:
    """By how long the last answers took: three places, each free after twenty seconds."""
    served, _ = in_process(ServeConfig(max_rows=2, max_queue=1))
    served.engine.close()
    assert served.retry_after(1) == 1  # nothing is known yet
    served.ended(8, 20.0)
    assert (served.retry_after(1), served.retry_after(2)) == (7, 14)
    served.ended(32, 500.0)
    assert served.retry_after(1) == 60
    served.ended(32, 0.01)
    assert served.retry_after(3) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_step_that_fails(stream: bool) -> None:
    served, app = in_process(ServeConfig(max_rows=2))
    left = [1]  # so many forwards fail

    def fail(*_: Any) -> None:
        if left:
            left.pop()
            raise RuntimeError("out of memory")

    served.engine.model.get_decoder().register_forward_pre_hook(fail)
    try:
        assert code_of(asyncio.run(ask(app, stream=stream)), stream) == "decoding_failed"
        assert asyncio.run(ask(app)).status_code == 200
        assert asyncio.run(health(app, "live")) == (200, "live")
        wait_until_idle(served)
    finally:
        served.engine.close()
    closed = asyncio.run(ask(app))
    assert (closed.status_code, error_of(closed)["code"]) == (503, "shutting_down")


@pytest.mark.parametrize("stream", [False, True])
def test_a_device_that_is_lost(stream: bool) -> None:
    served, app = in_process(ServeConfig(max_rows=2))

    all_in = False

    def fail(*_: Any) -> None:
        nonlocal all_in
        while not all_in:
            all_in = served.engine.stats["running"] + served.engine.stats["waiting"] == 4
        raise RuntimeError("device-side assert triggered: /secret/path")

    assert asyncio.run(ask(app)).status_code == 200
    served.engine.model.get_decoder().register_forward_pre_hook(fail)

    async def burst() -> list[httpx.Response]:
        return await asyncio.gather(*(ask(app, stream=stream) for _ in range(4)))  # two of them wait for a row

    assert {code_of(response, stream) for response in asyncio.run(burst())} == {"decoding_failed"}
    assert served.engine.closed
    refused = asyncio.run(ask(app))
    assert (refused.status_code, error_of(refused)["code"]) == (503, "engine_stopped")
    for kind in ("live", "ready"):
        assert asyncio.run(health(app, kind)) == (503, "the engine of bundled has stopped: RuntimeError")


def test_a_server_whose_device_is_lost_ends(tmp_path: Path) -> None:
    with serve(tmp_path / "stderr", "bundled", "--host", "0.0.0.0", device=tmp_path) as served:
        assert "0.0.0.0 can be reached from other machines" in served.text()
        assert "PARABLOCK_API_KEY" in served.text()
        served.client.chat.completions.create(**ASK)
        (tmp_path / "broken").touch()
        with pytest.raises(openai.InternalServerError) as failed:
            served.client.chat.completions.create(**ASK)
        assert (failed.value.status_code, failed.value.code) == (500, "decoding_failed")
        assert served.process.wait(timeout=60) == 1
    last = served.text().splitlines()[-1]
    assert last == "parablock: the engine of bundled has stopped (device-side assert triggered)"


@pytest.mark.parametrize(("drain", "signals"), [("0", 1), ("600", 2)])
def test_running_requests_are_cut_off_when_their_time_is_over(tmp_path: Path, drain: str, signals: int) -> None:
    with serve(tmp_path / "stderr", "bundled", "--drain", drain, device=tmp_path) as served:
        (tmp_path / "slow").touch()  # 40 seconds for an answer
        stream = served.client.chat.completions.create(**LONG, stream=True)
        next(stream)
        served.process.send_signal(signal.SIGTERM)
        if signals == 2:
            while served.http.get("/health/ready").status_code == 200:
                pass
            assert served.http.get("/health/live").status_code == 200
            served.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert served.process.wait(timeout=60) == 0
    assert "Traceback" not in served.text()


def test_a_server_that_does_not_start_says_why() -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    listening.close()
    with pytest.raises(OSError, match=r"the HTTP server did not start \(.*Bad file descriptor\)"):
        Listener(FastAPI(), listening)
