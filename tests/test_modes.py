"""What a checkpoint was made for decides how the commands decode with it, and they say so before torch is imported."""

import asyncio
import dataclasses
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from processes import Running, run, run_program, start

from parablock.app.client import Client
from parablock.app.launch import _choose
from parablock.cli import app
from parablock.data.word_problems import word_problem

QUESTION = word_problem("test", 5, 0).question
LINE = (
    "parablock: bundled-ar was never adapted to block diffusion: it decodes autoregressively "
    "(adapt it with: parablock adapt bundled-ar)\n"
)
WRONG_PATHS = """
import sys
import parablock, parablock.checkpoints.load
from parablock.cli import main

for command in (
    "generate hi --model ./no", "chat --model ./no", "serve ./no", "serve bundled --also ./no", "app ./no",
    "app bundled --ar ./no", "eval ./no --tasks word_problems", "bench ./no", "bench bundled --ar ./no",
    "adapt ./no --data alpaca --output run", "export ./no --output new",
    "generate hi --model bundled-ar --mode diffusion",
):
    sys.argv = ["parablock", *command.split()]
    try:
        main()
    except SystemExit as end:
        print(command, "|", end.code)
print([name for name in ("torch", "transformers") if name in sys.modules])
"""


def test_wrong_paths_are_told_before_torch_is_imported(tmp_path: Path) -> None:
    out = run_program([sys.executable, "-c", WRONG_PATHS], cwd=tmp_path)
    *commands, heavy = out.stdout.splitlines()
    assert heavy == "[]"
    assert [line.split(" | ")[1] for line in commands] == ["2"] * 12
    *paths, diffusion = out.stderr.splitlines()
    assert paths == ["parablock: there is no checkpoint directory at './no'; check the path"] * 11
    assert "bundled-ar was never adapted" in diffusion
    assert not list(tmp_path.iterdir())


def generated(*args: str) -> tuple[dict[str, Any], str]:
    out = run("generate", "--json", *args, QUESTION)
    answer: dict[str, Any] = json.loads(out.stdout)
    return answer, out.stderr


def test_generate_says_that_an_ar_checkpoint_decodes_autoregressively() -> None:
    answer, told = generated("--model", "bundled-ar")
    assert (answer["forwards"], told) == (answer["new_tokens"], LINE)
    assert generated("--model", "bundled-ar", "--mode", "autoregressive")[1] == ""
    answer, told = generated("--model", "bundled")
    assert (answer["forwards"] < answer["new_tokens"], told) == (True, "")


def test_bench_and_eval_measure_an_ar_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = "--requests 2 --rounds 1 --repeats 1 --concurrency 1 --new-tokens 8"
    app(["bench", "bundled-ar", *few.split(), "--folder", str(tmp_path / "bench")], standalone_mode=False)
    assert LINE in capsys.readouterr().err
    rows = json.loads((tmp_path / "bench" / "report.json").read_text())["rows"]
    assert [row["mode"] for row in rows] == ["autoregressive", "speculative"]
    assert rows[1]["equal"] == 1
    with pytest.raises(ValueError, match="ar='bundled': bundled-ar was never adapted"):
        app(["bench", "bundled-ar", "--ar", "bundled"], standalone_mode=False)
    capsys.readouterr()
    for model, told in (("bundled-ar", LINE), ("bundled", "")):
        output = tmp_path / model
        app(["eval", model, "--tasks", "word_problems", "--limit", "2", "--output", str(output)], standalone_mode=False)
        assert capsys.readouterr().err.count(LINE) == (1 if told else 0)
        mode = json.loads((output / "results.json").read_text())["decoding"]["mode"]
        assert mode == ("autoregressive" if told else "diffusion")


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Running]]:
    """A server of an AR model alone: its address and its process."""
    with start("serve", "bundled-ar", "--port", 0) as process:
        yield process.wait_for(r"http://[\d.]+:\d+"), process
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0


def test_serve_says_it_and_the_card_shows_it(served: tuple[str, Running]) -> None:
    url, process = served
    assert process.err.startswith(f"{LINE}parablock serves ")
    card = Client(url).models()[0]["parablock"]
    assert card["modes"] == ["autoregressive", "speculative"]
    body = {"messages": [{"role": "user", "content": QUESTION}]}
    answer = httpx.post(url + "/v1/chat/completions", json=body, timeout=60).json()
    assert answer["parablock"]["tokens_per_forward"] < 1.1
    refused = httpx.post(url + "/v1/chat/completions", json={**body, "mode": "diffusion"}, timeout=60)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "mode")
    assert "never adapted" in refused.json()["error"]["message"]


def test_the_page_shows_an_ar_model_with_drafts_that_are_looked_up(served: tuple[str, Running]) -> None:
    page = pytest.importorskip("parablock.app.page", reason="the page needs gradio: pip install 'parablock[app]'")
    controls = pytest.importorskip("parablock.app.controls")
    client = Client(served[0])
    assert _choose(client, None, None) == ("bundled-ar", "bundled-ar")
    site = controls.Site(
        client, "bundled-ar", "bundled-ar", 32, 512, mode="speculative", drafters=("lookup",), history=False, slower=1,
        examples=(),
    )  # fmt: skip
    given: dict[str, Any] = {
        "drafter": "lookup",
        "draft_threshold": 0.0,
        "temperature": 0.0,
        "top_p": 1.0,
        "system": "",
    }
    names = [field.name for field in dataclasses.fields(controls.Settings)]
    settings = controls.Settings(**dict.fromkeys(names) | given | {"max_tokens": 200, "draft_tokens": 4})

    async def last_view() -> dict[str, Any]:
        async for view in page.answer(site, page.Session(), QUESTION, settings, race=False, again=False):
            last = view
        return last

    shown = asyncio.run(last_view())
    assert (shown["state"], [lane["title"] for lane in shown["lanes"]]) == ("done", ["Speculative"])
    assert shown["lanes"][0]["serial"]
    refused = [text for event in shown["lanes"][0]["events"] for text in event["refused"]]
    drafted, accepted = shown["lanes"][0]["events"][-1]["counts"]
    assert 0 < len(refused) == drafted - accepted
