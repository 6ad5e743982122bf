"""Many streaming clients on one server, some of whom leave: is every answer right, and how fast is it?

    python benchmarks/serving.py --clients 64 --seconds 120

One `parablock serve` process holds the bundled block-diffusion model and the AR model it was made from. First the one,
then the other is asked for `--seconds` by `--clients` at once; a fifth of the requests leave in the middle of their
answer. Every whole answer is compared with that of `pb.generate`, and at the end no row may be left. Writes
`benchmarks/results/serving.json`; a wrong or lost answer is exit status 1.
"""

import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from common import options, questions, setting, write

import parablock as pb
from parablock.config import Mode
from parablock.evals.word_problems import test_problems

MODELS: dict[str, Mode] = {"bundled": "diffusion", "bundled-ar": "autoregressive"}
LEAVE = 0.2  # of the requests


class Load:
    """What the clients of one model saw."""

    def __init__(self, url: str, model: str, expected: dict[str, str]) -> None:
        self.url, self.model, self.expected = url, model, expected
        self.outcomes: Counter[str] = Counter()
        self.first: list[float] = []
        self.whole: list[float] = []
        self.tokens = 0

    async def client(self, number: int, ends_at: float) -> None:
        rng = random.Random(number)
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as http:
            while time.perf_counter() < ends_at:
                leaves_after = rng.randint(1, 6) if rng.random() < LEAVE else None
                try:
                    self.outcomes[await self.ask(http, rng.choice(list(self.expected)), leaves_after)] += 1
                except httpx.HTTPError as error:
                    self.outcomes[type(error).__name__] += 1

    async def ask(self, http: httpx.AsyncClient, question: str, leaves_after: int | None) -> str:
        body = {"model": self.model, "messages": [{"role": "user", "content": question}], "stream": True}
        body["stream_options"] = {"include_usage": True}
        started, text, chunks, first, tokens = time.perf_counter(), "", 0, None, 0
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                return f"status {response.status_code}"
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    return f"error {chunk['error']['code']}"
                for choice in chunk["choices"]:
                    if piece := choice["delta"].get("content"):
                        first = first or time.perf_counter() - started
                        text, chunks = text + piece, chunks + 1
                tokens = (chunk["usage"] or {}).get("completion_tokens", tokens)
                if chunks == leaves_after:
                    return "left"
        if text != self.expected[question]:
            return "wrong"
        self.whole.append(time.perf_counter() - started)
        self.first.append(first or 0.0)
        self.tokens += tokens
        return "right"


def expected_answers(model_name: str, mode: Mode, problems: int) -> dict[str, str]:
    model, tokenizer = pb.load(model_name, device="cpu", dtype="float32")
    asked = test_problems(1, problems)
    out = pb.generate(model, questions(tokenizer, asked), pb.DecodeConfig(mode=mode))
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in out.tokens]
    return {problem.question: text for problem, text in zip(asked, texts, strict=True)}


def start_server(log: Path, rows: int) -> tuple[subprocess.Popen[bytes], str]:
    command = [sys.executable, "-m", "parablock", "serve", "bundled", "--also", "bundled-ar", "--port", "0"]
    with log.open("wb") as stderr:
        process = subprocess.Popen([*command, "--max-rows", str(rows)], stderr=stderr)
    for _ in range(300):
        if found := re.search(r"at (http://\S+)/v1", log.read_text()):
            return process, found[1]
        time.sleep(0.2)
    process.kill()
    raise RuntimeError(log.read_text())


def percentiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(seconds or [np.nan], p)), 4) for p in (50, 90, 99)}


async def measure(load: Load, clients: int, seconds: float, server: psutil.Process) -> dict[str, Any]:
    async def memory(after: float = 0) -> int:
        await asyncio.sleep(after)
        return round(server.memory_info().rss / 2**20)

    started, start = time.perf_counter(), await memory()
    ends_at = started + seconds
    fifth, *_ = await asyncio.gather(memory(seconds / 5), *(load.client(n, ends_at) for n in range(clients)))
    took = time.perf_counter() - started
    return {
        "model": load.model,
        "mode": MODELS[load.model],
        "clients": clients,
        "seconds": round(took, 1),
        "outcomes": dict(load.outcomes),
        "answers_per_second": round(load.outcomes["right"] / took, 2),
        "tokens_per_second": round(load.tokens / took, 1),
        "time_to_first_text": percentiles(load.first),
        "answer_seconds": percentiles(load.whole),
        "memory_mib": {"start": start, "fifth": fifth, "end": await memory()},
    }


def busy(url: str) -> float:
    """Rows, waiting requests and pages that are not free."""
    held = r"^parablock_(?:running|queue|kv_pages_used)\{.*\} (\S+)$"
    return sum(map(float, re.findall(held, httpx.get(url + "/metrics").text, re.M)))


def main() -> None:
    args = options(__doc__, clients=64, seconds=120.0, problems=64, rows=32)
    with tempfile.TemporaryDirectory() as folder:
        process, url = start_server(Path(folder) / "stderr", args.rows)
        try:
            runs, left = [], 0.0
            for name, mode in MODELS.items():
                load = Load(url, name, expected_answers(name, mode, args.problems))
                runs.append(asyncio.run(measure(load, args.clients, args.seconds, psutil.Process(process.pid))))
                time.sleep(1)
                left += busy(url)
            process.terminate()
            status = process.wait(timeout=60)
        finally:
            process.kill()
    write("serving", {**setting(args), "busy_at_the_end": left, "exit_status": status, "runs": runs})
    bad = [outcome for run in runs for outcome in run["outcomes"] if outcome not in ("right", "left")]
    if bad or left or status:
        raise SystemExit(f"not every answer came: {bad}, {left:g} rows or pages held, exit status {status}")


if __name__ == "__main__":
    main()
