"""Loading and saving: round trips, and what is wrong with a directory is said in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import parablock as pb
from parablock.checkpoints.load import BUNDLED


def test_round_trip_keeps_weights_tokens_and_fields(tmp_path: Path) -> None:
    model, tokenizer = pb.load("bundled")
    pb.save(model, tokenizer, tmp_path / "copy")
    again, tokenizer_again = pb.load(tmp_path / "copy")
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert (again.config.bd_size, again.config.mask_token_id) == (model.config.bd_size, model.config.mask_token_id)
    text = "Mara has 47 books.\n4+7=11"
    assert tokenizer(text)["input_ids"] == tokenizer_again(text)["input_ids"]
    assert {p.suffix for p in (tmp_path / "copy").iterdir()} <= {".json", ".safetensors", ".jinja"}
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]  # nothing half-written beside it


def test_bundled_models_are_stock_and_small() -> None:
    for name in ("bundled", "bundled-ar"):
        model, tokenizer = pb.load(name)
        assert type(model).__module__ == "transformers.models.qwen2.modeling_qwen2"
        assert model.dtype == torch.float32
        assert not model.training
        assert tokenizer.mask_token_id == model.config.mask_token_id
    assert sum(f.stat().st_size for f in BUNDLED.rglob("*") if f.is_file()) < 16 * 2**20


def test_save_does_not_overwrite(tmp_path: Path) -> None:
    model, tokenizer = pb.load("bundled")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        pb.save(model, tokenizer, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def broken(tmp_path: Path, damage: Any) -> Path:
    path = tmp_path / "model"
    shutil.copytree(BUNDLED / "diffusion", path)
    damage(path)
    return path


def test_a_truncated_checkpoint(tmp_path: Path) -> None:
    def cut(path: Path) -> None:
        weights = path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])

    with pytest.raises(ValueError, match=r"model\.safetensors' is truncated or damaged"):
        pb.load(broken(tmp_path, cut))


def test_a_directory_without_config_or_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        pb.load(tmp_path)
    path = broken(tmp_path, lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"))
    with pytest.raises(ValueError, match=r"pickled weights \(pytorch_model\.bin\).*convert them once"):
        pb.load(path)


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no checkpoint directory"):
        pb.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no-such/model could not be loaded"):
        pb.load("no-such/model")


def test_an_unknown_architecture(tmp_path: Path) -> None:
    def rename(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "model_type": "nobody-knows"}))

    with pytest.raises(ValueError, match="nobody-knows"):
        pb.load(broken(tmp_path, rename))


def test_a_checkpoint_without_mask_token_decodes_autoregressively_only() -> None:
    model, _ = pb.load("bundled-ar")
    del model.config.mask_token_id
    with pytest.raises(ValueError, match="names no mask token"):
        pb.generate(model, [1, 2, 3])
    assert pb.generate(model, [1, 2, 3], pb.DecodeConfig(mode="autoregressive", max_new_tokens=4)).tokens
