"""The examples and the code in the documents run as they stand, and the documents name only what exists."""

import contextlib
import graphlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from processes import run_program
from server_process import serve

import parablock as pb
from parablock.cli import app

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ADDRESS = "http://127.0.0.1:8000"  # where the documents' server listens

EXAMPLES = {
    "quickstart.py": "####",
    "adapt.py 4": "tokens per forward",
    "checkpoints.py": "#### 29",
    "engine.py": "'running': 0",
    "evaluation.py": "tokens per forward 5",
}
# what the code of a page must have printed
PAGES = {
    "README.md 1": "tokens per forward",
    "README.md 2": "####",
    "checkpoints.md": "####",
    "decoding.md": "_|_|_",
    "engine.md": "'running': 0",
    "evaluation.md": "accuracy",
    "getting_started.md": "forwards",
    "serving.md": "tokens per forward",
    "structured_output.md": "{",
    "training.md": "loss",
}
# commands that answer in seconds, and what they must have printed; `chat` reads from its stdin
QUICK = {
    "generate --model bundled": "####",
    "chat": "tokens per forward",
    "adapt --dry-run": "GPU-hours",
    "export": "its README.md says how to use it",
}


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of a document in this language; "": those that name none, and bash."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", document.read_text(), re.M | re.S)
    return [text for named, text in found if (named.removesuffix("bash") if language == "" else named) == language]


def commands() -> dict[str, list[str]]:
    """Every line with `parablock` in the documents' blocks, and its arguments."""
    lines = [line for d in DOCUMENTS for b in blocks(d, "") for line in b.splitlines()]
    found = [(line, re.search(r"(?:^|= ?\S+ |\| |-m )parablock (.*)", line)) for line in lines]
    return {line: shlex.split(match[1], comments=True) for line, match in found if match}


def quick_commands() -> dict[str, str]:
    """The lines of the README that are run, and what each must print."""
    shown = {}
    for line in README.read_text().splitlines():
        for words, prints in QUICK.items():
            command, *options = words.split()
            if line.startswith(f"parablock {command}") and set(options) <= set(line.split()):
                shown[line] = prints
    return shown


def pieces() -> dict[str, dict[str, Any]]:
    """All that runs in one process: examples, pages, commands."""
    found: dict[str, dict[str, Any]] = {}
    for line in EXAMPLES:
        script, *arguments = line.split()
        path = ROOT / "examples" / script
        found[line] = {"argv": [str(path), *arguments], "stdin": "", "sources": [path.read_text()]}
    for number, block in enumerate(blocks(README, "python"), start=1):  # each block stands alone
        found[f"README.md {number}"] = {"argv": ["README.md"], "stdin": "", "sources": [block]}
    for page in DOCUMENTS:  # from top to bottom
        if page != README and (sources := blocks(page, "python")):
            found[page.name] = {"argv": [page.name], "stdin": "", "sources": sources}
    for line in quick_commands():
        question = "Mara has 4 boxes with 6 pencils in each. How many pencils does Mara have?\n"
        run = "from parablock.cli import main\nmain()"
        found[line] = {"argv": shlex.split(line, comments=True), "stdin": question, "sources": [run]}
    return found


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The README's server, at a port that is free."""
    line = next(line for line in commands() if line.startswith("parablock serve"))
    with serve(tmp_path_factory.mktemp("server") / "log", *shlex.split(line)[2:]) as served:
        yield served.url


@pytest.fixture(scope="module")
def results(url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "jobs").write_text(json.dumps(pieces()).replace(ADDRESS, url))
    runner = Path(__file__).with_name("run_pieces.py")
    ended = run_program([sys.executable, runner, "jobs", "results"], cwd=folder)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, dict[str, str]] = json.loads((folder / "results").read_text())
    return found


@pytest.mark.parametrize(("name", "prints"), (EXAMPLES | PAGES | quick_commands()).items())
def test_the_documents_code_runs(name: str, prints: str, results: dict[str, dict[str, str]]) -> None:
    assert not results[name]["error"], results[name]
    assert prints in results[name]["printed"], results[name]


def test_all_code_of_the_documents_is_run() -> None:
    assert pieces().keys() == (EXAMPLES | PAGES | quick_commands()).keys()
    assert {words.split()[0] for words in QUICK} == {line.split()[1] for line in quick_commands()}
    assert len(README.read_text().splitlines()) <= 120


def test_lines_of_the_shell_run(url: str) -> None:
    """A pipe into the installed command, and the request with curl."""
    pipe = next(line for line in README.read_text().splitlines() if "| parablock" in line)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    out = subprocess.run(
        ["bash", "-ec", pipe], capture_output=True, text=True, env=environment, check=True, timeout=200
    )
    assert json.loads(out.stdout)["tokens_per_forward"] > 1
    if shutil.which("curl"):
        (request,) = [block for block in blocks(ROOT / "docs" / "serving.md", "") if block.startswith("curl")]
        command = ["bash", "-ec", request.replace(ADDRESS, url)]
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
        assert "data: [DONE]" in out.stdout


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_documents_exist(line: str) -> None:
    """Command, options and the kinds of their values, as the command itself reads them."""
    group: Any = typer.main.get_command(app)
    name, command, rest = group.resolve_command(typer.Context(group), commands()[line])
    with contextlib.suppress(typer.Exit):  # --help
        command.make_context(name, rest)


def test_the_reference_has_every_public_name() -> None:
    named = re.findall(r"^::: parablock\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert sorted(named) == sorted(pb.__all__)


def test_architecture_lists_every_file() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    files = {p.name for p in (ROOT / "parablock").rglob("*.py")} - {"__main__.py"}
    assert all(re.search(rf"^ +{re.escape(name)} ", text, re.M) for name in files), files
    named = re.findall(r"^ +([a-z_]+\.py) ", text, re.M)
    assert set(named) <= files


def test_rooms_import_only_from_rooms_above() -> None:
    rooms = [
        "settings", "cached", "packed", "data", "diffusion", "training", "decoding", "checkpoints", "engine", "server",
        "cluster",
        "app", "evals", "bench", "batch", "adapt", "demo",
    ]  # fmt: skip
    for path in (ROOT / "parablock").rglob("*.py"):
        room = path.relative_to(ROOT / "parablock").parts[0].removesuffix(".py")
        if room not in rooms:
            continue
        imported = set(re.findall(r"^\s*(?:from|import) parablock\.(\w+)", path.read_text(), re.M)) - {room}
        assert imported <= set(rooms[: rooms.index(room)]), path


def test_no_file_imports_itself_by_way_of_others() -> None:
    imports = {}
    for path in (ROOT / "parablock").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        imports[name] = set(re.findall(r"^\s*(?:from|import) (parablock[\w.]*)", path.read_text(), re.M)) - {
            "parablock"
        }
    imports.pop("parablock")  # its public names are imported when they are first used
    assert len(list(graphlib.TopologicalSorter(imports).static_order())) >= len(imports)  # CycleError names a circle


def test_links_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "parablock" / "bundled" / "README.md"]:
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), (document.name, link)
