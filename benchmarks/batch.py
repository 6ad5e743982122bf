"""A batch that is killed again and again, and what it costs beside the bare engine.

    python benchmarks/batch.py kills     # on Ray: the driver and then a worker are killed, three times
    python benchmarks/batch.py speed     # one process, against Engine.generate on the same prompts

- kills: is the output complete, each id once in it, every answer that of `Engine.generate`?
- speed: seconds of the batch's answers (loading left out) over those of `Engine.generate`, in turns; prompts, and
  requests in OpenAI's format.

Writes `benchmarks/results/batch-kills.json` and `batch-speed.json`; a wrong or lost answer is exit status 1.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import psutil
import torch

import parablock as pb
from parablock.batch.output import AnswerFile
from parablock.batch.running import Local, answers
from parablock.batch.workers import Kind, Setup, read_tasks
from parablock.data.lines import read_lines
from parablock.evals.word_problems import test_problems

CONFIG = pb.DecodeConfig(mode="diffusion")
ENGINE = pb.EngineConfig(max_rows=32)
PATIENCE = 600.0


def expected(problems: int) -> tuple[list[str], list[str]]:
    """Questions, and the answers of the bare engine."""
    model, tokenizer = pb.load("bundled", device="cpu")
    asked = test_problems(1, problems)
    with pb.Engine(model, ENGINE) as engine:
        tokens = engine.generate(common.questions(tokenizer, asked), CONFIG).tokens
    return [problem.question for problem in asked], [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]


def write_input(path: Path, questions: list[str], kind: Kind) -> None:
    rows: list[dict[str, Any]] = [{"prompt": question} for question in questions]
    if kind == "requests":
        url, mode = "/v1/chat/completions", CONFIG.mode
        rows = [
            {"method": "POST", "url": url, "body": {"messages": [{"role": "user", "content": q}], "mode": mode}}
            for q in questions
        ]
    path.write_text("".join(json.dumps({"custom_id": f"q{i}", **row}) + "\n" for i, row in enumerate(rows)))


def kills(problems: int, repeats: int) -> dict[str, Any]:
    """`repeats` rounds of killing the driver, then a worker of the next driver."""
    questions, texts = expected(problems)
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        write_input(source, questions, "prompts")
        part = output.with_name("out.jsonl.part")
        command = [sys.executable, "-m", "parablock", "batch", str(source), "-o", str(output), "--replicas", "2"]
        command += ["--model", "bundled", "--mode", "diffusion"]
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
        killed: list[dict[str, Any]] = []
        step = problems // (2 * repeats + 1)
        for round_ in range(repeats):
            for victim in ("driver", "worker"):
                at = step * (2 * round_ + (1 if victim == "driver" else 2)) - rng.randrange(step // 2)
                if victim == "driver":
                    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL)
                    _until(part, at, driver)
                    driver.send_signal(signal.SIGKILL)
                    driver.wait()
                    _gone()
                    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL)
                else:
                    _until(part, at, driver)
                    rng.choice(_workers(driver.pid)).kill()
                    if round_ < repeats - 1:  # the next round's driver is this one, ended in good order
                        _until(part, at + step // 4, driver)
                        driver.send_signal(signal.SIGINT)
                        driver.wait()
                killed.append({"victim": victim, "lines": _count(part)})
                print(killed[-1], flush=True)
        status = driver.wait()
        records = [json.loads(line) for line in output.read_text().splitlines()]
    ids = Counter(record["id"] for record in records)
    right = [r for r in records if "error" not in r]
    wrong = sum(r["messages"][-1]["content"] != texts[r["line"] - 1] for r in right)
    report = {
        "killed": killed, "exit_status": status, "lines": len(records), "ids_twice": sum(n > 1 for n in ids.values()),
        "missing": problems - len(ids), "failed": sum("error" in record for record in records), "wrong": wrong,
    }  # fmt: skip
    print({name: value for name, value in report.items() if name != "killed"})
    return report


def _count(part: Path) -> int:
    return part.read_bytes().count(b"\n") if part.exists() else 0


def _until(part: Path, lines: int, driver: "subprocess.Popen[bytes]") -> None:
    ends_at = time.monotonic() + PATIENCE
    while _count(part) < lines:
        if driver.poll() is not None or time.monotonic() > ends_at:
            raise SystemExit(f"the driver ended or stalled at {_count(part)} of {lines} lines ({driver.poll()})")
        time.sleep(0.02)


def _workers(driver: int) -> list[psutil.Process]:
    """The processes of the driver's actors."""
    family = psutil.Process(driver).children(recursive=True)
    return [process for process in family if "ray::Remote" in " ".join(process.cmdline())]


def _gone() -> None:
    """Until no worker of a killed driver is left."""
    me = os.getuid()
    while any(
        "ray::Remote" in " ".join(process.info["cmdline"] or [])
        for process in psutil.process_iter(["cmdline", "uids"])
        if process.info["uids"] and process.info["uids"].real == me
    ):
        time.sleep(0.1)


def speed(problems: int, repeats: int) -> dict[str, Any]:
    """Seconds of one process, without loading."""
    torch.set_num_threads(1)
    model, tokenizer = pb.load("bundled", device="cpu")
    asked = test_problems(1, problems)
    prompts, texts = common.questions(tokenizer, asked), [problem.question for problem in asked]

    def bare() -> float:
        with pb.Engine(model, ENGINE) as engine:
            engine.start()
            return engine.generate(prompts, CONFIG).seconds

    contenders = {"Engine.generate": bare}
    with tempfile.TemporaryDirectory() as folder:
        kinds: tuple[Kind, ...] = ("prompts", "requests")
        for kind in kinds:
            write_input(Path(folder) / kind, texts, kind)
            contenders[f"batch, {kind}"] = lambda kind=kind: _batch(Path(folder), kind)
        took = common.in_turns(contenders, repeats)
    bare_seconds = took["Engine.generate"]
    report = {
        "seconds": took,
        "speed_of_engine": {n: common.ratios(bare_seconds, t) for n, t in took.items() if n != "Engine.generate"},
    }
    print(report["speed_of_engine"])
    return report


def _batch(folder: Path, kind: Kind) -> float:
    source, output = folder / kind, folder / f"{kind}.out"
    decoding = replace(CONFIG, seed=0)
    worker = Setup(kind, "bundled", None, decoding, ENGINE).worker()
    with AnswerFile(output, {"decoding": {"seed": 0}}) as file, Local(worker, ENGINE.max_rows) as local:
        started = time.perf_counter()
        for ended in answers(local, read_tasks(kind, read_lines([source]))):
            if ended is not None:
                file.write(ended.record)
        file.finish()
        seconds = time.perf_counter() - started
        assert not file.tally.failed, output.read_text()[:500]
    output.unlink()
    return seconds


if __name__ == "__main__":
    common.measure_parts(__doc__, kills, speed, problems=2000, repeats=3)
