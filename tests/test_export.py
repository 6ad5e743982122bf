"""Three layouts out of one checkpoint: round trips bit-equal, tokens identical, LoRA merged, no parablock needed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_model
from peft import LoraConfig, PeftModel, get_peft_model
from processes import run_without_parablock
from safetensors.torch import load_file
from test_architectures import WORKS, write_ar_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

import parablock as pb
from parablock.checkpoints.look import look
from parablock.checkpoints.named import BUNDLED

QUESTION = "Mara has 4 boxes with 6 pencils in each. Mara buys 5 more. How many pencils does Mara have now?"
FIELDS: dict[str, Any] = {"max_new_tokens": 60, "threshold": 0.9}


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any, list[int], list[int]]:
    """The bundled model as it lies in its file (bf16), a prompt, and the answer."""
    model, tokenizer = pb.load("bundled", dtype="auto")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True)
    ids = list(prompt["input_ids"])
    return model, tokenizer, ids, pb.generate(model, ids, pb.DecodeConfig(**FIELDS)).tokens[0]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def assert_same_tensors(one: Path, other: Path) -> None:
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def test_stock_to_official_to_stock(bundled: tuple[Any, ...], tmp_path: Path) -> None:
    model, tokenizer, ids, answer = bundled
    pb.export(model, tokenizer, tmp_path / "official", "official")
    config = json.loads((tmp_path / "official" / "config.json").read_text())
    published = json.loads((Path(__file__).parent / "official" / "config.json").read_text())
    assert {k: config[k] for k in ("model_type", "architectures")} == {
        k: published[k] for k in ("model_type", "architectures")
    }
    # readers of transformers 4 find what they look for
    assert published.keys() - config.keys() <= {"auto_map", "conplemenrary_mask", "transformers_version"}
    assert (config["rope_theta"], config["torch_dtype"]) == (model.config.rope_parameters["rope_theta"], "bfloat16")

    official = AutoModelForCausalLM.from_pretrained(tmp_path / "official")
    assert type(official).__name__ == "Fast_dLLM_QwenForCausalLM"
    out = official.generate(torch.tensor([ids]), 60, threshold=0.9, use_block_cache=True)
    assert out[0, len(ids) :].tolist() == answer

    again, tokenizer_again = pb.load(tmp_path / "official", dtype="auto")
    pb.export(again, tokenizer_again, tmp_path / "stock")
    assert_same_tensors(BUNDLED / "diffusion", tmp_path / "official")
    assert_same_tensors(BUNDLED / "diffusion", tmp_path / "stock")
    stock, tokenizer_stock = pb.load(tmp_path / "stock", dtype="auto")
    assert type(stock).__name__ == "Qwen2ForCausalLM"
    assert tokenizer_stock(QUESTION)["input_ids"] == tokenizer(QUESTION)["input_ids"]
    assert (stock.config.bd_size, stock.config.mask_token_id) == (model.config.bd_size, model.config.mask_token_id)
    assert pb.generate(stock, ids, pb.DecodeConfig(**FIELDS)).tokens[0] == answer


STANDALONE = """
import importlib.util, json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
path, ids = sys.argv[1], json.loads(sys.argv[2])
import torch
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path)
torch.set_num_threads(1)
out = model.generate(torch.tensor([ids]), **json.loads(sys.argv[3]))
print("ANSWER", json.dumps([type(model).__name__, out[0, len(ids):].tolist(), tokenizer.mask_token_id]))
"""


def answer_without_parablock(path: Path, ids: list[int], arguments: dict[str, Any], scratch: Path) -> list[Any]:
    out = run_without_parablock(STANDALONE, [path, json.dumps(ids), json.dumps(arguments)], scratch)
    answer: list[Any] = json.loads(out.split("ANSWER")[1])
    return answer


def test_standalone_decodes_where_parablock_is_not_installed(bundled: tuple[Any, ...], tmp_path: Path) -> None:
    model, tokenizer, ids, answer = bundled
    pb.export(model, tokenizer, tmp_path / "standalone", "standalone")
    assert_same_tensors(BUNDLED / "diffusion", tmp_path / "standalone")
    arguments = {**FIELDS, "do_sample": False}
    name, tokens, mask = answer_without_parablock(tmp_path / "standalone", ids, arguments, tmp_path)
    assert (name, tokens, mask) == ("BlockDiffusionForCausalLM", answer, model.config.mask_token_id)
    # here, and without consent to its code, it is an ordinary checkpoint
    stock, _ = pb.load(tmp_path / "standalone", dtype="auto")
    assert type(stock).__name__ == "Qwen2ForCausalLM"
    assert pb.generate(stock, ids, pb.DecodeConfig(**FIELDS)).tokens[0] == answer


def test_standalone_works_for_any_architecture(tmp_path: Path) -> None:
    write_ar_checkpoint(tmp_path / "ar", "gemma2", WORKS["gemma2"][1])
    model, tokenizer = pb.load(tmp_path / "ar")
    pb.prepare(model, tokenizer, 8)
    pb.export(model, tokenizer, tmp_path / "standalone", "standalone")
    ids = list(range(20, 31))
    config = pb.DecodeConfig(max_new_tokens=20, threshold=0.5, sub_block_size=4)
    arguments = {"max_new_tokens": 20, "threshold": 0.5, "sub_block_size": 4}
    name, tokens, _ = answer_without_parablock(tmp_path / "standalone", ids, arguments, tmp_path)
    assert (name, tokens) == ("BlockDiffusionForCausalLM", pb.generate(model, ids, config).tokens[0])
    with pytest.raises(ValueError, match="a gemma2 model has no official layout"):
        pb.export(model, tokenizer, tmp_path / "official", "official")


def test_published_files_become_standalone(official_directory: Path, tmp_path: Path) -> None:
    """Nothing of parablock is left in them that a stock transformers would look for, the tokenizer included."""
    model, tokenizer = pb.load(official_directory)
    pb.export(model, tokenizer, tmp_path / "standalone", "standalone")
    arguments = {"max_new_tokens": 8, "do_sample": False}
    name, tokens, mask = answer_without_parablock(tmp_path / "standalone", [1, 2, 3], arguments, tmp_path)
    expected = pb.generate(model, [1, 2, 3], pb.DecodeConfig(max_new_tokens=8)).tokens[0]
    assert (name, tokens, mask) == ("BlockDiffusionForCausalLM", expected, 151665)
    for layout in ("official", "stock"):
        pb.export(model, tokenizer, tmp_path / layout, layout)  # type: ignore[arg-type]
        config = json.loads((tmp_path / layout / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "Qwen2Tokenizer"


def test_official_files_round_trip(official_directory: Path, tmp_path: Path) -> None:
    model, tokenizer = pb.load(official_directory)
    pb.export(model, tokenizer, tmp_path / "stock")
    stock, stock_tokenizer = pb.load(tmp_path / "stock")
    pb.export(stock, stock_tokenizer, tmp_path / "official", "official")
    again, again_tokenizer = pb.load(tmp_path / "official")
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    chat = [{"role": "user", "content": "Why?"}]
    texts = {t.apply_chat_template(chat, tokenize=False) for t in (tokenizer, stock_tokenizer, again_tokenizer)}
    assert len(texts) == 1
    assert {t.mask_token_id for t in (tokenizer, stock_tokenizer, again_tokenizer)} == {151665}
    assert again.generation_config.eos_token_id == [151645, 151643]
    config = pb.DecodeConfig(max_new_tokens=20)
    tokens = [pb.generate(m, [1, 2, 3], config).tokens for m in (model, stock, again)]
    assert tokens[0] == tokens[1] == tokens[2]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA adapter with weights of its own over a small AR checkpoint without a mask token."""
    write_ar_checkpoint(tmp_path / "base", "qwen3", WORKS["qwen3"][1])
    model, tokenizer = pb.load(tmp_path / "base")
    pb.prepare(model, tokenizer, 16)
    torch.manual_seed(1)
    lora = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    pb.save(lora, tokenizer, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_lora_adapters_are_loaded_and_merged(adapter: Path, tmp_path: Path) -> None:
    checkpoint = look(adapter)
    assert (checkpoint.adapted, checkpoint.block_size, look(checkpoint.base.target).adapted) == (True, 16, False)  # type: ignore[union-attr]
    model, tokenizer = pb.load(adapter)
    assert isinstance(model, PeftModel)
    before = {name: p.clone() for name, p in model.named_parameters()}
    pb.export(model, tokenizer, tmp_path / "merged")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())  # the caller's stays as it was
    merged, _ = pb.load(tmp_path / "merged")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    ids = torch.randint(5, 500, (1, 24))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    config = pb.DecodeConfig(max_new_tokens=30, stop_token_ids=())
    assert pb.generate(merged, [5, 6, 7], config).tokens == pb.generate(model, [5, 6, 7], config).tokens


def test_lora_trains_with_the_recipe(tmp_path: Path) -> None:
    from train_worker import CONFIG, samples

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "diffusion")
    model = get_peft_model(small_model(), LoraConfig(r=4, target_modules="all-linear"))
    losses: list[float] = []
    config = pb.TrainConfig(**{**vars(CONFIG), "optimizer": "adamw", "lr": 2e-2})
    pb.train(
        model,
        tokenizer,
        samples(60),
        config,
        tmp_path / "run",
        progress=lambda _, logs: losses.append(logs.get("loss", 9)),
    )
    assert losses[2] < losses[0]


def test_bad_adapters(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no base_model_name_or_path"):
        pb.load(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "block_diffusion.json").unlink()
    assert not look(adapter).adapted  # a LoRA adapter of the AR model
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors"):
        pb.load(adapter)


def test_bad_exports(bundled: tuple[Any, ...], tmp_path: Path) -> None:
    model, tokenizer, _, _ = bundled
    with pytest.raises(ValueError, match="layout='gguf' is unknown; use stock, official, standalone"):
        pb.export(model, tokenizer, tmp_path / "new", "gguf")  # type: ignore[arg-type]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    with pytest.raises(ValueError, match="not empty"):
        pb.export(model, tokenizer, tmp_path / "mine")
    plain = small_model()
    del plain.config.bd_size
    with pytest.raises(ValueError, match="has no bd_size"):
        pb.export(plain, tokenizer, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
