"""Real processes for the tests: quick to start, with their output in files, and ended whatever happens.

All of them are forked by one process that has already imported the libraries, which takes seconds each time. `run` and
`start` go on there as the `parablock` command; with `cold=True`, and for other programs, a new interpreter is executed.
Each has a session and an address space of its own, and the signals' default handlers, even where the caller of the
tests has them ignored (`nohup`, `make test &`).
"""

import contextlib
import ctypes
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

COMMAND = (sys.executable, "-m", "parablock")
PATIENCE = 300.0  # seconds, on a busy machine
IMPORTED = [
    "torch", "transformers.models.qwen2.modeling_qwen2", "transformers.trainer", "torch.distributed.run",
    "matplotlib.pyplot", "parablock.cli", "parablock.adapt", "parablock.batch.command", "parablock.bench.command",
    "parablock.checkpoints.export", "parablock.demo", "parablock.evals.command", "parablock.server.command",
]  # fmt: skip
WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(IMPORTED)
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}  # as the command sets them, and as early
DEATH = 1  # Linux's PR_SET_PDEATHSIG


class Running:
    """A process of a test; `out` and `err` are what it has written so far."""

    def __init__(self, process: Any, folder: Path) -> None:
        self._process = process
        self._folder = folder
        self.pid: int = process.pid

    @property
    def out(self) -> str:
        return (self._folder / "out").read_text(errors="replace")

    @property
    def err(self) -> str:
        return (self._folder / "err").read_text(errors="replace")

    @property
    def returncode(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float = PATIENCE) -> int:
        self._process.join(timeout)
        code = self.returncode
        if code is None:
            raise AssertionError(f"still running after {timeout:g} seconds:\n{self.out}\n{self.err}")
        return code

    def wait_for(self, pattern: str, times: int = 1, timeout: float = PATIENCE) -> str:
        """Until the lines written (stdout, then stderr) hold `pattern`, that often; the last of them."""
        ends_at = time.monotonic() + timeout
        while True:
            ended = self.returncode is not None
            text = f"{self.out}\n{self.err}"
            if len(found := [match[0] for match in re.finditer(pattern, text, re.M)]) >= times:
                return found[times - 1]
            if ended or time.monotonic() > ends_at:
                raise AssertionError(f"{pattern!r} was not written, exit status {self.returncode}:\n{text}")
            time.sleep(0.02)

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def end(self) -> None:
        """Kill it, what it has started, and what those have left in its session."""
        family = []
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.pid).children(recursive=True)
        self.kill()
        for other in [*family, *psutil.process_iter()]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
                if other in family or os.getsid(other.pid) == self.pid:
                    other.kill()
        self.wait()


@contextmanager
def start_function(
    function: Callable[..., object],
    *args: object,
    cwd: Path | None = None,
    stdin: str = os.devnull,
    stdout: str | None = None,
    stderr: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """Call a module's function in a process of its own; the standard streams may be given as paths."""
    with tempfile.TemporaryDirectory(prefix="parablock-test-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for stream in ("out", "err"):
            (folder / stream).touch()
        (folder / "tmp").mkdir()
        streams = (stdin, stdout or str(folder / "out"), stderr or str(folder / "err"))
        variables = {**os.environ, "TMPDIR": str(folder / "tmp"), **(environment or {})}
        process = WARM.Process(target=_enter, args=(streams, cwd, variables, function, args))
        with patch.dict(os.environ, QUIET):
            forkserver.ensure_running()
        process.start()
        running = Running(process, folder)
        try:
            yield running
        finally:
            running.end()


def start(*args: object, cold: bool = False, **options: Any) -> contextlib.AbstractContextManager[Running]:
    """Run the `parablock` command with these arguments."""
    arguments = [str(arg) for arg in args]
    if cold:
        return start_program([*COMMAND, *arguments], **options)
    return start_function(command, arguments, **options)


def start_program(command: Sequence[object], **options: Any) -> contextlib.AbstractContextManager[Running]:
    """Run any program."""
    return start_function(_execute, [str(part) for part in command], **options)


def run(*args: object, input: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the `parablock` command to its end."""
    with tempfile.NamedTemporaryFile("w", prefix="parablock-test-", suffix=".stdin") as file:
        file.write(input)
        file.flush()
        return finish(start(*args, stdin=file.name, **options), args)


def run_program(command: Sequence[object], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run any program to its end."""
    return finish(start_program(command, **options), command)


WITHOUT_PARABLOCK = """
try:
    import parablock
except ImportError:
    pass
else:
    raise SystemExit("parablock is installed here: the test tests nothing")
"""


def run_without_parablock(script: str, args: Sequence[object], scratch: Path) -> str:
    """Run a script in `scratch`, in a new interpreter that finds no parablock; what it prints."""
    blocked = scratch / "blocked"
    blocked.mkdir()
    (blocked / "parablock.py").write_text("raise ImportError('not installed')")
    environment = {**os.environ, "PYTHONPATH": str(blocked), "HF_MODULES_CACHE": str(scratch / "modules")}
    command = [sys.executable, "-c", WITHOUT_PARABLOCK + script, *map(str, args)]
    out = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, check=False, env=environment, cwd=scratch
    )
    assert out.returncode == 0, out.stderr
    return out.stdout


def finish(
    started: contextlib.AbstractContextManager[Running], args: Sequence[object]
) -> subprocess.CompletedProcess[str]:
    """Wait for the end of what was started."""
    with started as running:
        code = running.wait()
        return subprocess.CompletedProcess([str(arg) for arg in args], code, running.out, running.err)


def _enter(
    streams: tuple[str, str, str], cwd: Path | None, variables: dict[str, str], function: Any, args: Any
) -> None:
    """What the new process does first."""
    os.setsid()
    with contextlib.suppress(AttributeError, OSError):  # elsewhere it ends with its test, but not if pytest is killed
        ctypes.CDLL(None).prctl(DEATH, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number, path in enumerate(streams):
        file = os.open(path, os.O_RDWR if path.startswith("/dev/") else os.O_WRONLY | os.O_APPEND if number else 0)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(variables)
    tempfile.tempdir = None  # its own, by TMPDIR
    if cwd is not None:
        os.chdir(cwd)
    function(*args)


def command(arguments: list[str]) -> None:
    assert "torch" in sys.modules, "nothing is imported yet: each command would take seconds longer"
    from parablock.cli import main

    sys.argv = ["parablock", *arguments]
    main()


def _execute(command: list[str]) -> None:
    os.execvp(command[0], command)
