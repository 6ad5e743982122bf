"""Training and what else runs the loss, rehearsed for CUDA: flex attention, devices, one process each."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BASE, MODES, ROWS, D
from conftest import small_model
from rich.console import Console
from stand_in_cuda import FIRST, StandIn, moved, turned_on
from test_diffusion import random_batch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import one_hot
from transformers import TrainingArguments

import parablock as pb
from parablock.adapt import _load
from parablock.decoding.generate import resolve
from parablock.diffusion import flex, objective
from parablock.diffusion.masks import BlockLayout, block_layout
from parablock.diffusion.noise import complementary_views
from parablock.evals.likelihood import log_likelihood
from parablock.training import trainer
from parablock.training.config import AdaptConfig, TrainConfig
from parablock.training.optimizer import build_optimizer


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with turned_on(monkeypatch) as devices:
        yield devices


def units_of(seed: int) -> BlockLayout:
    size = (8, 32)[seed % 2]
    _, labels, noise = random_batch(seed, 1 + seed, 4 + 3 * seed, size, 0.6)
    return block_layout(*complementary_views(noise, labels), size)


@pytest.mark.parametrize("seed", range(4))
def test_the_block_mask_of_torch(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "MAX_PAIRS", 128 * 600)  # a few tiles at a time
    layout = units_of(seed)
    rules = {layout.flex_mask().mask_mod: layout.tokens, (lambda b, h, q, k: q >= k): 300}
    rules[lambda b, h, q, k: (q >= 0) & (k >= 0)] = 200 + seed  # whole tiles, but for what lies beyond the end
    for rule, tokens in rules.items():
        mine = flex.block_mask(rule, tokens, torch.device("cpu"))
        torchs = create_block_mask(rule, None, None, tokens, tokens, device="cpu")
        assert mine.seq_lengths == torchs.seq_lengths == (tokens, tokens)
        for name, tensor in vars(torchs).items():
            if isinstance(tensor, Tensor):
                assert torch.equal(getattr(mine, name), tensor), name
                assert getattr(mine, name).dtype == tensor.dtype == torch.int32


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_on_the_host() -> None:
    """Transformers' function and torch's own, forward, without the compiler."""
    model = small_model()
    ids, labels, noise = random_batch(1, 2, 24, 8, 0.6)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        losses = [
            pb.diffusion_loss(model, ids, labels, noise, block_size=8, mask_token_id=63, attention=attention)
            for attention in ("flex", "dense")
        ]
    torch.testing.assert_close(*losses)


@pytest.fixture
def plain_flex(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """In place of the kernel: products, and the mask as tiles and rule say. The dtypes that it is called with."""
    seen: list[torch.dtype] = []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        seen.extend((query.dtype, key.dtype, value.dtype))
        index = torch.arange(query.shape[2], device=query.device)
        sees = mask.mask_mod(index[0], index[0], index[:, None], index)
        sees = sees & tiles(mask)[index[:, None] // 128, index // 128]
        k, v = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        scores = (query @ k.mT * kwargs["scaling"]).masked_fill(~sees, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2), None

    monkeypatch.setattr("transformers.integrations.flex_attention.flex_attention_forward", attend)
    return seen


def tiles(mask: Any) -> Tensor:
    """Which tiles a kernel looks at: of each row of tiles, so many of the listed ones."""
    looked = torch.zeros_like(mask.kv_indices[0, 0], dtype=torch.bool)
    for count, listed in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)):
        first = torch.arange(listed.shape[-1], device=listed.device) < count[0, 0, :, None]
        looked = looked | (one_hot(listed[0, 0].long(), listed.shape[-1]) * first[..., None]).sum(1).bool()
    return looked


@pytest.mark.parametrize("attention", [None, "block", "dense"])
@pytest.mark.parametrize("samples", [None, [[0, 0, 1], [0, 1, 1]]])
def test_training_on_the_device(stand_in: StandIn, plain_flex: list[torch.dtype], attention: Any, samples: Any) -> None:
    """A step: both losses, the gradients, the optimizer."""
    model = small_model().train()
    there, batch = moved(model), random_batch(2, 2, 3, D, 0.8)
    for m, place in ((model, "cpu"), (there, FIRST)):
        ids, labels, noise = (x.to(place) for x in batch)
        rows: Any = {"block_size": D, "samples": None if samples is None else torch.tensor(samples).to(place)}
        loss = pb.diffusion_loss(m, ids, labels, noise, mask_token_id=63, attention=attention, **rows)
        (loss + objective.autoregressive_loss(m, ids, labels, **rows)).backward()
        build_optimizer(m, lr=1e-3, muon_lr=1e-2, weight_decay=0.1).step()
    assert bool(plain_flex) == (attention is None)  # what is chosen here
    for (name, expected), got in zip(model.named_parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(got.grad.cpu(), expected.grad, atol=1e-5, rtol=1e-4, msg=name)
        torch.testing.assert_close(got.detach().cpu(), expected.detach(), atol=1e-4, rtol=1e-4, msg=name)


def test_flex_attention_runs_in_half_precision(plain_flex: list[torch.dtype]) -> None:
    model = small_model()
    with torch.autocast("cpu", torch.bfloat16):
        pb.diffusion_loss(model, *random_batch(2, 2, 3, D, 0.8), block_size=D, mask_token_id=63, attention="flex")
    assert set(plain_flex) == {torch.bfloat16}


def test_likelihoods_on_the_device(stand_in: StandIn, plain_flex: list[torch.dtype]) -> None:
    model = small_model()
    there = moved(model)
    pairs = [(ROWS[0], ROWS[1][:3]), (ROWS[2], ROWS[0]), (ROWS[2], ROWS[3])]
    for mode in MODES:
        config = resolve(model, [[0]], replace(BASE, mode=mode))
        expected, got = (log_likelihood(m, pairs, config) for m in (model, there))
        assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
        assert [value for value, _ in got] == pytest.approx([value for value, _ in expected], rel=1e-4)
    assert plain_flex


def test_where_a_checkpoint_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    model, tokenizer = pb.load("bundled-ar", device="cpu")

    def load_model(checkpoint: Any, options: dict[str, Any], revision: Any) -> Any:
        given.append(options)
        return model, tokenizer

    monkeypatch.setattr("parablock.checkpoints.load._load_model", load_model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    pb.load()
    pb.load(device="cuda:1", dtype=torch.float16)
    pb.load(device_map="auto")
    _load(AdaptConfig(model="bundled-ar", data="word-problems"), Console(quiet=True))
    assert given == [
        {"dtype": "auto", "device_map": "cuda"},
        {"dtype": torch.float16, "device_map": "cuda:1"}, {"dtype": "auto", "device_map": "auto"},
        {"dtype": torch.float32, "device_map": "cuda:3"},  # a process of torchrun has a GPU of its own
    ]  # fmt: skip


def test_a_process_trains_on_one_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def setup(self: Any) -> torch.device:
        self._n_gpu = 8  # what the Trainer would share rows out to
        return torch.device("cpu")

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(setup))
    assert trainer._arguments(TrainConfig(), tmp_path)._n_gpu == 1
    model = small_model()
    assert trainer._checkpointed_attention(model) == "block"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert trainer._checkpointed_attention(model) == "flex"  # the Trainer will move it
