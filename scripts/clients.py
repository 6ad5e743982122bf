"""Clients that nobody here wrote do their tasks against a real server: `python scripts/clients.py`.

The tasks are examples/clients/with_*.py. The clients, in the versions of requirements.txt beside them, get an
environment of their own (1.5 GB; `--venv FOLDER` keeps it, or uses one that is there). The server has `smollm2` and the
bundled models, on a free port, behind a key. At the end stands the table of docs/serving.md; status 1: a task failed.
"""

import argparse
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parablock.checkpoints.named import BUNDLED_MODELS

CLIENTS = Path(__file__).parent.parent / "examples" / "clients"
REQUIREMENTS = CLIENTS / "requirements.txt"
MODELS = ("smollm2", "--also", "bundled", "--also", "bundled-ar")
# what each task runs, and its own arguments; by the name of the client's package
TASKS: dict[str, list[str]] = {
    "lm_eval": ["with_lm_eval.py", str(BUNDLED_MODELS["bundled-ar"])],
    "llm": ["with_llm.py"],
    "instructor": ["with_instructor.py"],
    "langchain-openai": ["with_langchain.py"],
    "litellm": ["with_litellm.py"],
}


def environment(folder: Path) -> Path:
    """The Python that has the clients."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--requirement", REQUIREMENTS], check=True)
    return python


@contextmanager
def server(folder: Path, key: str) -> Iterator[str]:
    """The address of a running server."""
    log = folder / "server"
    command = [sys.executable, "-m", "parablock", "serve", *MODELS, "--port", "0"]
    with log.open("w") as written:
        process = subprocess.Popen(command, env=os.environ | {"PARABLOCK_API_KEY": key}, stderr=written)
    try:
        while not (found := re.search(r"at (http://\S+/v1)", log.read_text())):
            if process.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.2)
        yield found[1]
    finally:
        process.terminate()
        process.wait()


def refuses_without_key(url: str) -> bool:
    """The key is really asked for."""
    try:
        urllib.request.urlopen(f"{url}/models", timeout=60)
    except urllib.error.HTTPError as error:
        return error.code == 401
    return False


def run(python: Path, task: list[str], url: str, key: str) -> tuple[bool, list[str]]:
    """Whether a task succeeded, and what it has checked."""
    known = os.environ | {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": key}
    script, *arguments = task
    ended = subprocess.run(
        [python, CLIENTS / script, *arguments], env=known, capture_output=True, text=True, check=False
    )
    if ended.returncode:
        print(ended.stdout + ended.stderr, file=sys.stderr)
    return ended.returncode == 0, ended.stdout.splitlines()


def versions(python: Path) -> dict[str, str]:
    """The clients' own."""
    program = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    found: dict[str, str] = json.loads(subprocess.check_output([python, "-c", program, *TASKS]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, help="where the clients are, or are put; default: a temporary folder")
    parser.add_argument("--only", choices=TASKS, action="append", help="this client alone; can be repeated")
    options = parser.parse_args()
    key = secrets.token_hex(16)
    failed = []
    with tempfile.TemporaryDirectory() as name:
        python = environment((options.venv or Path(name) / "venv").absolute())
        rows = ["| client | | what it did |", "|---|---|---|"]
        known = versions(python)
        with server(Path(name), key) as url:
            assert refuses_without_key(url), url
            for client in options.only or TASKS:
                fine, checked = run(python, TASKS[client], url, key)
                print(f"{client}: {'ok' if fine else 'FAILED'}, {len(checked)} checks", file=sys.stderr)
                rows.append(f"| {client} | {known[client]} | {'; '.join(checked)} |")
                failed += [] if fine else [client]
    print("\n".join(rows))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
