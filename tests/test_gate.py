"""The gate acts at masked positions and nowhere else: what the base computes elsewhere stays as it was, bit for bit."""

import copy
from typing import Any

import pytest
import torch
from conftest import ar_model
from test_architectures import WORKS
from transformers import AutoConfig, AutoModelForCausalLM

import parablock as pb
from parablock.diffusion.gate import Gate, attach, gate_of, new_gate

LENGTH, CLEAN, DRAFT = 12, 8, 3  # of a row: clean tokens, then a draft block of masks, then one clean token


def filled(gate: Gate, seed: int = 1) -> Gate:
    """With weights that change what masks predict."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for lora in gate.loras:
            lora.up.normal_(0, 0.3, generator=generator)
        gate.embeddings.add_(torch.randn(gate.embeddings.shape, generator=generator))
    return gate


def gated(base: Any) -> Any:
    """A copy of the model with a gate."""
    model = copy.deepcopy(base)
    attach(model, filled(new_gate(model, draft_tokens=DRAFT, rank=4, alpha=8)))
    return model


def rows(gate: Gate) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of clean tokens, and the same with masks."""
    clean = torch.randint(5, 60, (2, LENGTH))
    masked = clean.clone()
    masked[:, CLEAN : CLEAN + DRAFT] = torch.tensor(gate.mask_ids(DRAFT))
    return clean, masked


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> Any:
    return model(input_ids=ids, use_cache=False).logits


def assert_equal(got: torch.Tensor, expected: torch.Tensor, *, rounds: bool = False) -> None:
    """Bit for bit; `rounds`: but for the last digits."""
    torch.testing.assert_close(got, expected, atol=1e-5 if rounds else 0, rtol=0)


def assert_only_masks_differ(base: Any, model: Any, *, rounds: bool = False) -> None:
    """Without masks all is the base's; beside masks the tokens before them are, and the masks are not.

    `rounds`: the base itself rounds a token's sums in another order when other tokens are beside it.
    """
    gate = gate_of(model)
    assert gate is not None
    clean, masked = rows(gate)
    expected, got = logits(base, clean), logits(model, masked)
    assert_equal(logits(model, clean), expected)
    assert_equal(got[:, :CLEAN], expected[:, :CLEAN], rounds=rounds)
    before = got[:, CLEAN : CLEAN + DRAFT].clone()
    assert not torch.equal(before, expected[:, CLEAN : CLEAN + DRAFT])
    with torch.no_grad():  # what was learned is what masks say
        for lora in gate.loras:
            lora.up.mul_(2)
    again = logits(model, masked)
    assert_equal(again[:, :CLEAN], expected[:, :CLEAN], rounds=rounds)
    assert (again[:, CLEAN : CLEAN + DRAFT] != before).any(-1).all()


@pytest.mark.parametrize("kind", [kind for kind in WORKS if kind != "gpt2"])
def test_clean_tokens_are_the_base(kind: str) -> None:
    config = AutoConfig.for_model(kind.split()[0], **WORKS[kind][1])
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model = gated(base)
    gate = gate_of(model)
    assert gate is not None
    assert not any(".experts." in name for name in gate.targets)  # they see some of the tokens
    assert {name.split(".")[-1] for name in gate.targets}.isdisjoint({"lm_head", "embed_out", "gate"})
    experts = "num_experts_per_tok" in WORKS[kind][1]  # an expert's product is over the tokens that come to it
    assert_only_masks_differ(base, model, rounds=experts)


def test_a_model_without_linear_layers_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **WORKS["gpt2"][1]))
    with pytest.raises(ValueError, match="a GPT2LMHeadModel has no linear layers to put LoRA on"):
        new_gate(model, draft_tokens=2, rank=4, alpha=8)


@pytest.mark.parametrize("kind", ["packed", "bfloat16", "packed bfloat16", "int8"])
def test_clean_tokens_are_the_base_in_every_form_of_its_weights(kind: str) -> None:
    base = ar_model()
    base.to(torch.bfloat16 if "bfloat16" in kind else torch.float32)
    if kind != "bfloat16":
        pb.pack(base, int8=kind == "int8")
    model = gated(base)
    assert_only_masks_differ(base, model)
    gate = gate_of(model)
    assert {p.dtype for p in gate.parameters()} == {torch.float32}  # type: ignore[union-attr]


@pytest.mark.parametrize("int8", [False, True])
def test_a_model_packed_with_its_gate_keeps_it(int8: bool) -> None:
    model = gated(ar_model())
    base = ar_model()
    for each in (model, base):
        pb.pack(each, int8=int8)
    assert_only_masks_differ(base, model)


def test_clean_tokens_are_the_base_when_compiled() -> None:
    base = ar_model(num_hidden_layers=1)
    model = gated(base)
    gate = gate_of(model)
    assert gate is not None
    clean, masked = rows(gate)
    plain, compiled = logits(model, masked), torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, masked), plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(compiled, clean), logits(base, clean), atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(compiled, masked)[:, :CLEAN], logits(compiled, clean)[:, :CLEAN])


@pytest.mark.parametrize("kind", ["plain", "packed", "int8"])
def test_a_copy_has_a_gate_of_its_own(kind: str) -> None:
    base = ar_model()
    if kind != "plain":
        pb.pack(base, int8=kind == "int8")
    model = gated(base)
    gate = gate_of(model)
    assert gate is not None
    _, masked = rows(gate)
    before = logits(model, masked)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, masked), before)
    own = gate_of(other)
    assert own is not None
    assert own is not gate
    filled(own, seed=2)
    assert not torch.equal(logits(other, masked)[:, CLEAN], before[:, CLEAN])
    assert torch.equal(logits(model, masked), before)
    own.closed = True
    assert torch.equal(logits(model, masked), before)


def test_a_closed_gate_computes_nothing() -> None:
    base = ar_model()
    model = gated(base)
    gate = gate_of(model)
    assert gate is not None
    clean, _ = rows(gate)
    gate.closed = True
    assert torch.equal(logits(model, clean), logits(base, clean))
    assert gate.masked is None


def test_a_gate_begins_with_the_base_and_the_mean_token() -> None:
    base = ar_model()
    gate = new_gate(base, draft_tokens=2, rank=4, alpha=8, targets=["o_proj", "up_proj"])
    assert {name.split(".")[-1] for name in gate.targets} == {"o_proj", "up_proj"}
    assert len(gate.targets) == 4
    assert not any(lora.up.any() for lora in gate.loras)
    mean = base.get_input_embeddings().weight.mean(0)
    torch.testing.assert_close(gate.embeddings.data, mean.detach().expand(2, -1))
    assert gate.mask_ids(4) == [64, 65, 65, 65]
    attach(base, gate)
    assert [name for name, p in base.named_parameters() if p.requires_grad] == [
        f"draft_gate.{name}" for name, _ in gate.named_parameters()
    ]


def test_what_does_not_fit_is_named() -> None:
    model = ar_model()
    with pytest.raises(ValueError, match=r"no layers 'wo' to put LoRA on; choose of down_proj, gate_proj"):
        new_gate(model, draft_tokens=2, rank=4, alpha=8, targets=["wo"])
    gate = new_gate(model, draft_tokens=2, rank=4, alpha=8)
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.mlp\.gate_proj does not fit this Qwen2"):
        attach(ar_model(intermediate_size=48), gate)
    with pytest.raises(ValueError, match=r"masks \(from id 64 on, 32 wide\) do not fit embeddings of \[72, 32\]"):
        attach(ar_model(vocab_size=72), gate)
    attach(model, gate)
    with pytest.raises(ValueError, match="the model has a gate already; load its base to train another one"):
        new_gate(model, draft_tokens=2, rank=4, alpha=8)
