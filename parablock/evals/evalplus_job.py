"""What is asked of EvalPlus, as a script for an environment that has it (see `code.py`); it never runs in our process.

    evalplus_job.py check                          can it be imported
    evalplus_job.py download TASK                  EvalPlus's own problems, if they are not here yet; prints their file
    evalplus_job.py prompts TASK                   the chat prompts for the problems' prompts on stdin
    evalplus_job.py score TASK WORKERS MEMORY SECONDS        in the sandbox: /job/problems.jsonl, /job/answers.json

What EvalPlus imports for other purposes (its own downloads, its other benchmark, its command line) is left out.
"""

import contextlib
import gzip
import importlib
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import traceback
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

LEFT_OUT = {"datasets": "load_dataset", "tempdir": "TempDir", "wget": "download"}
RELEASES = {"humaneval": ("HumanEvalPlus", "HUMANEVAL_PLUS_VERSION"), "mbpp": ("MbppPlus", "MBPP_PLUS_VERSION")}
FENCE = "\n```\n"  # where EvalPlus ends the answer of a chat model
FILE_BYTES = 16 << 20  # the largest file that an answer may write
CONNECT_SECONDS = 60


class _EnoughError(Exception):
    """Thrown once EvalPlus has said what it would do."""


def main(command: str, *arguments: str) -> None:
    """Run one command."""
    multiprocessing.set_start_method("fork")  # EvalPlus hands its state to its processes that way
    for name, member in LEFT_OUT.items():
        sys.modules[name] = ModuleType(name)
        setattr(sys.modules[name], member, None)
    sys.modules["rich"], sys.modules["rich.progress"] = ModuleType("rich"), ModuleType("rich.progress")
    for member in ("BarColumn", "MofNCompleteColumn", "Progress", "TextColumn", "TimeElapsedColumn"):
        setattr(sys.modules["rich.progress"], member, None)
    commands: dict[str, Any] = {"check": _check, "download": _download, "prompts": _prompts, "score": _score}
    commands[command](*arguments)


def _evalplus(name: str) -> Any:
    return importlib.import_module(f"evalplus.{name}")


def _check() -> None:
    for name in ("evaluate", "sanitize", "provider.utility"):
        _evalplus(name)


def _download(task: str) -> None:
    name, version = RELEASES[task]
    data = _evalplus(f"data.{task}")
    url, place = _evalplus("data.utils").get_dataset_metadata(name, getattr(data, version), False, False)
    if not os.path.exists(place):
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with urllib.request.urlopen(url, timeout=CONNECT_SECONDS) as response:
            content = gzip.decompress(response.read())
        partly = Path(f"{place}.{os.getpid()}")
        partly.write_bytes(content)
        partly.replace(place)
    print(place)


def _prompts(task: str) -> None:
    """Read prompts, write {"stop", "prompts": [[user message, beginning of the answer]]}, all as EvalPlus has it."""
    codegen = _evalplus("codegen")
    utility = _evalplus("provider.utility")
    wording: dict[str, Any] = {}

    def make_model(**options: Any) -> None:
        wording.update(options)
        raise _EnoughError

    codegen.make_model = make_model
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.suppress(_EnoughError),
        contextlib.redirect_stdout(sys.stderr),
    ):
        codegen.run_codegen(model="any", dataset=task, root=folder, greedy=True)

    class Listener:
        """In the place of a tokenizer: keeps the messages."""

        chat_template = ""
        messages: list[dict[str, str]]

        def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
            self.messages = messages
            return ""

    prompts = []
    for prompt in json.load(sys.stdin):
        listener = Listener()
        utility.make_raw_chat_prompt(
            prompt.strip() + "\n", wording["instruction_prefix"], wording["response_prefix"], listener
        )
        question, answer = (message["content"] for message in listener.messages)
        prompts.append([question, answer.split(utility._MAGIC_SPLITTER_)[0]])
    json.dump({"stop": [*utility.EOS, FENCE], "prompts": prompts}, sys.stdout)


def _score(task: str, workers: str, memory: str, least_seconds: str) -> None:
    """Sanitize the answers, let EvalPlus run their tests, write what passed."""
    problems = Path("/job/problems.jsonl")
    os.environ |= {
        "HUMANEVAL_OVERRIDE_PATH" if task == "humaneval" else "MBPP_OVERRIDE_PATH": str(problems),
        "EVALPLUS_MAX_MEMORY_BYTES": memory,
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    }
    checks = _evalplus("eval")
    checks.reliability_guard = partial(_guard, checks.reliability_guard)
    checks.unsafe_execute = partial(_count_roots, checks.unsafe_execute)
    evaluate = _evalplus("evaluate").evaluate

    rows = {row["task_id"]: row for row in map(json.loads, problems.open())}
    answers = json.loads(Path("/job/answers.json").read_text())
    with ProcessPoolExecutor(int(workers)) as pool:
        solutions = list(pool.map(_sanitize, answers.values(), [rows[task_id]["entry_point"] for task_id in answers]))
    control = next(iter(rows.values()))  # a solution that is right: it fails only if something else is wrong
    samples = [
        *({"task_id": task_id, "solution": text} for task_id, text in zip(answers, solutions, strict=True)),
        {"task_id": control["task_id"], "solution": control["prompt"] + control["canonical_solution"]},
    ]
    Path("/out/samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))

    evaluate(task, samples="/out/samples.jsonl", parallel=int(workers), min_time_limit=float(least_seconds))
    results = json.loads(Path("/out/samples_eval_results.json").read_text())["eval"]
    passed = results[control["task_id"]].pop()
    if {passed["base_status"], passed["plus_status"]} != {"pass"}:
        raise RuntimeError(
            f"EvalPlus fails its own solution of {control['task_id']} (base tests: {passed['base_status']}, "
            f"extra tests: {passed['plus_status']}), so no score would mean anything; allow more memory={memory} or "
            f"test_seconds={least_seconds}"
        )
    scores = [
        {
            "task_id": task_id,
            "solution": result["solution"],
            "base": result["base_status"] == "pass",
            "plus": result["base_status"] == result["plus_status"] == "pass",
        }
        for task_id, (result,) in results.items()
    ]
    Path("/out/result").write_text(json.dumps(scores))


def _sanitize(answer: str, entry_point: str) -> str:
    try:
        return str(_evalplus("sanitize").sanitize(answer, entry_point))
    except Exception:  # an answer that its parser cannot stand
        return answer


def _count_roots(execute: Any, *arguments: Any) -> None:
    """EvalPlus's run of one answer. 0.3.1 does not count the passed tests of HumanEval/32, so that none can pass it.

    Its source has this put right since that release.
    """
    execute(*arguments)
    entry_point, inputs, state, details, progress = (arguments[i] for i in (1, 3, 8, 9, 10))
    if entry_point == "find_zero" and state.value == 0:  # ended without a failed test
        details[:] = [True] * len(inputs)
        progress.value = len(inputs)


def _guard(guard: Any, maximum_memory_bytes: int) -> None:
    """EvalPlus's guard around one answer, and: no process or thread of its own, and no large file."""
    for limit, value in (
        (resource.RLIMIT_AS, maximum_memory_bytes),
        (resource.RLIMIT_DATA, maximum_memory_bytes),
        (resource.RLIMIT_STACK, maximum_memory_bytes),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NPROC, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        lower = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (lower, lower))
    guard(None)


if __name__ == "__main__":
    status = 1
    try:
        main(*sys.argv[1:])
        status = 0
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # EvalPlus leaves a thread behind that sleeps for 20 seconds
