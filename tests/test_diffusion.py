"""Noise, masks and objective, against the golden vectors and against a plain second implementation."""

from typing import Any

import pytest
import torch
from conftest import small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from official_layout import additive, official_loss
from peft import LoraConfig, get_peft_model
from transformers import Qwen2ForCausalLM

import parablock as pb
from parablock.diffusion import objective
from parablock.diffusion.masks import block_causal_mask, block_diffusion_mask, block_layout
from parablock.diffusion.noise import complementary_views, mask_probability, sample_noise
from parablock.diffusion.objective import autoregressive_loss


def random_batch(seed: int, rows: int, blocks: int, D: int, share: float) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 62, (rows, blocks * D), generator=g)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=g) > share, -100)
    labels[:, 0] = -100
    labels[0, -1] = ids[0, -1]
    noise = torch.cat([sample_noise(blocks * D, D, seed=seed, epoch=0, sample=r)[None] for r in range(rows)])
    return ids, labels, noise


def test_golden_clean_logits(golden_model: Any, golden_tensors: dict[str, torch.Tensor]) -> None:
    mask = additive(block_causal_mask(96, 32))
    with torch.no_grad():
        logits = golden_model(golden_tensors["clean.input_ids"], attention_mask=mask).logits
    torch.testing.assert_close(logits, golden_tensors["clean.logits"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ["block", "dense"])
def test_golden_loss_and_gradients(golden_model: Any, golden_tensors: dict[str, torch.Tensor], attention: Any) -> None:
    golden_model.zero_grad()
    batch = [golden_tensors[f"train.{name}"] for name in ("input_ids", "labels", "noise_mask")]
    loss = pb.diffusion_loss(golden_model, *batch, block_size=32, mask_token_id=511, attention=attention)
    loss.backward()
    assert abs(loss.item() / golden_tensors["train.loss"].item() - 1) < 1e-5
    expected = {name[5:]: g for name, g in golden_tensors.items() if name.startswith("grad.")}
    assert len(expected) == 4
    for name, gradient in expected.items():
        assert (golden_model.get_parameter(name).grad - gradient).norm() <= 1e-4 * gradient.norm(), name
    golden_model.zero_grad()


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6), rows=st.integers(1, 3), blocks=st.integers(1, 4), share=st.sampled_from([0.1, 0.5, 1.0])
)
def test_loss_equals_the_published_layout(seed: int, rows: int, blocks: int, share: float) -> None:
    model = small_model().double()
    ids, labels, noise = random_batch(seed, rows, blocks, 8, share)
    expected = official_loss(model, ids, labels, noise, block_size=8, mask_token_id=63)
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    for attention in ("block", "dense"):
        model.zero_grad()
        loss = pb.diffusion_loss(model, ids, labels, noise, block_size=8, mask_token_id=63, attention=attention)
        loss.backward()
        assert abs(loss.item() / expected.item() - 1) < 1e-6
        for p, g in zip(model.parameters(), gradients, strict=True):
            assert (p.grad - g).norm() <= 1e-5 * g.norm() + 1e-9


def test_chunked_head_is_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    batch = random_batch(3, 2, 3, 8, 0.8)
    whole = pb.diffusion_loss(model, *batch, block_size=8, mask_token_id=63)
    whole.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    monkeypatch.setattr(objective, "MAX_LOGITS", 64 * 5)  # five positions at a time
    chunked = pb.diffusion_loss(model, *batch, block_size=8, mask_token_id=63)
    chunked.backward()
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(model.lm_head.weight.grad, gradient)


def test_gradient_checkpointing_trains_the_same() -> None:
    model = small_model().train()
    batch = random_batch(4, 2, 3, 8, 0.8)
    plain = pb.diffusion_loss(model, *batch, block_size=8, mask_token_id=63)
    plain.backward()
    gradient = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable()
    again = pb.diffusion_loss(model, *batch, block_size=8, mask_token_id=63)
    again.backward()
    torch.testing.assert_close(again, plain)
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.grad, gradient, atol=1e-5, rtol=1e-4)


def test_the_models_own_attention_is_restored() -> None:
    model = small_model()
    before = model.config._attn_implementation
    pb.diffusion_loss(model, *random_batch(5, 1, 2, 8, 1.0), block_size=8, mask_token_id=63)
    assert model.config._attn_implementation == before


def test_num_items_divides_the_sum() -> None:
    model = small_model()
    ids, labels, noise = random_batch(6, 2, 2, 8, 0.5)
    count = int((labels[:, 1:] != -100).sum())
    mean = pb.diffusion_loss(model, ids, labels, noise, block_size=8, mask_token_id=63)
    scaled = pb.diffusion_loss(model, ids, labels, noise, block_size=8, mask_token_id=63, num_items=2 * count)
    torch.testing.assert_close(scaled * 2, mean)


def test_prompt_only_blocks_get_no_noisy_copy() -> None:
    first = torch.zeros(1, 32, dtype=torch.bool)
    second = first.clone()
    first[0, 20], second[0, 21] = True, True  # one response block of four
    layout = block_layout(first, second, 8)
    assert layout.tokens == (2 + 1 + 1) * 8  # two clean blocks before it, one copy per view; not the block after it


@given(st.integers(1, 5), st.sampled_from([4, 8]), st.integers(1, 2))
def test_block_diffusion_mask_says_what_it_should(blocks: int, D: int, views: int) -> None:
    length = blocks * D
    mask = block_diffusion_mask(length, D, views)
    for q in range(0, (views + 1) * length, 3):
        for k in range((views + 1) * length):
            same_stream = q // length == k // length
            q_block, k_block = q % length // D, k % length // D
            clean_before = k // length == views and k_block < q_block
            assert mask[q, k] == ((same_stream and q_block == k_block) or clean_before)


def test_flex_mask_equals_the_dense_mask() -> None:
    _, labels, noise = random_batch(8, 3, 4, 8, 0.4)
    layout = block_layout(*complementary_views(noise, labels), 8)
    flex = layout.flex_mask()
    T = layout.tokens
    q, k = torch.meshgrid(torch.arange(T), torch.arange(T), indexing="ij")
    assert torch.equal(flex.mask_mod(torch.tensor(0), torch.tensor(0), q, k), layout.dense_mask()[0, 0])
    tiles = flex.to_dense()[0, 0].bool().repeat_interleave(128, 0).repeat_interleave(128, 1)[:T, :T]
    assert not (layout.dense_mask()[0, 0] & ~tiles).any()


@given(st.integers(0, 9), st.integers(0, 3), st.integers(0, 10**6), st.integers(1, 100))
def test_noise_depends_on_seed_epoch_and_sample(seed: int, epoch: int, sample: int, length: int) -> None:
    noise = sample_noise(length, 8, seed=seed, epoch=epoch, sample=sample)
    torch.rand(3)  # the global generator plays no part
    assert torch.equal(noise, sample_noise(length, 8, seed=seed, epoch=epoch, sample=sample))
    longer = [sample_noise(400, 8, seed=seed + a, epoch=epoch + b, sample=sample + c) for a, b, c in
              [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]  # fmt: skip
    assert all(not torch.equal(longer[0], other) for other in longer[1:])


def test_noise_has_the_right_distribution() -> None:
    blocks = torch.cat([sample_noise(32 * 50, 32, seed=0, epoch=0, sample=i).view(-1, 32) for i in range(80)])
    share = blocks.float().mean(1)
    assert abs(share.mean().item() - mask_probability(torch.tensor(0.5)).item()) < 0.02
    # with p uniform, the number of masked positions of a block is uniform on 0 .. 32
    counts = torch.bincount(blocks.sum(1), minlength=33) / len(blocks)
    assert counts.min() > 0.015
    assert counts.max() < 0.05


@given(st.integers(0, 10**6))
def test_views_are_complementary(seed: int) -> None:
    _, labels, noise = random_batch(seed, 2, 3, 8, 0.6)
    first, second = complementary_views(noise, labels)
    assert not (first & second).any()
    assert torch.equal(first | second, labels != -100)


def test_bad_input_is_named(model: Any) -> None:
    ids, labels, noise = random_batch(0, 1, 2, 8, 0.5)
    loss = lambda *a, **k: pb.diffusion_loss(model, *a, **{"block_size": 8, "mask_token_id": 63, **k})  # noqa: E731
    with pytest.raises(ValueError, match=r"multiple of 5"):
        loss(ids, labels, noise, block_size=5)
    with pytest.raises(ValueError, match="shape"):
        loss(ids, labels[:, :8], noise)
    with pytest.raises(ValueError, match="64 is outside the vocabulary"):
        loss(ids, labels, noise, mask_token_id=64)
    with pytest.raises(ValueError, match="no position of the batch has a label"):
        loss(ids, torch.full_like(labels, -100), noise)


def packed_and_apart(seed: int, blocks: list[int], D: int = 4) -> tuple[dict[str, torch.Tensor], list[tuple[Any, ...]]]:
    """Samples of `blocks` blocks: together in one row, and each as a row of its own."""
    parts = [random_batch(seed + i, 1, n, D, 0.6) for i, n in enumerate(blocks)]
    for _, labels, _ in parts:
        labels[:, 0] = -100  # nothing stands before it
    names = ("input_ids", "labels", "noise_mask")
    row = {name: torch.cat([part[i] for part in parts], 1) for i, name in enumerate(names)}
    row["samples"] = torch.repeat_interleave(torch.arange(len(blocks)), torch.tensor(blocks))[None]
    return row, parts


@given(st.integers(0, 10**6), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_isolated_samples_learn_as_if_alone(seed: int, blocks: list[int]) -> None:
    row, parts = packed_and_apart(seed, blocks)
    if not all((p[1] != -100).any() for p in parts):
        return
    model, fields = small_model(), {"block_size": 4, "mask_token_id": 63}
    with torch.no_grad():
        for attention in ("block", "dense"):
            together = pb.diffusion_loss(model, **row, **fields, num_items=1, attention=attention)
            apart = sum(pb.diffusion_loss(model, *p, **fields, num_items=1) for p in parts)
            torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-5)
        together = autoregressive_loss(
            model, row["input_ids"], row["labels"], samples=row["samples"], block_size=4, num_items=1
        )
        apart = sum(autoregressive_loss(model, p[0], p[1], block_size=4, num_items=1) for p in parts)
        torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-5)


def test_the_autoregressive_loss_is_the_models_own() -> None:
    model = small_model()
    ids, labels, _ = random_batch(3, 3, 4, 8, 0.5)
    with torch.no_grad():
        own = model(input_ids=ids, labels=labels).loss
        torch.testing.assert_close(autoregressive_loss(model, ids, labels, block_size=8), own)


def test_a_clean_context_for_first_tokens_is_what_decoding_has() -> None:
    """By hand: the logits at the end of the clean block predict the next block's first token."""
    model = small_model()
    ids, labels, _ = random_batch(5, 1, 3, 8, 1.0)
    everything = torch.ones_like(ids, dtype=torch.bool)
    fields = {"block_size": 8, "mask_token_id": 63}
    losses = {}
    with torch.no_grad():
        for context in ("noisy", "clean"):
            loss = pb.diffusion_loss(model, ids, labels, everything, **fields, num_items=1, first_token_context=context)
            losses[context] = loss
        mask = additive(block_diffusion_mask(24, 8))
        doubled = torch.cat([ids.masked_fill(labels != -100, 63), ids], 1)
        positions = torch.arange(24).repeat(2)[None]
        log_p = model(input_ids=doubled, attention_mask=mask, position_ids=positions).logits[0].log_softmax(-1)
    for context, stream in (("noisy", 0), ("clean", 24)):
        by_hand = 0.0
        for i in range(1, 24):
            source = i - 1 + (stream if i % 8 == 0 else 0)
            by_hand -= log_p[source, ids[0, i]].item()
        assert losses[context].item() == pytest.approx(by_hand, rel=1e-5)
    assert losses["clean"] != losses["noisy"]


def test_one_view_learns_only_what_it_masks() -> None:
    """`complementary=False`: labels only where the first view is masked leave the second view empty."""
    model = small_model()
    ids, labels, noise = random_batch(6, 2, 3, 8, 0.7)
    fields = {"block_size": 8, "mask_token_id": 63, "num_items": 1}
    shown = labels.masked_fill(~noise, -100)
    with torch.no_grad():
        first = pb.diffusion_loss(model, ids, shown, noise, **fields)
        second = pb.diffusion_loss(model, ids, labels.masked_fill(noise, -100), ~noise, **fields)
        torch.testing.assert_close(first + second, pb.diffusion_loss(model, ids, labels, noise, **fields))


class Halved(Qwen2ForCausalLM):
    """A stock model whose forward does to its logits what nothing in its config tells."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 2
        return output


def test_a_model_that_scales_its_logits_in_a_way_of_its_own_is_refused() -> None:
    ids, labels, noise = random_batch(0, 1, 2, 8, 0.5)
    losses = (
        lambda model: pb.diffusion_loss(model, ids, labels, noise, block_size=8, mask_token_id=63),
        lambda model: autoregressive_loss(model, ids, labels.clone(), block_size=8),
    )
    for dtype in (torch.float32, torch.bfloat16):
        stock = small_model().to(dtype)
        other = Halved(stock.config).to(dtype)
        adapter = get_peft_model(Halved(stock.config).to(dtype), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
        for loss in losses:
            assert loss(stock).isfinite()
            for model in (other, adapter):
                with pytest.raises(ValueError, match=r"qwen2.*its own logits are not those of its head.*logit_scale"):
                    loss(model)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_look_at_the_logits_leaves_no_trace(bf16: bool) -> None:
    """In the middle of a training step, with dropout, under autocast: the same random numbers and gradients."""
    ids, labels, noise = random_batch(0, 2, 4, 8, 0.5)

    def step(model: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, bf16):
            loss = pb.diffusion_loss(model, ids, labels, noise, block_size=8, mask_token_id=63)
        loss.backward()
        return torch.rand(3), [p.grad.clone() for p in model.parameters()]

    model = small_model(attention_dropout=0.5).train()
    looked, again = step(model), step(model)
    assert torch.equal(looked[0], again[0])
    assert all(torch.equal(first, second) for first, second in zip(looked[1], again[1], strict=True))
