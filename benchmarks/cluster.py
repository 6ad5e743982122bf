"""Replicas on Ray against one process: throughput, time to first token, prefixes reused, and a soak with kills.

    python benchmarks/cluster.py way         # the bundled model, whose answers take 15 ms: what the way costs; the soak
    python benchmarks/cluster.py replicas    # SmolLM2, whose answers take their time: what a second replica brings

16 clients and one thread for each engine: one plain process, then one and two replicas. `way` has chats of six turns,
too, under Ray's default router and ours, and on one process: what share of their prompts is reused; and a soak of 32
clients on two replicas, one of which is killed twice. Every answer is compared with that of `pb.generate`. Writes
`benchmarks/results/cluster-*.json`; a wrong or lost answer is exit status 1.
"""

import asyncio
import collections
import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
from common import measure_parts, questions
from serving import expected_answers

import parablock as pb
from parablock.evals.word_problems import test_problems

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TURNS, CHATS = 6, 16
REAL_TOKENS, ROWS = 24, 4  # of a real model's answers, and how many of them an engine decodes at a time
CLIENTS, SECONDS, SOAK_SECONDS = 16, 30.0, 60.0
SETTLE = 10.0  # seconds, until Ray's own processes have started for good


@contextlib.contextmanager
def server(model: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A process of `parablock serve`, and its address."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        log = Path(folder) / "stderr"
        with log.open("wb") as stderr:
            command = [
                sys.executable,
                "-m",
                "parablock",
                "serve",
                model,
                "--dtype",
                "float32",
                "--port",
                "0",
                *arguments,
            ]
            process = subprocess.Popen(command, stderr=stderr, env={**ENVIRONMENT, "RAY_TMPDIR": folder})
        try:
            while not (found := re.search(r"at (http://\S+)/v1", log.read_text())):
                if process.poll() is not None:
                    raise RuntimeError(log.read_text())
                time.sleep(0.2)
            time.sleep(SETTLE)
            yield process, found[1]
        finally:
            process.terminate()
            process.wait(timeout=120)


async def ask(client: Any, question: str, answer: str, **options: Any) -> dict[str, Any]:
    started, text, first = time.perf_counter(), "", 0.0
    messages = [{"role": "user", "content": question}]
    try:
        async for chunk in await client.chat.completions.create(messages=messages, stream=True, **options):
            if chunk.choices and (piece := chunk.choices[0].delta.content):
                text += piece
                first = first or time.perf_counter() - started
    except openai.APIError as error:
        return {"outcome": getattr(error, "code", None) or repr(error)}
    return {"outcome": "right" if text == answer else "wrong", "first": first}


async def load(url: str, expected: dict[str, str], clients: int, seconds: float, **options: Any) -> dict[str, Any]:
    """So many clients ask one question after the other."""
    questions, seen = list(expected), []
    started = time.perf_counter()
    http = httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=120)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http) as client:

        async def one(number: int) -> None:
            while time.perf_counter() < started + seconds:
                question = questions[number % len(questions)]
                seen.append(await ask(client, question, expected[question], **options))
                number += clients

        await asyncio.gather(*map(one, range(clients)))
    took = time.perf_counter() - started
    firsts = [request["first"] for request in seen if "first" in request]
    outcomes = dict(collections.Counter(request["outcome"] for request in seen))
    rate = outcomes.get("right", 0) / took
    return {
        "answers_per_second": round(rate, 2),
        "first_p50": round(statistics.median(firsts), 4),
        "outcomes": outcomes,
    }


def chats(url: str, questions: list[str]) -> float:
    """The share of the prompts' tokens that were reused."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    messages: list[list[dict[str, str]]] = [[] for _ in range(CHATS)]
    told = cached = 0
    for turn in range(TURNS):
        for number, chat in enumerate(messages):
            chat.append({"role": "user", "content": questions[(turn + number) % len(questions)][:60]})
            answer = client.chat.completions.create(model="bundled", messages=chat, max_tokens=16)
            chat.append({"role": "assistant", "content": answer.choices[0].message.content or "-"})
            told += answer.usage.prompt_tokens
            cached += answer.usage.prompt_tokens_details.cached_tokens
    return round(cached / told, 4)


def soak(process: subprocess.Popen[bytes], url: str, expected: dict[str, str], seconds: float) -> dict[str, Any]:
    """32 clients; a third and two thirds through, a replica is killed."""

    def living() -> list[psutil.Process]:
        found = psutil.Process(process.pid).children(recursive=True)
        return [p for p in found if _is_replica(p)]

    async def kill() -> int:
        for _ in range(2):
            await asyncio.sleep(seconds / 3)
            living()[0].kill()
        return len(living())

    async def both() -> dict[str, Any]:
        told, _ = await asyncio.gather(load(url, expected, 32, seconds, model="bundled"), kill())
        return told

    before = [round(p.memory_info().rss / 2**20) for p in living()]
    told = asyncio.run(both())
    time.sleep(30)  # the last one comes back
    return {**told, "memory_mib": {"start": before, "end": [round(p.memory_info().rss / 2**20) for p in living()]}}


def way_seconds(pid: int) -> dict[str, float]:
    """What the processor has spent on the way to the replicas so far."""
    spent = {"ProxyActor": 0.0, "replica:front": 0.0, "ServeController": 0.0}
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            name = " ".join(process.cmdline()).replace("ServeReplica:parablock:front", "replica:front")
            for kind in spent:
                if kind in name:
                    spent[kind] += sum(process.cpu_times()[:2])
    return spent


def _is_replica(process: psutil.Process) -> bool:
    try:
        return "ServeReplica:parablock:replica" in " ".join(process.cmdline())
    except psutil.Error:  # just killed
        return False


def real_answers(problems: int) -> dict[str, str]:
    """SmolLM2's."""
    model, tokenizer = pb.load("smollm2", device="cpu", dtype="float32")
    asked = test_problems(1, problems)
    out = pb.generate(model, questions(tokenizer, asked), pb.DecodeConfig(max_new_tokens=REAL_TOKENS))
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in out.tokens]
    return {problem.question: text for problem, text in zip(asked, texts, strict=True)}


def way(problems: int, repeats: int) -> dict[str, Any]:
    """The bundled model: one plain process, then what the way to replicas costs; chats, the soak."""
    expected = expected_answers("bundled", "diffusion", problems)
    cases = {
        "one process": (), "one replica": ("--replicas", "1"), "two replicas": ("--replicas", "2"),
        "two replicas, Ray's router": ("--replicas", "2", "--routing", "balance"),
    }  # fmt: skip
    report: dict[str, Any] = {}
    for name, arguments in cases.items():
        with server("bundled", *arguments) as (process, url):
            before = way_seconds(process.pid)
            asked = [asyncio.run(load(url, expected, CLIENTS, SECONDS, model="bundled")) for _ in range(repeats)]
            answers = sum(sum(run["outcomes"].values()) for run in asked)
            spent = {kind: (way_seconds(process.pid)[kind] - seconds) / answers for kind, seconds in before.items()}
            report[name] = {"load": asked, "way_seconds_per_answer": spent, "reused": chats(url, list(expected))}
            if name == "two replicas":
                report["soak"] = soak(process, url, expected, SOAK_SECONDS)
        print(name, report[name], flush=True)
    return _right(report, [*(run for name in cases for run in report[name]["load"]), report["soak"]])


def replicas(problems: int, repeats: int) -> dict[str, Any]:
    """SmolLM2, `ROWS` answers at a time in each engine: what a second replica brings where answers take their time."""
    expected = real_answers(problems)
    asked = {"model": "smollm2", "max_tokens": REAL_TOKENS}
    report: dict[str, Any] = {"rows": ROWS}
    for name, arguments in {
        "one process": (),
        "one replica": ("--replicas", "1"),
        "two replicas": ("--replicas", "2"),
    }.items():
        with server("smollm2", "--max-rows", str(ROWS), *arguments) as (_, url):
            report[name] = [asyncio.run(load(url, expected, CLIENTS, SECONDS, **asked)) for _ in range(repeats)]
        print(name, report[name], flush=True)
    return _right(report, [run for name in report if name != "rows" for run in report[name]])


def _right(report: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """SystemExit unless every answer came, or its own error."""
    if bad := {outcome for run in runs for outcome in run["outcomes"]} - {"right", "replica_lost"}:
        raise SystemExit(f"not every answer came: {bad}")
    return report


if __name__ == "__main__":
    measure_parts(__doc__, way, replicas, problems=16, repeats=2)
