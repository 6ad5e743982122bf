"""Packed weights: the same products, from outside, given back; and what 8 bits keep."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BASE, ROWS
from conftest import small_model
from safetensors.torch import load_file
from torch import nn

import parablock as pb
from parablock import packed
from parablock.checkpoints import load as loading
from parablock.packed import Int8Linear, PackedLinear

MODES = ("diffusion", "autoregressive")


@pytest.fixture(autouse=True)
def _no_layer_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SMALL", 0)


@pytest.fixture
def model() -> Any:
    return small_model()


def kinds(model: Any) -> set[type]:
    return {type(layer) for layer in model.modules() if isinstance(layer, (nn.Linear, Int8Linear))}


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def assert_same(model: Any, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("mode", MODES)
def test_packed_weights_give_the_same_tokens(model: Any, mode: Any) -> None:
    config = replace(BASE, mode=mode)
    expected = pb.generate(model, ROWS, config).tokens
    pb.pack(model)
    assert kinds(model) == {PackedLinear}
    assert pb.generate(model, ROWS, config).tokens == expected
    with pb.Engine(model) as engine:
        assert engine.generate(ROWS, config).tokens == expected


def test_small_layers_are_packed_for_many_tokens_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SMALL", 2**17)
    layer = model.model.layers[0].mlp.up_proj
    weight = layer.weight
    pb.pack(model)
    ran: list[int] = []
    product = PackedLinear.product
    monkeypatch.setattr(PackedLinear, "product", lambda self, x: ran.append(x.shape[-2]) or product(self, x))
    for tokens in (1, 2000):
        x = torch.randn(1, tokens, layer.in_features)
        assert torch.allclose(layer(x), nn.functional.linear(x, weight), atol=1e-5)
    assert ran == [2000]
    assert layer.weight is weight


@pytest.mark.skipif(" " in torch.__file__, reason="torch.compile builds nothing where torch's own path has a space")
def test_compiled_engines_of_packed_and_rounded_models() -> None:
    model = small_model(num_hidden_layers=1)
    rounded = copy.deepcopy(model)
    pb.pack(model)
    pb.pack(rounded, int8=True)
    for packed_model in (model, rounded):
        expected = pb.generate(packed_model, ROWS[:3], BASE).tokens
        with pb.Engine(packed_model, pb.EngineConfig(compile=True)) as engine:
            assert engine.generate(ROWS[:3], BASE).tokens == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_the_plain_weights_come_back_and_whoever_holds_them_keeps_them(dtype: torch.dtype, tied: bool) -> None:
    model = small_model(tie_word_embeddings=tied).to(dtype)
    before, held = weights(model), list(model.parameters())
    count = model.num_parameters()
    pb.pack(model)
    pb.pack(model)  # once more changes nothing
    assert (model.num_parameters(), model.dtype) == (count, dtype)
    assert_same(model, before)  # as plain weights
    assert model.lm_head.weight.is_mkldnn == (not tied)  # what the embedding shares stays, what it does not is not kept
    assert model.model.layers[0].mlp.up_proj.weight.is_mkldnn
    pb.unpack(model)
    assert kinds(model) == {nn.Linear}
    assert_same(model, before)
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))


def test_what_is_trained_is_unpacked_and_learns(model: Any) -> None:
    model.requires_grad_(True)
    pb.pack(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # made before training begins
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"packed weights are not trained; call model\.train\(\)"):
        model(torch.tensor([ROWS[0]])).logits.sum().backward()
    model.train()
    assert kinds(model) == {nn.Linear}
    model(torch.tensor([ROWS[0]])).logits.square().mean().backward()
    optimizer.step()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(model.state_dict()[name], before[name])


def test_frozen_layers_stay_packed_in_training(model: Any) -> None:
    model.requires_grad_(False)
    plain = copy.deepcopy(model)
    pb.pack(model)
    model.train()
    assert kinds(model) == {PackedLinear}
    gradients = []
    for one in (plain, model):
        embedded = one.get_input_embeddings()(torch.tensor([ROWS[0]])).requires_grad_(True)
        loss = one(inputs_embeds=embedded).logits.logsumexp(-1).sum()
        gradients.append(torch.autograd.grad(loss, embedded)[0])
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.tensor([ROWS[0]])).logits.isfinite().all()


def test_a_trained_bias_over_a_frozen_weight() -> None:
    layer = nn.Sequential(nn.Linear(8, 4))
    layer[0].weight.requires_grad_(False)
    pb.pack(layer.eval())
    with pytest.raises(RuntimeError, match="packed weights are not trained"):
        layer(torch.randn(2, 8)).sum().backward()
    layer.train()(torch.randn(2, 8)).sum().backward()
    assert torch.equal(layer[0].bias.grad, torch.full((4,), 2.0))


def test_copies_other_dtypes_and_what_is_saved(tmp_path: Path) -> None:
    model = small_model(tie_word_embeddings=True)
    before = weights(model)
    pb.pack(model)
    again = copy.deepcopy(model)
    assert kinds(again) == {PackedLinear}
    assert again.lm_head.weight is again.get_input_embeddings().weight  # as tied as it was
    with torch.no_grad():
        again.model.layers[0].mlp.up_proj.packed.zero_()
    assert_same(model, before)  # and a layer of its own
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert kinds(half) == {PackedLinear}
    assert half.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == before.keys() - {"lm_head.weight"}
    assert all(torch.equal(saved[name], before[name]) for name in saved)


def test_adapters_over_packed_weights_are_merged(model: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    _, tokenizer = pb.load("bundled")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    pb.export(adapted, tokenizer, tmp_path / "plain")
    pb.pack(adapted)
    adapted.train()
    trained = {type(m) for name, m in adapted.named_modules() if name.endswith(("lora_A.default", "lora_B.default"))}
    frozen = {type(m) for name, m in adapted.named_modules() if name.endswith("base_layer")}
    assert (trained, frozen) == ({nn.Linear}, {PackedLinear})
    pb.export(adapted, tokenizer, tmp_path / "packed")
    plain, packed_ = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "packed"))
    assert plain.keys() == packed_.keys()
    assert all(torch.equal(plain[name], packed_[name]) for name in plain)


def test_a_mask_token_can_be_added_to_a_packed_model(tmp_path: Path) -> None:
    from test_checkpoints import ar_checkpoint

    model, tokenizer = pb.load(ar_checkpoint(tmp_path / "ar", 604))
    assert kinds(model) == {PackedLinear}
    pb.prepare(model, tokenizer)
    assert model(torch.tensor([[1, tokenizer.mask_token_id]])).logits.shape[-1] >= 605


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bits_are_close_and_a_token_does_not_see_its_neighbours(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 64, dtype=dtype)
    rounded = Int8Linear(layer)
    x = torch.randn(7, 96, dtype=dtype) * torch.logspace(-3, 3, 7)[:, None].to(dtype)
    with torch.no_grad():
        exact, got = layer(x).float(), rounded(x)
        assert got.dtype == dtype
        for i in range(7):
            assert torch.equal(got[i : i + 1], rounded(x[i : i + 1]))
    error = (got.float() - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.max() < 0.03
    assert torch.equal(rounded(x[:1] * 0).float(), layer.bias[None].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_weights_can_be_rounded(model: Any, dtype: torch.dtype) -> None:
    pb.pack(model.to(dtype))
    pb.pack(model, int8=True)
    assert kinds(model) == {Int8Linear}


def test_8_bits_are_for_good(model: Any, tmp_path: Path) -> None:
    pb.pack(model, int8=True)
    assert kinds(model) == {Int8Linear}
    pb.unpack(model)
    assert kinds(model) == {Int8Linear}
    with pytest.raises(ValueError, match="8-bit weights cannot be trained; load the checkpoint with another dtype"):
        model.train()
    with pytest.raises(ValueError, match="8-bit weights are not saved"):
        model.save_pretrained(tmp_path)
    assert pb.generate(copy.deepcopy(model), ROWS, BASE).tokens == pb.generate(model, ROWS, BASE).tokens
    layer = model.model.layers[0].mlp.up_proj
    with pytest.raises(RuntimeError, match="8-bit weights have no derivatives"):
        layer(torch.randn(1, layer.in_features, requires_grad=True))


def test_what_a_model_is_loaded_as(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kinds(pb.load("bundled")[0]) == {PackedLinear}
    assert kinds(pb.load("bundled", packed=False)[0]) == {nn.Linear}
    assert kinds(pb.load("bundled", dtype="int8")[0]) == {Int8Linear}
    for large, fast, dtype in (
        (10**9, True, torch.float32),
        (1, False, torch.float32),
        (1, True, torch.bfloat16),
    ):
        monkeypatch.setattr(loading, "LARGE", large)
        monkeypatch.setattr(packed, "bf16_is_fast", lambda fast=fast: fast)
        assert pb.load("bundled")[0].dtype == dtype
    assert pb.load("bundled", dtype="float32")[0].dtype == torch.float32
    with pytest.raises(ValueError, match="dtype 'int4' is unknown; use 'float32', 'bfloat16'"):
        pb.load("bundled", dtype="int4")
    with pytest.raises(ValueError, match="dtype='int8' is for a CPU, and the model goes to 'meta'"):
        pb.load("bundled", dtype="int8", device="meta")


def test_without_onednn_all_stays_as_it_is(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    pb.pack(model)
    assert kinds(model) == {nn.Linear}
    with pytest.raises(ValueError, match="int8 needs a torch with oneDNN"):
        pb.pack(model, int8=True)


@pytest.mark.skipif(not packed.bf16_is_fast(), reason="this processor multiplies bfloat16 otherwise")
@pytest.mark.parametrize("inputs", [576, 1536])
def test_a_token_does_not_see_how_many_run_beside_it(inputs: int) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(inputs, 192, bias=False, dtype=torch.bfloat16))
    pb.pack(layer)
    x = torch.randn(96, inputs, dtype=torch.bfloat16)
    with torch.no_grad():
        together = layer(x)
        for width in (1, 2, 5, 8):
            apart = torch.cat([layer(part) for part in x.split(width)])
            assert torch.equal(apart, together), width
