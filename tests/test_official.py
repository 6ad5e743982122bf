"""The published Fast-dLLM v2 checkpoints: found by transformers, run as their model card says, and never their code."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_official
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer

import parablock as pb


@pytest.fixture(scope="module")
def loaded(official_directory: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(official_directory), AutoTokenizer.from_pretrained(official_directory)


QUICKSTART = """
model = AutoModelForCausalLM.from_pretrained(model_name, torch_dtype="auto", device_map="auto", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(model_name, trust_remote_code=True)

prompt = "Give me a short introduction to large language model."
messages = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": prompt},
]
text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
inputs = tokenizer([text], return_tensors="pt").to(model.device)
gen_ids = model.generate(
    inputs["input_ids"], tokenizer=tokenizer, max_new_tokens=512, small_block_size=8, threshold=0.9
)
response = tokenizer.decode(gen_ids[0][inputs["input_ids"].shape[1]:], skip_special_tokens=True)
print("QUICKSTART", type(model).__module__, gen_ids.shape[1] - inputs["input_ids"].shape[1], tokenizer.mask_token_id)
"""

IMPORTS = {
    "parablock first": "import parablock\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n",
    "parablock last": "from transformers import AutoModelForCausalLM, AutoTokenizer\nimport parablock\n",
    "parablock between": "from transformers import AutoTokenizer\nimport parablock\n"
    "from transformers import AutoModelForCausalLM\n",
}


def with_hostile_code(path: Path) -> Path:
    """Code files wherever transformers could look for them; each leaves a trace when it runs."""
    write_official(path)
    trace = f"open({str(path.parent / 'TRACE')!r}, 'a').write(__name__)\n"
    for name in ("configuration.py", "modeling.py", "tokenization.py", "custom_generate/generate.py", "setup.py"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(trace)
    return path


@pytest.mark.parametrize("order", IMPORTS)
def test_the_model_cards_quickstart_runs_and_no_code_of_the_checkpoint(order: str, tmp_path: Path) -> None:
    path = with_hostile_code(tmp_path / "Fast_dLLM_v2")
    program = f"{IMPORTS[order]}model_name = {str(path)!r}\n{QUICKSTART}"
    if order != "parablock first":  # once at full length
        program = program.replace("max_new_tokens=512", "max_new_tokens=16")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert out.returncode == 0, out.stderr
    words = out.stdout.split("QUICKSTART")[1].split()
    assert words[0] == "parablock.checkpoints.official"
    assert 1 <= int(words[1]) <= 512
    assert words[2] == "151665"
    assert not (tmp_path / "TRACE").exists()


def test_load_runs_no_code_either(tmp_path: Path) -> None:
    path = with_hostile_code(tmp_path / "Fast_dLLM_v2")
    tokenizer_config = json.loads((path / "tokenizer_config.json").read_text())
    tokenizer_config["auto_map"] = {"AutoTokenizer": ["tokenization.Evil", "tokenization.EvilFast"]}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    model, tokenizer = pb.load(path)
    assert pb.generate(model, [1, 2, 3], pb.DecodeConfig(max_new_tokens=4)).new_tokens == 4
    assert tokenizer.mask_token_id == 151665
    assert not (tmp_path / "TRACE").exists()


def test_the_published_files_are_understood(loaded: tuple[Any, Any], official_directory: Path) -> None:
    model, tokenizer = loaded
    assert (model.config.bd_size, model.config.mask_token_id) == (32, 151665)  # the file has no mask token
    assert model.generation_config.eos_token_id == [151645, 151643]
    assert tokenizer.mask_token == "|<MASK>|"
    assert tokenizer.mask_token_id == tokenizer.convert_tokens_to_ids("|<MASK>|") == 151665
    assert tokenizer("<|im_end|>|<MASK>|")["input_ids"] == [151645, 151665]
    whole = AutoConfig.from_pretrained(Path(__file__).parent / "official")
    assert whole.rope_parameters == {"rope_theta": 1000000.0, "rope_type": "default"}
    assert (whole.hidden_size, whole.num_hidden_layers, whole.vocab_size) == (3584, 28, 152064)


def test_generate_as_published(loaded: tuple[Any, Any], golden_generations: list[dict[str, Any]]) -> None:
    """Tokens of the official code, by the arguments of the official code."""
    model, _ = loaded
    cases = [case for case in golden_generations if case["block_size"] == 32]
    for case in cases[::5]:  # test_decoding runs all of them; here the vocabulary is large
        ids = model.generate(
            torch.tensor([case["prompt"]]),
            max_new_tokens=len(case["output"]),
            small_block_size=case["sub_block_size"],
            threshold=case["threshold"],
            use_block_cache=case["sub_block_cache"],
            mask_id=511,
            stop_token=510,
            block_size=32,
        )
        assert ids[0].tolist() == case["prompt"] + case["output"]


def test_published_defaults_and_sampling(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prompt = torch.tensor([[5, 6, 7]])
    one_by_one = pb.DecodeConfig(threshold=1.0, sub_block_cache=False, max_new_tokens=20)
    assert model.generate(prompt, 20)[0, 3:].tolist() == pb.generate(model, prompt, one_by_one).tokens[0]
    sampled = [model.generate(prompt, 6, temperature=1.0, top_p=0.9, seed=seed)[0].tolist() for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    torch.manual_seed(3)
    first = model.generate(prompt, 6, temperature=1.0, tokenizer=tokenizer)
    torch.manual_seed(3)
    assert torch.equal(first, model.generate(prompt, 6, temperature=1.0))


def test_padded_batches(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    alone = [model.generate(torch.tensor([row]), 12, threshold=0.9)[0, len(row) :].tolist() for row in ([5, 6], [7])]
    for batch, mask in (([[5, 6], [0, 7]], [[1, 1], [0, 1]]), ([[5, 6], [7, 0]], [[1, 1], [1, 0]])):
        both = model.generate(torch.tensor(batch), 12, threshold=0.9, attention_mask=torch.tensor(mask))
        assert both[:, :2].tolist() == batch
        for row, answer in zip(both[:, 2:].tolist(), alone, strict=True):
            assert row[: len(answer)] == answer
            assert set(row[len(answer) :]) <= {model.generation_config.pad_token_id}


def test_what_is_not_supported_is_refused_by_name(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    with pytest.raises(TypeError, match="num_beams"):
        model.generate(torch.tensor([[1]]), 4, num_beams=4)
    with pytest.raises(ValueError, match="stopping_criteria is not supported"):
        model.generate(torch.tensor([[1]]), 4, stopping_criteria=[])
    with pytest.raises(ValueError, match="sub_block_size=7"):
        model.generate(torch.tensor([[1]]), 4, small_block_size=7)
    with pytest.raises(ValueError, match="pass \\[rows, tokens\\]"):
        model.generate(torch.tensor([1]), 4)


def test_saving_keeps_the_layout_and_drops_the_code(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = loaded
    pb.save(model, tokenizer, tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert "auto_map" not in config
    assert (config["model_type"], config["architectures"]) == ("Fast_dLLM_Qwen", ["Fast_dLLM_QwenForCausalLM"])
    again, tokenizer_again = pb.load(tmp_path / "copy")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert type(tokenizer_again) is type(tokenizer) is Qwen2Tokenizer
    assert tokenizer_again.mask_token_id == 151665


def test_a_missing_shard(official_directory: Path, tmp_path: Path) -> None:
    path = shutil.copytree(official_directory, tmp_path / "copy")
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of the 2 weight files.*model-00002-of-00002"):
        pb.load(path)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    del index["weight_map"]["lm_head.weight"]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"1 tensors of a .* are not in the checkpoint \(first: lm_head.weight\)"):
        pb.load(path)
