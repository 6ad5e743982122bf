"""A real server for the tests: a process with the real client, or an application of the test's own process."""

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
from fastapi import FastAPI
from odd_device import odd_device
from processes import Running, start, start_function

import parablock as pb
from parablock.server.app import create_app
from parablock.server.config import ServeConfig
from parablock.server.served import ServedModel

QUESTION = "Teki had 40 coins but lost 8 of them. Teki buys 8 more. How many coins does Teki have now?"
ASK: dict[str, Any] = {"model": "bundled", "messages": [{"role": "user", "content": QUESTION}]}
# 400 tokens, one per forward: nothing else ends it
# the bundled model answers this with zeros that never end, one after the other
ENDLESS = {"model": "bundled", "messages": [{"role": "user", "content": "coins takes Teki pencils"}]}
LONG: dict[str, Any] = ENDLESS | {"max_tokens": 400, "extra_body": {"mode": "autoregressive"}}

HELD: list[socket.socket] = []  # until the tests end


class Served:
    """A running `parablock serve` and what it has logged."""

    def __init__(self, process: Running, log: Path) -> None:
        self.process = process
        self._log = log
        self.url = self._wait_for_url()
        self.http = httpx.Client(base_url=self.url, timeout=60, headers={"Content-Type": "application/json"})
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def _wait_for_url(self) -> str:
        ends_at = time.monotonic() + 200
        while time.monotonic() < ends_at and self.process.poll() is None:
            if found := re.search(r"at (http://\S+)/v1", self.text()):
                return found[1]
            time.sleep(0.1)
        raise AssertionError(self.text())

    def text(self) -> str:
        return self._log.read_text()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text().splitlines() if line.startswith("{")]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        total = 0.0
        for line in self.http.get("/metrics").text.splitlines():
            named = re.match(rf"{name}(?:{{(.*)}})? (\S+)$", line)
            if named and all(f'{k}="{v}"' in named[1] for k, v in labels.items()):
                total += float(named[2])
        return total

    def wait_until_idle(self, seconds: float = 30) -> None:
        ends_at = time.monotonic() + seconds
        names = ("parablock_running", "parablock_queue", "parablock_kv_pages_used")
        while any(left := [self.metric(name) for name in names]):
            assert time.monotonic() < ends_at, left
            time.sleep(0.02)


def free_port() -> int:
    """A port that nobody else gets: a socket that does not listen holds it, and a server may still bind it."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    HELD.append(holder)
    port: int = holder.getsockname()[1]
    return port


@contextmanager
def serve(
    log: Path, *arguments: str, port: int = 0, cold: bool = False, device: Path | None = None, **environment: str
) -> Iterator[Served]:
    """`device`: the folder of `odd_device`."""
    log.touch()
    command = ["serve", *arguments, "--port", str(port)]
    if device is None:
        started = start(*command, cold=cold, stderr=str(log), environment=environment)
    else:
        started = start_function(odd_device, str(device), command, stderr=str(log), environment=environment)
    with started as process:
        yield Served(process, log)


def in_process(config: ServeConfig) -> tuple[ServedModel, FastAPI]:
    """The bundled model behind an application of this process."""
    engine = pb.EngineConfig(max_rows=config.max_rows, max_queue=config.max_queue)
    served = ServedModel("bundled", *pb.load("bundled"), engine)
    return served, create_app([served], config)


def wait_until_idle(served: ServedModel) -> None:
    ends_at = time.monotonic() + 30
    while served.engine.stats["running"] or served.engine.stats["waiting"]:
        assert time.monotonic() < ends_at
        time.sleep(0.01)


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]
