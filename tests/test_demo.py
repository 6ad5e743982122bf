"""The demo's whole story, a few seconds long: the bundled AR model and its adapter in the place of the real ones."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from parablock.checkpoints.load import load
from parablock.demo.command import run_demo
from parablock.demo.live import ANSWERS
from parablock.demo.real import _parting
from parablock.demo.sizes import SMOLLM2, DemoConfig, sized

PICTURES = ("answer.png", "decoders.png", "live.png", "thresholds.png", "denoising.png")


def run(config: DemoConfig) -> str:
    screen = io.StringIO()
    run_demo(config, Console(file=screen, highlight=False, width=120))
    return screen.getvalue()


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    config = DemoConfig(
        seed=3, questions=2, max_new_tokens=24, live_minutes=0.02, problems=2, model="bundled-causal",
        ar="bundled-ar", folder=folder, report=folder / "my" / "report.json",
    )  # fmt: skip
    return folder, run(config)


def test_it_writes_what_it_names(story: tuple[Path, str]) -> None:
    folder, screen = story
    for picture in PICTURES:
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
        assert picture in screen
    assert "my/report.json" in screen
    assert not list(folder.rglob("*.part*"))


def test_every_decoder_gives_the_same_answers(story: tuple[Path, str]) -> None:
    folder, screen = story
    real = json.loads((folder / "my" / "report.json").read_text())["real"]
    names = [r["name"] for r in real["results"]]
    assert names[:2] == ["autoregressive", "drafts looked up, no adapter"]
    assert names[2].startswith("adapter of")
    assert names[3] == "bundled adapter"
    assert [r["same_answers"] for r in real["results"]] == [1] * 4  # float32
    assert real["results"][0]["tokens_per_forward"] == pytest.approx(1, abs=0.1)
    assert all(len({d["text"] for d in q["decoders"]}) == 1 for q in real["questions"])
    assert "2 of 2 answers are those of the model alone" in screen


def test_the_adapter_is_trained_live(story: tuple[Path, str]) -> None:
    folder, screen = story
    live = json.loads((folder / "my" / "report.json").read_text())["real"]["live"]
    assert live["steps"] >= 2  # of the first steps and of the others, however slow the machine
    assert live["log"]
    assert all(check["tokens_per_forward"] >= 1 for check in live["log"])
    assert "trained here and now" in screen


def test_the_puzzles_are_compared_by_threshold(story: tuple[Path, str]) -> None:
    folder, _ = story
    puzzles = json.loads((folder / "my" / "report.json").read_text())["puzzles"]
    assert puzzles[0]["name"] == "autoregressive"
    assert len({r["name"] for r in puzzles}) == len(puzzles) == 9
    assert all(r["prompts"] == 2 and 0 <= r["accuracy"] <= 1 and r["tokens_per_second"] > 0 for r in puzzles)


def test_without_the_real_model_the_puzzles_are_shown(tmp_path: Path) -> None:
    screen = run(DemoConfig(problems=1, model="./nothing", folder=tmp_path))
    assert "The real model is left out: there is no checkpoint directory at './nothing'" in screen
    assert json.loads((tmp_path / "report.json").read_text())["real"] is None
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["denoising.png", "thresholds.png"]


def test_where_answers_part_is_told_with_the_scores() -> None:
    model, tokenizer = load("bundled-ar")
    said, other = ([tokenizer(text)["input_ids"][0] for text in texts] for texts in (("1", "2"), ("1", "3")))
    told = _parting(model, tokenizer, [5, 6], said, other)
    assert told.startswith("token 2 is '3' for '2': their scores are ")
    assert "float32 rounds there to" in told


def test_options_make_it_shorter() -> None:
    whole, quick = sized(1, None, False, True, Path("here"), None), sized(2, 7, True, False, Path("here"), None)
    assert whole.model == SMOLLM2
    assert (whole.questions, whole.live_minutes, whole.problems) == (8, 2.0, 50)
    assert quick.questions < whole.questions
    assert (quick.seed, quick.problems, quick.live_minutes) == (2, 7, 0.0)


def test_the_answers_in_the_package_are_chats() -> None:
    chats = [json.loads(line)["messages"] for line in ANSWERS.read_text().splitlines()]
    assert len(chats) > 100
    assert ANSWERS.stat().st_size < 150_000
    assert all([m["role"] for m in chat] == ["user", "assistant"] for chat in chats)
