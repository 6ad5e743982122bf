"""GGUF checkpoints: the model they were written from, converted once; what cannot be loaded is named in one line."""

import json
import os
import shutil
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import attach_gate
from gguf import GGMLQuantizationType, dequantize, quantize
from gguf_files import MODELS, random_model, tokenizer_of, write_gguf
from processes import run, run_program, start

import parablock as pb
from parablock.cached import IN_USE, cached_directory
from parablock.checkpoints.look import look

IDS = torch.randint(10, 600, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder for one test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "parablock" / "gguf"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "tiny.gguf"
    write_gguf(path, tokenizer__ggml__eot_token_id=5)
    return path


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if not path.name.startswith("."))


def logits(model: Any) -> torch.Tensor:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_the_one_it_was_written_from(name: str, tmp_path: Path) -> None:
    original = write_gguf(tmp_path / "model.gguf", name)
    model, _ = pb.load(tmp_path / "model.gguf", dtype="float32", packed=False)
    assert type(model) is type(original)
    assert torch.equal(logits(model), logits(original))
    out = pb.generate(model, IDS[0].tolist(), pb.DecodeConfig(max_new_tokens=8, stop_token_ids=()))
    assert out.new_tokens == 8


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_weights_are_dequantised(kind: str, tmp_path: Path) -> None:
    own = GGMLQuantizationType[kind]
    write_gguf(tmp_path / "model.gguf", kind=own)
    expected = random_model("llama")
    for tensor in expected.parameters():
        if tensor.ndim > 1:  # llama.cpp's order of a head's rows does not matter: blocks lie within rows
            tensor.data = torch.from_numpy(dequantize(quantize(tensor.data.numpy(), own), own).copy())
    model, _ = pb.load(tmp_path / "model.gguf", dtype="float32", packed=False)
    assert torch.equal(logits(model), logits(expected))


def test_dtypes(file: Path, cache: Path) -> None:
    exact = random_model("llama").state_dict()
    for dtype, made in (("auto", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)):
        model, _ = pb.load(file, dtype=dtype, packed=False)
        assert model.dtype == made
        assert all(torch.equal(t, exact[name].to(made)) for name, t in model.state_dict().items())
    assert pb.load(file)[0].dtype == torch.float32  # a small one, on a CPU
    pb.load(file, dtype="int8")
    assert len(entries(cache)) == 3  # these two are made from bfloat16
    with pytest.raises(ValueError, match="dtype='float64': a GGUF is read in one of float32, bfloat16, float16"):
        pb.load(file, dtype=torch.float64)


def test_the_tokenizer(file: Path) -> None:
    model, tokenizer = pb.load(file)
    own = tokenizer_of()
    assert tokenizer.chat_template == own.chat_template
    assert (tokenizer.eos_token, tokenizer.pad_token) == (own.eos_token, own.pad_token)
    assert model.generation_config.eos_token_id == sorted([own.eos_token_id, 5])  # the end of a turn ends an answer
    messages = [{"role": "user", "content": "Mara has many books."}]
    text = own.apply_chat_template(messages, tokenize=False)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    for text in ("Mara has many books.", "<|im_start|>user"):  # numbers are split as "qwen2" says
        assert tokenizer(text)["input_ids"] == own(text)["input_ids"]


def test_a_tokenizer_of_single_digits(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", tokenizer__ggml__pre="smollm")
    _, tokenizer = pb.load(tmp_path / "model.gguf")
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("is  47")]
    assert pieces == ["is", "ĠĠ", "4", "7"]


def test_it_is_converted_once(file: Path, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pb.load(file)
    assert capfd.readouterr().err.splitlines()[0] == f"parablock: reading tiny.gguf (once; it is kept in {cache})"
    (entry,) = entries(cache)
    before = {path.name: path.stat().st_mtime_ns for path in entry.iterdir()}
    pb.load(file)
    assert "reading" not in capfd.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in entry.iterdir()} == before
    copy = cache / "tiny.gguf"
    shutil.copy(file, copy)  # another path, so another file
    pb.load(copy)
    os.utime(copy, (1, 1))  # another time
    pb.load(copy)
    assert len([path for path in entries(cache) if path.is_dir()]) == 3


def test_two_processes_convert_once(file: Path, cache: Path) -> None:
    command = ("generate", "--model", file, "--raw", "--max-new-tokens", 4, "4+7")
    with start(*command) as one, start(*command) as other:
        assert [one.wait(), other.wait()] == [0, 0], one.err + other.err
        assert (one.err + other.err).count("parablock: reading") == 1
        assert one.out == other.out
        assert len((one.err + other.err).splitlines()) == 3  # and twice that it decodes autoregressively
    assert len(entries(cache)) == 1


def test_a_killed_conversion_leaves_nothing_behind(file: Path, cache: Path) -> None:
    command = ("generate", "--model", file, "--raw", "--max-new-tokens", 4, "4+7")
    with start(*command) as process:
        process.wait_for("parablock: reading")
        process.kill()
        process.wait()
    assert not entries(cache)
    assert list(cache.glob("*.part"))
    shutil.copy(file, cache.parent / "other.gguf")
    pb.load(cache.parent / "other.gguf")  # whoever converts next removes it
    assert not list(cache.glob("*.part"))
    assert run(*command).returncode == 0
    assert len(entries(cache)) == 2


def test_the_least_recently_used_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARABLOCK_CACHE_GB", "0.0000025")  # 2500 bytes
    made = []

    def make(folder: Path) -> None:
        made.append(folder.name)
        (folder / "weights").write_bytes(bytes(1000))

    for age, key in ((3, "a"), (2, "b")):
        entry = cached_directory(tmp_path, key, make)
        os.utime(entry, (time.time() - age * IN_USE,) * 2)
    cached_directory(tmp_path, "a", make)  # used again
    assert len(made) == 2
    cached_directory(tmp_path, "c", make)
    assert [path.name for path in entries(tmp_path)] == ["a", "c"]
    cached_directory(tmp_path, "d", make)
    assert [path.name for path in entries(tmp_path)] == ["a", "c", "d"]  # all are in use

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_directory(tmp_path, "e", fail)
    assert not (tmp_path / "e").exists()
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("value", ["0", "-1", "much", "inf", "nan"])
def test_a_wrong_bound(value: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARABLOCK_CACHE_GB", value)
    with pytest.raises(ValueError, match=f"PARABLOCK_CACHE_GB='{value}' is no positive number; set it to gigabytes"):
        pb.load(file)


def rewritten(**fields: Any) -> Callable[[Path], Any]:
    return lambda file: write_gguf(file, **fields)


def cut(size: int) -> Callable[[Path], Any]:
    def write(file: Path) -> None:
        write_gguf(file)
        file.write_bytes(file.read_bytes()[:size])

    return write


def of_kind(kind: int) -> Callable[[Path], Any]:
    """The kind of the first tensor is changed: its number stands behind its name and shape."""

    def write(file: Path) -> None:
        write_gguf(file)
        content = bytearray(file.read_bytes())
        name = b"token_embd.weight"
        at = content.index(name) + len(name) + 4 + 2 * 8
        content[at : at + 4] = struct.pack("<I", kind)
        file.write_bytes(content)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file: file.write_bytes(b""), "model.gguf' is empty; download or copy it again"),
        (lambda file: file.write_bytes(b"PK" * 50), "model.gguf' is not a GGUF file, whatever its name says"),
        (lambda file: file.write_bytes(b"GGUF" + struct.pack("<IQQ", 9, 0, 0)), r"damaged \(version 9, where 2 or 3"),
        (lambda file: file.write_bytes(b"GGUF" + b"\xff" * 60), r"model.gguf' is truncated or damaged \("),
        (cut(12), r"model.gguf' is truncated or damaged \("),
        (cut(5000), r"model.gguf' is truncated or damaged \("),
        (cut(-100), r"model.gguf' is truncated: it has \d+ bytes of \d+; download or copy it again"),
        (rewritten(general__architecture="xyz"), "is a GGUF of architecture 'xyz', which cannot be loaded; these"),
        (rewritten(split__count=3), "is one of 3 parts; merge them first with llama.cpp: llama-gguf-split --merge"),
        (rewritten(general__type="adapter"), "is a GGUF of type 'adapter'; name the one of the model"),
        (rewritten(tokenizer__ggml__tokens=None), "has no tokenizer in it"),
        (rewritten(tokenizer__ggml__model="martian"), "could not be loaded .*martian"),
        (rewritten(llama__rope__scaling__type="yarn"), "has positions stretched by 'yarn', which is not read from a G"),
        (rewritten(llama__rope__dimension_count=8), "has positions in 8 of a head's 16 dimensions"),
        (rewritten(llama__expert_count=8), r"has experts \(Mixtral\), which is not read"),
        (rewritten(llama__embedding_length=None), "does not say its shape"),
        (rewritten(llama__block_count=3), "tensors of a LlamaForCausalLM are not in the checkpoint"),
        (rewritten(llama__feed_forward_length=32), "tensors do not have the shapes that config.json asks for"),
        (of_kind(36), r"has weights of type \w+, which cannot be dequantised|does not know"),
        (of_kind(999), "token_embd.weight is of kind 999, which the library gguf does not know"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded(write: Callable[[Path], Any], message: str, tmp_path: Path, cache: Path) -> None:
    write(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=message) as error:
        pb.load(tmp_path / "model.gguf")
    assert "\n" not in str(error.value)
    assert not cache.exists() or not entries(cache)


def test_a_directory_with_a_gguf(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(file, folder / "one.gguf")
    checkpoint = look(folder)
    assert (checkpoint.target, checkpoint.gguf, checkpoint.adapted) == (str(folder / "one.gguf"), True, False)
    shutil.copy(file, folder / "two.gguf")
    with pytest.raises(ValueError, match=r"holds 2 GGUF files \(one.gguf, two.gguf\); name one of them"):
        look(folder)
    (folder / "two.gguf").rename(folder / "two-00001-of-00002.gguf")
    for path in (folder, folder / "two-00001-of-00002.gguf"):
        with pytest.raises(ValueError, match="is part 1 of 2 of a GGUF; merge them first"):
            look(path)
    with pytest.raises(ValueError, match="there is no GGUF file at"):
        look(folder / "three.gguf")
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no \.safetensors weights"):
        look(folder)


def test_an_adapter_names_its_gguf(file: Path, tmp_path: Path) -> None:
    model, tokenizer = pb.load(file)
    pb.save(attach_gate(model), tokenizer, tmp_path / "drafts")
    named = json.loads((tmp_path / "drafts" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(file)
    again, _ = pb.load(tmp_path / "drafts")
    config = pb.DecodeConfig(max_new_tokens=12)
    assert pb.generate(again, [11, 12, 13], config).tokens == pb.generate(model, [11, 12, 13], config).tokens
    pb.save(*pb.load(file), tmp_path / "whole")
    assert look(tmp_path / "whole").gguf is False


LIGHT = """
import sys
from parablock.checkpoints.look import look
look(sys.argv[1])
sys.exit(any(name in sys.modules for name in ("torch", "transformers")))
"""
MISSING = """
import sys
from importlib.machinery import PathFinder
found = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "gguf" else found(name, *rest)
from parablock.cli import app
app(["generate", "--model", sys.argv[1], "hi"], standalone_mode=False)
"""


def test_a_gguf_is_looked_at_without_torch_and_needs_its_library(file: Path) -> None:
    assert run_program([sys.executable, "-c", LIGHT, file]).returncode == 0
    assert (
        "this needs gguf; install it with: pip install 'parablock[gguf]'"
        in run_program([sys.executable, "-c", MISSING, file]).stderr
    )
