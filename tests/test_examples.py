"""The examples run as they stand, and the documents name only files that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


EXAMPLES = {
    "quickstart.py": "####",
    "adapt.py 4": "tokens per forward",
    "checkpoints.py": "#### 29",
    "engine.py": "'running': 0",
    "evaluation.py": "tokens per forward 5",
}


@pytest.mark.parametrize(("command", "shows"), EXAMPLES.items())
def test_examples_run(command: str, shows: str) -> None:
    script, *args = command.split()
    out = subprocess.run(
        [sys.executable, ROOT / "examples" / script, *args], capture_output=True, text=True, timeout=300, check=False
    )
    assert out.returncode == 0, out.stderr
    assert shows in out.stdout


def test_the_documents_show_lines_of_the_examples() -> None:
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = [b for d in documents for b in re.findall(r"```python\n(.*?)```", d.read_text(), re.S)]
    scripts = "".join(path.read_text() for path in (ROOT / "examples").glob("*.py"))
    assert len(shown) > 3
    assert all(line in scripts for block in shown for line in block.splitlines())


def test_architecture_lists_every_file() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    files = {p.name for p in (ROOT / "parablock").rglob("*.py")} - {"__main__.py"}
    assert all(re.search(rf"^ +{re.escape(name)} ", text, re.M) for name in files), files
    named = re.findall(r"^ +([a-z_]+\.py) ", text, re.M)
    assert set(named) <= files


def test_rooms_import_only_from_rooms_above() -> None:
    rooms = [
        "settings", "data", "diffusion", "training", "decoding", "checkpoints", "engine", "server", "app", "evals",
        "bench", "adapt", "demo",
    ]  # fmt: skip
    for path in (ROOT / "parablock").rglob("*.py"):
        room = path.relative_to(ROOT / "parablock").parts[0].removesuffix(".py")
        if room not in rooms:
            continue
        imported = set(re.findall(r"^\s*(?:from|import) parablock\.(\w+)", path.read_text(), re.M)) - {room}
        assert imported <= set(rooms[: rooms.index(room)]), path


def test_links_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "parablock" / "bundled" / "README.md"]:
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), (document.name, link)
