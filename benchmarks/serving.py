"""Many streaming clients on one server, some of whom leave: is every answer right, and how fast is it?

    python benchmarks/serving.py --clients 64 --seconds 120

One `parablock serve` process holds the bundled block-diffusion model and the AR model it was made from. First the one,
then the other is asked for `--seconds` by `--clients` at once; a fifth of the requests leave in the middle of their
answer, and a third of the questions are held to a grammar (a JSON schema, a regex or a choice). Every whole answer is
compared with that of `pb.generate`, and at the end no row may be left. Writes `benchmarks/results/serving.json`; a
wrong or lost answer is exit status 1.
"""

import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import psutil
from common import options, questions, setting, write

import parablock as pb
from parablock.data.chat import encode_prompt
from parablock.decoding.config import Mode
from parablock.evals.word_problems import test_problems

MODELS: dict[str, Mode] = {"bundled": "diffusion", "bundled-ar": "autoregressive"}
LEAVE = 0.2  # of the requests
SCHEMA = {
    "type": "object", "required": ["steps", "answer"], "additionalProperties": False,
    "properties": {
        "steps": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
        "answer": {"type": "integer", "minimum": 0, "maximum": 999},
    },
}  # fmt: skip
HELD: list[tuple[str, Any, pb.Grammar]] = [
    ("guided_json", SCHEMA, pb.Grammar("json_schema", json.dumps(SCHEMA))),
    ("guided_regex", "[0-9]{1,3} [a-z]{3,12}\\.", pb.Grammar("regex", "[0-9]{1,3} [a-z]{3,12}\\.")),
    ("guided_choice", ["few", "many", "none"], pb.Grammar("choice", '["few", "many", "none"]')),
]


def held(questions: Iterable[str]) -> dict[str, tuple[str, Any, pb.Grammar]]:
    """Every third question, and what its answers are held to."""
    return {question: HELD[number % len(HELD)] for number, question in enumerate([*questions][::3])}


async def client(url: str, model: str, expected: dict[str, str], number: int, ends_at: float) -> list[dict[str, Any]]:
    """Asks until the time is over; how every request went."""
    rng, seen, grammars = random.Random(number), [], held(expected)
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        while time.perf_counter() < ends_at:
            question = rng.choice(list(expected))
            leaves_after = rng.randint(1, 6) if rng.random() < LEAVE else None
            field, value, _ = grammars.get(question, ("stop", None, None))
            try:
                seen.append(await ask(http, model, question, expected[question], leaves_after, {field: value}))
            except (httpx.HTTPError, KeyError) as error:  # KeyError: a chunk that is an error
                seen.append({"outcome": repr(error)})
    return seen


async def ask(
    http: httpx.AsyncClient, model: str, question: str, answer: str, leaves_after: int | None, more: dict[str, Any]
) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": question}], "stream": True, **more}
    body["stream_options"] = {"include_usage": True}
    started, pieces, first, tokens = time.perf_counter(), [], 0.0, 0
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                pieces += [piece for choice in chunk["choices"] if (piece := choice["delta"].get("content"))]
                first = first or (time.perf_counter() - started if pieces else 0.0)
                tokens = (chunk["usage"] or {}).get("completion_tokens", tokens)
                if len(pieces) == leaves_after:
                    return {"outcome": "left"}
    outcome = "right" if "".join(pieces) == answer else "wrong"
    outcome += ", held to a grammar" if None not in more.values() else ""
    return {"outcome": outcome, "first": first, "whole": time.perf_counter() - started, "tokens": tokens}


def expected_answers(model_name: str, mode: Mode, problems: int) -> dict[str, str]:
    model, tokenizer = pb.load(model_name, device="cpu", dtype="float32")
    asked = test_problems(1, problems)
    out = pb.generate(model, questions(tokenizer, asked), pb.DecodeConfig(mode=mode))
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in out.tokens]
    return {problem.question: text for problem, text in zip(asked, texts, strict=True)}


def held_answers(model_name: str, expected: Iterable[str]) -> dict[str, str]:
    """Those of the questions that have a grammar."""
    model, tokenizer = pb.load(model_name, device="cpu", dtype="float32")
    grammars, asked, answers = pb.Grammars(tokenizer), held(expected), {}
    for question, (_, _, grammar) in asked.items():
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": question}])
        config = pb.DecodeConfig(mode=MODELS[model_name])
        [tokens] = pb.generate(model, prompt, config, grammar=grammars.compile(grammar)).tokens
        answers[question] = tokenizer.decode(tokens, skip_special_tokens=True)
    return answers


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


async def measure(url: str, model: str, args: Any, server: psutil.Process) -> dict[str, Any]:
    async def memory(after: float = 0) -> int:
        await asyncio.sleep(after)
        return round(server.memory_info().rss / 2**20)

    expected = expected_answers(model, MODELS[model], args.problems)
    expected |= held_answers(model, expected)
    started, start = time.perf_counter(), await memory()
    clients = [client(url, model, expected, number, started + args.seconds) for number in range(args.clients)]
    fifth, *seen = await asyncio.gather(memory(args.seconds / 5), *clients)
    took = time.perf_counter() - started
    requests = pd.DataFrame([request for of_client in seen for request in of_client])
    right = requests[requests.outcome.str.startswith("right")]
    times = right[["first", "whole"]].quantile([0.5, 0.9, 0.99]).set_index(pd.Index(["p50", "p90", "p99"])).round(4)
    return {
        "model": model,
        "mode": MODELS[model],
        "clients": args.clients,
        "seconds": round(took, 1),
        "outcomes": requests.outcome.value_counts().to_dict(),
        "answers_per_second": round(len(right) / took, 2),
        "tokens_per_second": round(right.tokens.sum() / took, 1),
        "time_to_first_text": times["first"].to_dict(),
        "answer_seconds": times.whole.to_dict(),
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
            for model in MODELS:
                runs.append(asyncio.run(measure(url, model, args, psutil.Process(process.pid))))
                time.sleep(1)
                left += busy(url)
            process.terminate()
            status = process.wait(timeout=60)
        finally:
            process.kill()
    write("serving", {**setting(args), "busy_at_the_end": left, "exit_status": status, "runs": runs})
    bad = [outcome for run in runs for outcome in run["outcomes"] if not outcome.startswith(("right", "left"))]
    if bad or left or status:
        raise SystemExit(f"not every answer came: {bad}, {left:g} rows or pages held, exit status {status}")


if __name__ == "__main__":
    main()
