"""The loss of causal context: against one dense sequence through the stock model, and what it must leave alone."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ar_model, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from official_layout import additive
from safetensors.torch import load_file
from test_windows import capped, windowed
from torch import Tensor
from torch.nn import functional as F
from train_worker import CONFIG, samples
from transformers import TrainerCallback

import parablock as pb
from parablock.checkpoints.named import BUNDLED
from parablock.data.chat import encode_chat
from parablock.data.word_problems import word_problem
from parablock.diffusion.drafting import accepted_drafts
from parablock.diffusion.gate import attach, gate_of, new_gate
from parablock.diffusion.support import layer_masks
from parablock.packed import PackedLinear

D = 8  # samples are aligned to it
MODELS: dict[str, Any] = {
    "stock": ar_model,
    "window 3": lambda: windowed(3),
    "window 13": lambda: windowed(13, full_layers=0),
    "capped": lambda: capped(tie_word_embeddings=False),
}


def gated(model: Any, k: int = 3, seed: int = 0) -> Any:
    """A model with a gate that changes something."""
    gate = new_gate(model, draft_tokens=k, rank=4, alpha=8)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in gate.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    attach(model, gate)
    return model


def batch(seed: int, blocks: list[list[int]]) -> dict[str, Tensor]:
    """Rows of samples of so many blocks, padded to the longest."""
    generator = torch.Generator().manual_seed(seed)
    width = max(map(sum, blocks))
    ids = torch.randint(0, 62, (len(blocks), width * D), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) > 0.7, -100)
    samples = torch.full((len(blocks), width), -1)
    for row, counts in enumerate(blocks):
        samples[row, : sum(counts)] = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        labels[row, sum(counts) * D :] = -100
    anchors = (torch.rand(ids.shape, generator=generator) > 0.6) & (samples >= 0).repeat_interleave(D, 1)
    anchors[0, 1] = True
    return {"input_ids": ids, "labels": labels, "anchors": anchors, "samples": samples}


def dense_loss(model: Any, rows: dict[str, Tensor], gamma: float) -> Tensor:
    """The definition: row by row, one sequence `[clean ; masks of all anchors]` and one mask for all its pairs."""
    fields = [rows[name] for name in ("input_ids", "labels", "anchors", "samples")]
    sums = [dense_sum(model, *row, gamma) for row in zip(*fields, strict=True)]
    return torch.stack(sums).sum() / rows["anchors"].sum()


def dense_sum(model: Any, ids: Tensor, labels: Tensor, anchors: Tensor, blocks: Tensor, gamma: float) -> Tensor:
    k, sample, total = gate_of(model).draft_tokens, blocks.repeat_interleave(D).tolist(), torch.zeros(())
    # a token: its place, the last clean token it sees, its draft block, its number there
    clean = [(i, i, None, 0) for i in range(len(ids))]
    masks = [(a + j, a, a, j) for a in anchors.nonzero()[:, 0].tolist() for j in range(1, k + 1)]
    tokens = clean + masks

    def sees(q: tuple[Any, ...], p: tuple[Any, ...]) -> bool:
        if p[2] is not None:
            return q[2] == p[2] and p[3] <= q[3]
        return sample[p[0]] == sample[q[1]] and p[0] <= q[1]

    seen = torch.tensor([[sees(q, p) for p in tokens] for q in tokens])
    position = torch.tensor([place - sample.index(sample[known]) for place, known, _, _ in tokens])

    def mask(window: int) -> Tensor:
        near = position[:, None] - position[None] < (window or 2 * len(tokens))
        return additive(seen & near).to(model.dtype)

    mask_ids = torch.tensor(gate_of(model).mask_ids(k)).repeat(len(masks) // k)
    logits = model(
        input_ids=torch.cat([ids, mask_ids])[None], position_ids=position[None],
        attention_mask=layer_masks(model.config, mask), use_cache=False,
    ).logits[0]  # fmt: skip
    for at, (place, anchor, _, j) in enumerate(masks, start=len(ids)):
        target = place + 1
        if target < len(ids) and sample[target] == sample[anchor] and labels[target] != -100:
            total = total + gamma ** (j - 1) * F.cross_entropy(logits[at], ids[target])
    return total


def compare(model: Any, rows: dict[str, Tensor], gamma: float = 0.85) -> None:
    double = copy.deepcopy(model).double()
    expected = dense_loss(double, rows, gamma)
    expected.backward()
    in_float = pb.draft_loss(model, **rows, block_size=D, gamma=gamma)
    torch.testing.assert_close(in_float, expected.float(), atol=1e-5, rtol=2e-6)
    truth = {name: p.grad for name, p in double.named_parameters()}
    double.zero_grad(set_to_none=True)
    loss = pb.draft_loss(double, **rows, block_size=D, gamma=gamma)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)
    for name, p in double.named_parameters():
        if "draft_gate" in name:
            assert (p.grad - truth[name]).norm() <= 1e-6 * max(1, truth[name].norm()), name
        else:
            assert p.grad is None, name


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_that_of_one_dense_sequence(name: str) -> None:
    compare(gated(MODELS[name]()), batch(1, [[2, 1], [1], [1, 1]]))


@settings(max_examples=10)
@given(
    st.integers(0, 10**6), st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=2), min_size=1, max_size=2),
    st.integers(1, 5), st.sampled_from([0.5, 1.0]),
)  # fmt: skip
def test_so_it_is_for_any_rows(seed: int, blocks: list[list[int]], k: int, gamma: float) -> None:
    compare(gated(ar_model(num_hidden_layers=1), k, seed), batch(seed, blocks), gamma)


def test_a_row_of_one_sample_needs_no_samples() -> None:
    model, rows = gated(ar_model()), batch(2, [[2], [2]])
    told = pb.draft_loss(model, **rows, block_size=D)
    del rows["samples"]
    torch.testing.assert_close(pb.draft_loss(model, **rows, block_size=D), told)


def test_packed_samples_learn_as_if_alone() -> None:
    model, rows = gated(ar_model()), batch(3, [[2, 1, 1]])
    together = pb.draft_loss(model, **rows, block_size=D, num_items=1)
    apart = torch.zeros(())
    for begin, end in ((0, 16), (16, 24), (24, 32)):
        part = {name: rows[name][:, begin:end] for name in ("input_ids", "labels", "anchors")}
        apart = apart + pb.draft_loss(model, **part, block_size=D, num_items=1)
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-5)


def test_clean_tokens_run_the_base_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = gated(ar_model(attention_dropout=0.5)).train(), batch(4, [[2]])
    decoder, seen = model.get_decoder(), []
    hook = decoder.register_forward_pre_hook(
        lambda *_: seen.append((gate_of(model).closed, torch.is_grad_enabled(), decoder.training))
    )
    pb.draft_loss(model, **rows, block_size=D)
    hook.remove()
    assert seen[:2] == [(True, False, False), (False, True, True)]
    assert model.training
    assert not gate_of(model).closed
    assert model.config._attn_implementation == "sdpa"


def test_accepted_drafts_are_the_models_own_tokens() -> None:
    model, rows = gated(ar_model(), k=2), batch(5, [[2, 1], [1]])
    fields = {name: rows[name] for name in ("input_ids", "anchors", "samples")}
    accepted = accepted_drafts(model, **fields, block_size=D)
    assert accepted.shape == (int(rows["anchors"].sum()), 2)
    assert not (accepted[:, 1] & ~accepted[:, 0]).any()
    # masks whose LoRA and embeddings bring nothing predict little; a head of equal rows predicts one token everywhere
    with torch.no_grad():
        model.lm_head.weight.zero_()
    place = rows["anchors"].nonzero()[:, 1]
    inside = rows["samples"].repeat_interleave(D, 1)
    row = rows["anchors"].nonzero()[:, 0]
    for j, column in enumerate(accepted_drafts(model, **fields, block_size=D).T, start=1):
        for r, a, right in zip(row.tolist(), place.tolist(), column.tolist(), strict=True):
            assert right == (a + j < inside.shape[1] and bool(inside[r, a + j] == inside[r, a]))


def test_bad_arguments_are_named() -> None:
    rows = batch(6, [[1]])
    with pytest.raises(ValueError, match="the model has no gate"):
        pb.draft_loss(small_model(), **rows, block_size=D)
    model = gated(ar_model())
    with pytest.raises(ValueError, match=r"share one shape \[B, L\], got .*\(1, 4\)"):
        pb.draft_loss(model, **{**rows, "anchors": rows["anchors"][:, :4]}, block_size=D)
    with pytest.raises(ValueError, match="no anchor"):
        pb.draft_loss(model, **{**rows, "anchors": rows["anchors"] & False}, block_size=D)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BUNDLED / "diffusion")


CAUSAL = replace(CONFIG, context="causal", optimizer="adamw", anchors=4, lr=2e-2)


def fresh() -> Any:
    """A small model with a gate that changes nothing yet."""
    model = ar_model(initializer_range=0.05)
    attach(model, new_gate(model, draft_tokens=3, rank=4, alpha=8))
    return model


def test_training_lowers_the_loss_and_leaves_the_base_alone(tmp_path: Path) -> None:
    model, tokenizer = pb.load("bundled-ar", device="cpu")
    base = copy.deepcopy(model)
    attach(model, new_gate(model, draft_tokens=2, rank=8, alpha=8))
    chats = [encode_chat(tokenizer, word_problem("train", 7, i).messages()) for i in range(64)]
    config = replace(
        CAUSAL, draft_tokens=2, anchors=16, context_length=256, steps=12, batch_size=4, lr=5e-3, log_every=3
    )
    losses: list[float] = []
    progress = lambda _, logs: losses.append(logs["loss"]) if "loss" in logs else None  # noqa: E731
    pb.train(model, tokenizer, chats, config, tmp_path, progress=progress)
    assert losses[-1] < 0.8 * losses[0]
    learned, before = model.state_dict(), base.state_dict()
    assert all(torch.equal(weight, learned[name]) for name, weight in before.items())
    assert any(isinstance(layer, PackedLinear) for layer in model.modules())  # what is frozen stays packed
    assert getattr(model.config, "bd_size", None) is None
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, base(ids).logits)


def test_an_interrupted_training_ends_with_the_same_bits(tokenizer: Any, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 4

    config = replace(CAUSAL, steps=8, save_every=4)
    whole = pb.train(fresh(), tokenizer, samples(60), config, tmp_path / "whole")
    pb.train(fresh(), tokenizer, samples(60), config, tmp_path / "parts", callbacks=[Stop()])
    written = load_file(tmp_path / "parts" / "checkpoint-4" / "model.safetensors")
    gate = gate_of(whole)
    assert gate is not None
    assert written.keys() == gate.state_dict().keys()  # and nothing of the base
    again = pb.train(fresh(), tokenizer, samples(60), config, tmp_path / "parts", resume=True)
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in whole.named_parameters())


def test_accumulated_rows_and_checkpointed_layers_train_the_same(tokenizer: Any, tmp_path: Path) -> None:
    trained = []
    for changes in ({}, {"micro_batch_size": 2}, {"gradient_checkpointing": True}):
        config = replace(CAUSAL, steps=3, **changes)
        model = pb.train(fresh(), tokenizer, samples(60), config, tmp_path / str(changes))
        trained.append(gate_of(model))
    for other in trained[1:]:
        for a, b in zip(trained[0].parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_what_would_be_trained_wrongly_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model has none; attach"):
        pb.train(ar_model(), tokenizer, samples(6), CAUSAL, tmp_path)
    with pytest.raises(ValueError, match=r"draft_tokens=5 .* fills 3 at once"):
        pb.train(fresh(), tokenizer, samples(6), replace(CAUSAL, draft_tokens=5), tmp_path)
    model = fresh().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing would run layers again"):
        pb.draft_loss(model, **batch(6, [[1]]), block_size=D)
