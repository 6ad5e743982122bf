"""Adapters of causal context as files: PEFT opens them, they come back on their base, and what is damaged is named."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ar_model
from peft import PeftModel
from processes import run_without_parablock, start_function
from safetensors.torch import load_file, save_file
from test_architectures import WORKS, write_ar_checkpoint
from test_gate import filled, gated, logits, rows
from transformers import AutoModelForCausalLM

import parablock as pb
from parablock.checkpoints.export import export_checkpoint
from parablock.checkpoints.look import announce, look
from parablock.diffusion.gate import Gate, attach, gate_of, new_gate
from parablock.packed import Int8Linear, PackedLinear

MASKED = [5, 6, 7, 640, 641, 642]  # three tokens and a draft block, for the bundled AR model


def drafting(base: str | Path, **changes: Any) -> tuple[Any, Any]:
    """A model with a gate that was filled at random, in values that the file can hold."""
    model, tokenizer = pb.load(base, **changes)
    gate = filled(new_gate(model, draft_tokens=3, rank=4, alpha=8))
    attach(model, gate.half().float())
    return model, tokenizer


def own_gate(model: Any) -> Gate:
    gate = gate_of(model)
    assert gate is not None
    return gate


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "drafts"
    pb.save(*drafting("bundled-ar"), folder)
    return folder


@pytest.fixture
def damaged(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "damaged"))


def change(file: Path, **fields: Any) -> None:
    """Other values in a JSON file; `...` removes a field."""
    content = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def test_a_round_trip_is_bit_equal(adapter: Path, tmp_path: Path) -> None:
    model, _ = drafting("bundled-ar")
    again, tokenizer = pb.load(adapter)
    gate, own = own_gate(model), own_gate(again)
    assert (own.targets, own.draft_tokens, own.rank, own.alpha, own.first_mask_id) == (gate.targets, 3, 4, 8, 640)
    for (name, a), (_, b) in zip(gate.state_dict().items(), own.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
        assert b.dtype == torch.float32
    ids = torch.tensor([MASKED])
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert not again.training
    assert tokenizer.decode(tokenizer("4+7=11")["input_ids"]) == "4+7=11"
    files = {file.name for file in adapter.iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors", "block_diffusion.json", "README.md"}
    assert "model.safetensors" not in files  # the base is named, not written
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "bundled-ar"
    pb.save(again, tokenizer, tmp_path / "again")
    first, second = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    assert {tensor.dtype for tensor in first.values()} == {torch.float16}
    with pytest.raises(ValueError, match="not empty"):
        pb.save(again, tokenizer, adapter)
    assert [file.name for file in tmp_path.iterdir()] == ["again"]


def test_large_values_are_written_in_bfloat16(tmp_path: Path) -> None:
    model, tokenizer = drafting("bundled-ar")
    with torch.no_grad():
        own_gate(model).embeddings[0, 0] = 2.0**17
    pb.save(model, tokenizer, tmp_path / "large")
    assert own_gate(pb.load(tmp_path / "large")[0]).embeddings[0, 0] == 2.0**17


@pytest.mark.filterwarnings("error:.*adapter")
def test_peft_opens_it(adapter: Path) -> None:
    model = PeftModel.from_pretrained(pb.load("bundled-ar", packed=False)[0], str(adapter))
    state, gate = model.state_dict(), own_gate(pb.load(adapter)[0])
    assert sum(".lora_A." in name for name in state) == len(gate.targets)
    for name, lora in zip(gate.targets, gate.loras, strict=True):
        for side, tensor in (("A", lora.down), ("B", lora.up)):
            assert torch.equal(state[f"base_model.model.{name}.lora_{side}.default.weight"], tensor)


def test_layers_are_named_in_full_where_their_last_names_are_not_enough(tmp_path: Path) -> None:
    write_ar_checkpoint(tmp_path / "base", "llama", WORKS["llama"][1])
    model, tokenizer = pb.load(tmp_path / "base")
    gate = new_gate(model, draft_tokens=1, rank=2, alpha=2)
    kept = [n for n, name in enumerate(gate.targets) if not name.startswith("model.layers.0.self_attn.q")]
    loras = [gate.loras[n] for n in kept]
    options: dict[str, Any] = {"first_mask_id": gate.first_mask_id, "draft_tokens": 1, "alpha": 2}
    attach(model, Gate([gate.targets[n] for n in kept], loras, gate.embeddings.data, **options))  # type: ignore[arg-type]
    pb.save(model, tokenizer, tmp_path / "drafts")
    named = json.loads((tmp_path / "drafts" / "adapter_config.json").read_text())["target_modules"]
    assert sorted(named) == sorted(gate.targets[n] for n in kept)
    opened = PeftModel.from_pretrained(pb.load(tmp_path / "base", packed=False)[0], str(tmp_path / "drafts"))
    assert sum(".lora_A." in name for name in opened.state_dict()) == len(kept)
    assert own_gate(pb.load(tmp_path / "drafts")[0]).targets == tuple(gate.targets[n] for n in kept)


@pytest.mark.parametrize(
    ("options", "layer", "dtype"),
    [
        ({}, PackedLinear, torch.float32),
        ({"packed": False}, torch.nn.Linear, torch.float32),
        ({"dtype": "bfloat16"}, PackedLinear, torch.bfloat16),
        ({"dtype": "int8"}, Int8Linear, torch.float32),
        ({"device_map": {"": "cpu"}}, torch.nn.Linear, torch.bfloat16),
    ],
)
def test_the_base_is_loaded_as_it_is_without_the_adapter(
    adapter: Path, options: dict[str, Any], layer: type, dtype: torch.dtype
) -> None:
    model, base = pb.load(adapter, **options)[0], pb.load("bundled-ar", **options)[0]
    assert (type(model.model.layers[0].mlp.up_proj), model.dtype) == (layer, dtype)
    assert {p.dtype for p in own_gate(model).parameters()} == {torch.float32}
    clean, masked = rows(own_gate(model))
    assert torch.equal(logits(model, clean), logits(base, clean))
    assert torch.equal(logits(model, masked)[:, :8], logits(base, clean)[:, :8])
    assert not torch.equal(logits(model, masked), logits(base, clean))


def test_what_it_decodes_by(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = look(adapter)
    assert (checkpoint.draft_tokens, checkpoint.adapted) == (3, False)
    assert checkpoint.mode(pb.DecodeConfig()) == "speculative"
    assert checkpoint.mode(pb.DecodeConfig(mode="autoregressive")) == "autoregressive"
    announce(checkpoint, pb.DecodeConfig())
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match=r"mode='diffusion': .*drafts for an AR model.*leave --mode out"):
        announce(checkpoint, pb.DecodeConfig(mode="diffusion"))


def test_a_base_is_found_wherever_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ar_checkpoint(tmp_path / "base", "llama", WORKS["llama"][1])
    monkeypatch.chdir(tmp_path)
    pb.save(*drafting("base"), "drafts")
    named = json.loads(Path("drafts/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path.resolve() / "base")
    assert "# Drafts for base" in Path("drafts/README.md").read_text()
    monkeypatch.chdir("/")
    assert own_gate(pb.load(tmp_path / "drafts")[0]).draft_tokens == 3
    # beside each other they may be moved, too
    change(tmp_path / "drafts" / "adapter_config.json", base_model_name_or_path="../base")
    (tmp_path / "moved").mkdir()
    for name in ("base", "drafts"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert own_gate(pb.load(tmp_path / "moved" / "drafts")[0]).draft_tokens == 3


def test_a_model_from_nowhere_has_no_base_to_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an adapter names its base, and this model does not say where"):
        pb.save(gated(ar_model()), pb.load("bundled-ar")[1], tmp_path / "drafts")
    assert not any(tmp_path.iterdir())


def without(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = load_file(path / "adapter_model.safetensors")
        save_file({key: t for key, t in tensors.items() if key != name}, path / "adapter_model.safetensors")

    return damage


def with_tensor(name: str, *shape: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = load_file(path / "adapter_model.safetensors")
        save_file({**tensors, name: torch.zeros(shape)}, path / "adapter_model.safetensors")

    return damage


def cut(path: Path) -> None:
    whole = (path / "adapter_model.safetensors").read_bytes()
    (path / "adapter_model.safetensors").write_bytes(whole[:5000])


def fields(**changes: Any) -> Callable[[Path], None]:
    return lambda path: change(path / "block_diffusion.json", **changes)


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda path: change(path / "adapter_config.json", **changes)


LAYER = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, r"adapter_model\.safetensors' is truncated or damaged"),
        (config(base_model_name_or_path=...), "names no base_model_name_or_path; add the base's path or id"),
        (config(base_model_name_or_path="/no/base"), r"the base of .*config.json' names: there is no checkpoint"),
        (config(base_model_name_or_path="bundled"), "the base bundled was adapted itself; name the AR model"),
        (fields(context="both"), r"block_diffusion\.json' has context='both', .*; use 'causal' or 'block'"),
        (fields(draft_tokens=...), "has draft_tokens=None, which is not a number of masks"),
        (fields(mask_embeddings=0), "has mask_embeddings=0, which is not a number of masks"),
        (fields(mask_embeddings=2), r"mask_embeddings in adapter_model.safetensors is \[3, .*names 2 of them"),
        (config(r=8), r"LoRA of model\.layers\.0\S* in .* is \[4, .*adapter_config.json has r=8"),
        (config(r=...), "adapter_config.json has no number r; .*copy all of them again"),
        (config(use_dora=True), "adapter_config.json has use_dora=True, a gate has False"),
        (without("mask_embeddings"), "adapter_model.safetensors has no tensor mask_embeddings"),
        (without(f"{LAYER}.lora_A.weight"), r"has no tensor \S*up_proj\.lora_A\.weight; .*copy all of them"),
        (with_tensor("lm_head.weight", 4), r"has a tensor lm_head\.weight, which is none of a gate's"),
        (with_tensor(f"{LAYER}.lora_A.weight", 4, 5), r"layer model\.layers\.0\.mlp\.up_proj does not fit this Qwen2"),
        (with_tensor("mask_embeddings", 3, 5), r"masks \(from id 640 on, 5 wide\) do not fit embeddings"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_named(damaged: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(damaged)
    with pytest.raises(ValueError, match=said) as caught:
        pb.load(damaged)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", ["stock", "standalone"])
def test_exports_keep_base_and_adapter(adapter: Path, tmp_path: Path, layout: str) -> None:
    model, _ = pb.load(adapter, dtype="auto")
    export_checkpoint(look(adapter), tmp_path / "new", layout)
    (tmp_path / "new").rename(tmp_path / "moved")
    again, base = pb.load(tmp_path / "moved" / "adapter", dtype="auto")[0], pb.load(tmp_path / "moved", dtype="auto")[0]
    assert gate_of(base) is None  # an ordinary checkpoint
    plain, _ = pb.load("bundled-ar", dtype="auto")
    assert base.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in plain.state_dict().items())
    assert torch.equal(logits(again, torch.tensor([MASKED])), logits(model, torch.tensor([MASKED])))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "moved")).__name__ == "Qwen2ForCausalLM"
    assert (tmp_path / "moved" / "README.md").read_text().startswith("# A language model that drafts")


def test_there_is_no_official_layout_of_an_adapter(adapter: Path, tmp_path: Path) -> None:
    said = "layout='official' has no place for an adapter that drafts; use stock or standalone"
    with pytest.raises(ValueError, match=said):
        export_checkpoint(look(adapter), tmp_path / "new", "official")
    with pytest.raises(ValueError, match=said):
        pb.export(*pb.load(adapter), tmp_path / "new", "official")
    assert not any(tmp_path.iterdir())


STANDALONE = """
import sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids = torch.tensor([[int(token) for token in sys.argv[1:]]])
model = AutoModelForCausalLM.from_pretrained("standalone", trust_remote_code=True, dtype="float32")
with torch.no_grad():
    logits = model(input_ids=ids, use_cache=False).logits
calls = []
model.register_forward_hook(lambda *call: calls.append(1))
out = model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=24, eos_token_id=None, draft_tokens=3)
torch.save((type(model).__name__, logits, out[0, 4:].tolist(), len(calls)), "logits.pt")
"""


def test_standalone_attaches_the_adapter_where_parablock_is_not_installed(adapter: Path, tmp_path: Path) -> None:
    model, tokenizer = pb.load(adapter)
    pb.export(model, tokenizer, tmp_path / "standalone", "standalone")
    run_without_parablock(STANDALONE, MASKED, tmp_path)
    name, got, tokens, forwards = torch.load(tmp_path / "logits.pt")
    assert name == "BlockDiffusionForCausalLM"
    expected = logits(model, torch.tensor([MASKED]))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    config = pb.DecodeConfig(max_new_tokens=24, stop_token_ids=(), mode="autoregressive")
    assert tokens == pb.generate(model, [5, 6, 7, 8], config).tokens[0]
    drafts = replace(config, mode="speculative", draft_tokens=3)
    assert forwards == pb.generate(model, [5, 6, 7, 8], drafts).forwards
    assert not torch.allclose(logits(pb.load("bundled-ar")[0], torch.tensor([[5, 6, 7, 3, 3, 3]])), got, atol=0.1)


def save_sharded(rank: int, folder: str) -> None:
    """One of two processes that share a model out."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model, tokenizer = drafting("bundled-ar", packed=False)
    fully_shard(model)
    assert hasattr(own_gate(model).embeddings, "full_tensor")
    pb.save(model, tokenizer, f"{folder}/sharded")
    distributed.barrier()
    distributed.destroy_process_group()


def test_a_sharded_gate_is_gathered(adapter: Path, tmp_path: Path) -> None:
    with (
        start_function(save_sharded, 0, str(tmp_path)) as first,
        start_function(save_sharded, 1, str(tmp_path)) as last,
    ):
        for running in (first, last):
            assert running.wait() == 0, running.err
    gathered, whole = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "sharded", adapter))
    assert gathered.keys() == whole.keys()
    assert all(torch.equal(gathered[name], whole[name]) for name in whole)
