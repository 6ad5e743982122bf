"""Replicas on Ray against one process: throughput, time to first token, prefixes reused, and a soak with kills.

    python benchmarks/cluster.py --clients 16 --seconds 30 --soak-seconds 60

One thread for each engine: one plain process, then one and two replicas. With the bundled block-diffusion model, whose
answers take 15 ms, one sees what the way to a replica costs; with SmolLM2, what a second replica brings. Chats of six
turns under Ray's default router and ours, and on one process: what share of their prompts is reused. The soak has 32
clients on two replicas, one of which is killed twice. Every answer is compared with that of `pb.generate`. Writes
`benchmarks/results/cluster.json`; a wrong or lost answer is exit status 1.
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
from common import options, questions, setting, write
from serving import expected_answers

import parablock as pb
from parablock.evals.word_problems import test_problems

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TURNS, CHATS = 6, 16
REAL_TOKENS = 24  # of a real model's answers


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

    def replicas() -> list[psutil.Process]:
        found = psutil.Process(process.pid).children(recursive=True)
        return [p for p in found if _is_replica(p)]

    async def kill() -> int:
        for _ in range(2):
            await asyncio.sleep(seconds / 3)
            replicas()[0].kill()
        return len(replicas())

    async def both() -> dict[str, Any]:
        told, _ = await asyncio.gather(load(url, expected, 32, seconds, model="bundled"), kill())
        return told

    before = [round(p.memory_info().rss / 2**20) for p in replicas()]
    told = asyncio.run(both())
    time.sleep(30)  # the last one comes back
    return {**told, "memory_mib": {"start": before, "end": [round(p.memory_info().rss / 2**20) for p in replicas()]}}


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


def main() -> None:
    args = options(__doc__, clients=16, seconds=30.0, soak_seconds=60.0, problems=32)
    expected, real = expected_answers("bundled", "diffusion", args.problems), real_answers(args.problems // 4)
    cases = {
        "one process": (), "one replica": ("--replicas", "1"), "two replicas": ("--replicas", "2"),
        "two replicas, Ray's router": ("--replicas", "2", "--routing", "balance"),
    }  # fmt: skip
    report: dict[str, Any] = {}
    for name, arguments in cases.items():
        with server("bundled", *arguments) as (process, url):
            report[name] = asyncio.run(load(url, expected, args.clients, args.seconds, model="bundled"))
            report[name]["reused"] = chats(url, list(expected))
            if name == "two replicas":
                report["soak"] = soak(process, url, expected, args.soak_seconds)
        print(name, report[name], flush=True)
        if name != "two replicas, Ray's router":
            with server("smollm2", *arguments) as (process, url):
                asked = {"model": "smollm2", "max_tokens": REAL_TOKENS}
                report[f"SmolLM2, {name}"] = found = asyncio.run(load(url, real, args.clients, args.seconds, **asked))
                print(f"SmolLM2, {name}", found, flush=True)
    write("cluster", {**setting(args), **report})
    if bad := {o for run in report.values() for o in run["outcomes"]} - {"right", "replica_lost"}:
        raise SystemExit(f"not every answer came: {bad}")


if __name__ == "__main__":
    main()
