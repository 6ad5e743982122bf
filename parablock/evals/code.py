"""HumanEval(+) and MBPP(+): answers scored by EvalPlus in an environment of its own, and in a sandbox."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from parablock.cached import cache_folder
from parablock.evals import evalplus_job, sandbox

CODE_TASKS = ("humaneval", "mbpp")
PREFIXES = {"humaneval": "HumanEval/", "mbpp": "Mbpp/"}

# all that EvalPlus imports for these two tasks; it has more requirements, for what is not used here
REQUIREMENTS = (
    "evalplus==0.3.1",
    "appdirs==1.4.4",
    "numpy==2.4.6",
    "psutil==7.2.2",
    "termcolor==3.3.0",
    "tqdm==4.70.1",
    "tree-sitter==0.26.1",
    "tree-sitter-python==0.25.0",
)

FIELDS = {"task_id", "prompt", "contract", "canonical_solution", "entry_point", "base_input", "plus_input", "atol"}
JOB = Path(evalplus_job.__file__)
GIBIBYTE = 1 << 30
MEMORY = 4 * GIBIBYTE  # of one answer: EvalPlus's own limit


@dataclass(frozen=True)
class CodeProblem:
    """One problem, and how EvalPlus asks a chat model for it.

    The model is asked `question` and goes on after `beginning` of its answer, which opens a code block; its answer
    ends before the first of the strings `stop`.
    """

    task_id: str
    prompt: str
    entry_point: str
    question: str
    beginning: str
    stop: tuple[str, ...]


@dataclass(frozen=True)
class CodeScore:
    """Whether `solution`, the code found in an answer, passes the `base` tests, and these and EvalPlus's (`plus`)."""

    task_id: str
    solution: str
    base: bool
    plus: bool


def prepare(folder: Path | None = None, progress: Callable[[str], None] | None = None) -> Path:
    """The Python of an environment with EvalPlus, made on first use; `progress` is told what is being done.

    Args:
        folder: Where the environment is kept. Default: `parablock` in the user's cache folder.
        progress: Gets one line at a time.

    Raises:
        ValueError: the environment cannot be made.
    """
    tell = progress or (lambda line: None)
    folder = folder or cache_folder()
    key = "\n".join((*REQUIREMENTS, sys.version, sys.base_prefix))
    place = folder.resolve() / f"evalplus-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    python, done = place / "bin" / "python", place / "complete"
    if done.exists() and python.exists():
        return python
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if done.exists() and python.exists():  # another process has made it meanwhile
            return python
        shutil.rmtree(place, ignore_errors=True)
        tell(f"making an environment for EvalPlus in {place} (once)")
        _make(
            [sys.executable, "-I", "-m", "venv", str(place)], "Python's venv module (Debian: apt install python3-venv)"
        )
        tell(f"installing {len(REQUIREMENTS)} packages there")
        options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--quiet"]
        _make([str(python), "-I", "-m", "pip", "install", *options, *REQUIREMENTS], "access to a package index")
        _make([str(python), "-I", str(JOB), "check"], "packages that fit this machine")
        done.touch()
        tell("the environment is ready")
    return python


def load_problems(task: str, python: Path, file: Path | str | None = None) -> list[CodeProblem]:
    """The problems of `task`: EvalPlus's own (downloaded on first use), or those of `file` in the same format.

    Raises:
        ValueError: an unknown task, a file that is missing or in another format, a download that fails.
    """
    rows = _rows(task, _problem_file(task, python, file))
    asked = json.dumps([row["prompt"] for row in rows.values()])
    chat = json.loads(_ask(python, "prompts", task, stdin=asked))
    return [
        CodeProblem(task_id, row["prompt"], row["entry_point"], question, beginning, tuple(chat["stop"]))
        for (task_id, row), (question, beginning) in zip(rows.items(), chat["prompts"], strict=True)
    ]


def chat_prompt(problem: CodeProblem) -> tuple[list[dict[str, str]], str]:
    """What EvalPlus gives a chat model: the messages, and the beginning of the assistant's answer, to be continued."""
    return [{"role": "user", "content": problem.question}], problem.beginning


def cut_answer(problem: CodeProblem, text: str) -> str:
    """A continuation of `problem.beginning` up to the first stop string, tabs widened, as EvalPlus takes it."""
    return text[: min((i for stop in problem.stop if (i := text.find(stop)) >= 0), default=None)].replace("\t", "    ")


def score(
    task: str,
    answers: Mapping[str, str],
    python: Path,
    *,
    file: Path | str | None = None,
    memory: int = MEMORY,
    seconds: float = 3600,
    test_seconds: float = 1.0,
    workers: int | None = None,
) -> list[CodeScore]:
    """Run the code in `answers` against EvalPlus's tests, in the sandbox; the scores in the answers' order.

    Prose and markdown around the code are removed by EvalPlus's sanitizer first. Problems without an answer are left
    out: a score says nothing about them.

    Args:
        task: One of `CODE_TASKS`.
        answers: A whole answer for every task id.
        python: From `prepare`.
        file: As for `load_problems`.
        memory: Bytes for every answer (of address space, EvalPlus's share and data included).
        seconds: For everything; then it is ended.
        test_seconds: The least that one test may take; EvalPlus allows a test four times what the canonical solution
            took, and at least this.
        workers: Answers tested at once. Default: half of the processors, as EvalPlus does, and fewer if their memory
            would not fit into what is free.

    Raises:
        ValueError: as `load_problems`; answers to no problem of the task; a machine that refuses the sandbox; a time
            that is over; EvalPlus failed.
    """
    for name, value in {"memory": memory, "seconds": seconds, "test_seconds": test_seconds}.items():
        if not value > 0:
            raise ValueError(f"{name}={value!r} must be positive")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers!r} must be at least 1")
    rows = _rows(task, _problem_file(task, python, file))
    unknown = [task_id for task_id in answers if task_id not in rows]
    if unknown or not answers:
        named = f"no problem of {task}: {', '.join(unknown[:3])}" if unknown else "no answers"
        raise ValueError(f"{named}; answer problems of load_problems, such as {next(iter(rows))}")
    if workers is None:
        processors = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
        workers = max(1, min(processors // 2, psutil.virtual_memory().available // memory))
    files = {
        "problems.jsonl": "".join(json.dumps(rows[task_id]) + "\n" for task_id in answers).encode(),
        "answers.json": json.dumps(dict(answers)).encode(),
    }
    result = sandbox.run(
        python,
        JOB,
        ["score", task, str(workers), str(memory), str(test_seconds)],
        files,
        memory=2 * memory,  # of EvalPlus itself, with all the problems' data
        seconds=seconds,
        processes=4 * workers + 16,  # EvalPlus: two for every worker, and a few threads
    )
    scores = {row["task_id"]: CodeScore(**row) for row in json.loads(result)}
    return [scores[task_id] for task_id in answers]


def _problem_file(task: str, python: Path, file: Path | str | None) -> Path:
    if task not in CODE_TASKS:
        raise ValueError(f"task={task!r} is none of {', '.join(CODE_TASKS)}")
    if file is None:
        return Path(_ask(python, "download", task).strip())
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file}; give EvalPlus's problems as .jsonl or .jsonl.gz")
    return Path(file)


def _rows(task: str, file: Path) -> dict[str, dict[str, Any]]:
    """The problems of a file in EvalPlus's format, by task id."""
    rows: dict[str, dict[str, Any]] = {}
    try:
        content = file.read_bytes()
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict) or not row.keys() >= FIELDS:
                    missing = sorted(FIELDS - row.keys()) if isinstance(row, dict) else sorted(FIELDS)
                    raise ValueError(f"line {number} has no {', '.join(missing)}")
                if not str(row["task_id"]).startswith(PREFIXES[task]):
                    raise ValueError(f"line {number} is {row['task_id']!r}, no {PREFIXES[task]}...")
                rows[row["task_id"]] = row
        if not rows:
            raise ValueError("it is empty")
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{file} does not hold EvalPlus's problems for {task} ({error}); give a file of its releases "
            "(HumanEvalPlus.jsonl.gz, MbppPlus.jsonl.gz), or delete a broken download"
        ) from None
    return rows


def _ask(python: Path, *command: str, stdin: str = "") -> str:
    """What EvalPlus's environment answers; nothing that a model wrote runs here."""
    done = subprocess.run(
        [python, "-I", str(JOB), *command], input=stdin, capture_output=True, text=True, encoding="utf-8", check=False
    )
    if done.returncode != 0:
        said = "\n".join(done.stderr.strip().splitlines()[-1:])
        remedy = "; download it elsewhere and give it as a local file" if command[0] == "download" else ""
        raise ValueError(f"EvalPlus failed to {' '.join(command)}{remedy} ({said})")
    return done.stdout


def _make(command: list[str], needed: str) -> None:
    """One step of making the environment."""
    done = subprocess.run(command, capture_output=True, text=True, umask=0o022, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise ValueError(f"EvalPlus's environment could not be made; it needs {needed}. The command said:\n{said}")
