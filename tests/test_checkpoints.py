"""Loading and saving: round trips, and what is wrong with a directory is said in one line."""

import json
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_official
from safetensors.torch import load_file
from test_architectures import SHAPE, write_ar_checkpoint
from transformers import AutoTokenizer

import parablock as pb
from parablock.checkpoints.look import announce, look
from parablock.checkpoints.named import BUNDLED


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
    assert sum(f.stat().st_size for f in BUNDLED.rglob("*") if f.is_file()) < 20 * 2**20


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


def test_an_ar_checkpoint_is_loaded_as_it_is_and_decodes_autoregressively(tmp_path: Path) -> None:
    path = ar_checkpoint(tmp_path / "ar", 604)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, tokenizer = pb.load(path)
    before = load_file(path / "model.safetensors")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert (model.config.vocab_size, tokenizer.mask_token, len(tokenizer)) == (604, None, 604)
    ar = pb.DecodeConfig(mode="autoregressive", max_new_tokens=12)
    out = pb.generate(model, [[1, 2, 3], [4]], pb.DecodeConfig(max_new_tokens=12))
    assert out.tokens == pb.generate(model, [[1, 2, 3], [4]], ar).tokens
    assert out.decode_forwards == [11, 11]  # one token each, besides the prefill's
    with pb.Engine(model) as engine:
        assert engine.generate([[1, 2, 3], [4]], pb.DecodeConfig(max_new_tokens=12)).tokens == out.tokens
    with pytest.raises(ValueError, match=r"mode='diffusion': .*never adapted.*parablock adapt.*mode='autoregressive'"):
        pb.generate(model, [1, 2, 3], pb.DecodeConfig(mode="diffusion"))


def test_what_a_checkpoint_was_made_for(
    tmp_path: Path, official_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ar, published = look(ar_checkpoint(tmp_path / "ar", 604)), look(official_directory)
    assert [(c.block_size, c.mask_token_id, c.adapted) for c in (look("bundled"), ar, published)] == [
        (32, 3, True), (None, None, False), (32, 151665, True)
    ]  # fmt: skip
    capsys.readouterr()
    for checkpoint in (look("bundled"), published):
        announce(checkpoint, pb.DecodeConfig())
        announce(checkpoint, pb.DecodeConfig(mode="diffusion"))
    announce(ar, pb.DecodeConfig(mode="autoregressive"))
    assert capsys.readouterr().err == ""  # nobody is surprised
    announce(ar, pb.DecodeConfig())
    assert "was never adapted to block diffusion: it decodes autoregressively" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"mode='diffusion': .* never adapted.*--mode autoregressive"):
        announce(ar, pb.DecodeConfig(mode="diffusion"))


def ar_checkpoint(path: Path, rows: int, **changes: Any) -> Path:
    """A random Qwen2 AR checkpoint with a tokenizer of 604 tokens, none of them a mask token."""
    write_ar_checkpoint(path, "qwen2", {**SHAPE, "vocab_size": rows, **changes})
    return path


def test_an_unused_row_becomes_the_mask_token(tmp_path: Path) -> None:
    path = ar_checkpoint(tmp_path / "ar", 640)
    model, tokenizer = pb.load(path)
    added = pb.prepare(model, tokenizer)
    assert added == "mask token '|<MASK>|' (id 604, an unused row of the embeddings)"
    assert (tokenizer.mask_token, tokenizer.mask_token_id, model.config.mask_token_id) == ("|<MASK>|", 604, 604)
    assert (model.config.bd_size, model.config.vocab_size) == (32, 640)
    before = load_file(path / "model.safetensors")
    for name, p in model.named_parameters():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            torch.testing.assert_close(p[604], before[name][:604].mean(0))
            assert torch.equal(torch.cat([p[:604], p[605:]]), torch.cat([before[name][:604], before[name][605:]]))
        else:
            assert torch.equal(p, before[name])


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_row_becomes_the_mask_token(tmp_path: Path, tied: bool) -> None:
    path = ar_checkpoint(tmp_path / "ar", 604, tie_word_embeddings=tied)
    model, tokenizer = pb.load(path)
    added = pb.prepare(model, tokenizer, 16)
    assert added == "mask token '|<MASK>|' (id 604, a new row: the embeddings grew from 604 to 640)"
    assert (model.config.mask_token_id, model.config.bd_size, model.config.vocab_size) == (604, 16, 640)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) is tied
    for matrix in (embedding, head):
        torch.testing.assert_close(matrix[604:], matrix[:604].mean(0).expand(36, -1))
    pb.save(model, tokenizer, tmp_path / "ready")
    assert look(tmp_path / "ready").adapted
    again, tokenizer_again = pb.load(tmp_path / "ready")
    assert pb.prepare(again, tokenizer_again, 16) is None
    assert torch.equal(again.get_input_embeddings().weight, embedding)
    assert (again.config.bd_size, again.config.mask_token_id, tokenizer_again.mask_token_id) == (16, 604, 604)


def test_a_mask_token_that_the_tokenizer_has_is_kept(tmp_path: Path) -> None:
    model = write_ar_checkpoint(tmp_path / "ar", "qwen2", {**SHAPE, "vocab_size": 640})
    AutoTokenizer.from_pretrained(BUNDLED / "diffusion").save_pretrained(tmp_path / "ar")
    loaded, tokenizer = pb.load(tmp_path / "ar")
    assert pb.prepare(loaded, tokenizer) == "mask token '<|mask|>' (id 3, which the tokenizer had)"
    assert loaded.config.mask_token_id == 3
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_qwen_checkpoint_gets_the_published_mask_token(tmp_path: Path) -> None:
    """The tokenizer of Qwen2.5 has 151,665 tokens, its embedding more rows: the same id as Fast-dLLM v2."""
    path = write_official(tmp_path / "qwen")
    config = json.loads((path / "config.json").read_text())
    for name in ("auto_map", "bd_size"):
        del config[name]
    config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (path / "config.json").write_text(json.dumps(config))
    for name in ("special_tokens_map.json", "tokenizer_config.json", "added_tokens.json", "vocab.json"):
        content = json.loads((path / name).read_text())
        content.pop("|<MASK>|", None)
        content.pop("additional_special_tokens", None)
        content.get("added_tokens_decoder", {}).pop("151665", None)
        (path / name).write_text(json.dumps(content, ensure_ascii=False))
    assert AutoTokenizer.from_pretrained(path).convert_tokens_to_ids("|<MASK>|") is None
    model, tokenizer = pb.load(path)
    assert "an unused row of the embeddings" in (pb.prepare(model, tokenizer) or "")
    assert tokenizer.mask_token == "|<MASK>|"
    assert model.config.mask_token_id == tokenizer.mask_token_id
    assert tokenizer("<|im_end|>|<MASK>|")["input_ids"] == [151645, tokenizer.mask_token_id]


def test_wrong_shapes_and_missing_tensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(BUNDLED / "diffusion", path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "intermediate_size": config["intermediate_size"] + 8}))
    with pytest.raises(ValueError, match=r"tensors do not have the shapes.*first: model\.layers\.0\.mlp.*expected"):
        pb.load(path)
    longer = {"num_hidden_layers": 7, "layer_types": ["full_attention"] * 7}
    (path / "config.json").write_text(json.dumps({**config, **longer}))
    with pytest.raises(ValueError, match=r"are not in the checkpoint \(first: model\.layers\.\d+\."):
        pb.load(path)
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    with pytest.raises(ValueError, match=r"could not be loaded \(.*`num_hidden_layers` \(7\) must be equal"):
        pb.load(path)
    (path / "config.json").write_text("{ not json")
    with pytest.raises(ValueError, match=r"config\.json' is not JSON"):
        pb.load(path)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(BUNDLED / "diffusion", path)
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "TRACE").encode() + b"'\ntR.")
    with pytest.raises(ValueError, match=r"pickled weights \(pytorch_model\.bin\).*if you trust them, convert"):
        pb.load(path)
    assert not (tmp_path / "TRACE").exists()


def test_dtype_and_device_map() -> None:
    assert pb.load("bundled", dtype="auto")[0].dtype == torch.bfloat16
    assert pb.load("bundled", dtype="float16")[0].dtype == torch.float16
    model, _ = pb.load("bundled", device_map={"": "cpu"})
    assert {str(p.device) for p in model.parameters()} == {"cpu"}
    assert model.dtype == torch.bfloat16
    model, tokenizer = pb.load("bundled", device_map="auto", dtype=torch.float32)
    ids = tokenizer("4+7=")["input_ids"]
    config = pb.DecodeConfig(max_new_tokens=10)
    assert pb.generate(model, ids, config).tokens == pb.generate(pb.load("bundled")[0], ids, config).tokens
    with pytest.raises(ValueError, match="exclude each other"):
        pb.load("bundled", device="cpu", device_map="auto")


def test_quantisation_without_its_library_is_one_line() -> None:
    if find_spec("optimum") is not None:
        pytest.skip("optimum-quanto is installed")
    from transformers import QuantoConfig

    with pytest.raises(ValueError, match="bundled could not be loaded"):
        pb.load("bundled", quantization_config=QuantoConfig(weights="int8"))
