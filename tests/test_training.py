"""The recipe: rows, the optimizer, and real short trainings with transformers' Trainer."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_model
from safetensors.torch import load_file

import parablock as pb
from parablock.checkpoints.load import BUNDLED
from parablock.data.chat import Sample
from parablock.training.optimizer import build_optimizer, orthogonalize
from parablock.training.rows import RowDataset, collate

CONFIG = pb.TrainConfig(
    steps=30, batch_size=8, micro_batch_size=4, context_length=32, block_size=8, optimizer="muon", lr=5e-3,
    muon_lr=2e-2, warmup_steps=2, log_every=10,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BUNDLED / "diffusion")


def samples(count: int) -> list[Sample]:
    """Prompts of five tokens, answers that count on from the last: learnable at once."""
    made = []
    for i in range(count):
        ids = [(7 * i + j) % 60 for j in range(5)] + [(7 * i + 5 + j) % 60 for j in range(6)] + [62]
        made.append(Sample(ids, [-100] * 5 + ids[5:]))
    return made


def rows(packing: bool, **changes: Any) -> RowDataset:
    return RowDataset(samples(6), replace(CONFIG, **{"packing": packing, "seed": 3, **changes}), 0)


def test_noise_does_not_depend_on_packing_or_order() -> None:
    single, packed = rows(False), rows(True)
    assert packed.groups is not None
    assert len(packed) == 3
    for number, group in enumerate(packed.groups):
        row = packed[number]
        for place, sample in enumerate(group):
            part = {k: v[16 * place : 16 * (place + 1)] for k, v in row.items() if k != "samples"}
            assert all(torch.equal(part[k], v) for k, v in single[sample].items())
            assert (row["samples"][2 * place : 2 * (place + 1)] == place).all()
    before = single[2]["noise_mask"]
    single.set_epoch(1)
    assert not torch.equal(before, single[2]["noise_mask"])
    assert torch.equal(rows(False)[2]["noise_mask"], before)
    assert not torch.equal(rows(False, seed=4)[2]["noise_mask"], before)


def test_collate_pads_on_the_right() -> None:
    batch = collate([rows(False)[0], rows(True)[0]], 61)
    assert batch["input_ids"].shape == (2, 32)
    assert (batch["input_ids"][0, 16:] == 61).all()
    assert (batch["labels"][0, 16:] == -100).all()
    assert not batch["noise_mask"][0, 16:].any()


def test_a_sample_longer_than_the_context_is_named() -> None:
    with pytest.raises(ValueError, match="sample 0 needs 16 tokens, more than the context of 8"):
        rows(False, context_length=8)[0]
    with pytest.raises(ValueError, match="no samples"):
        RowDataset([], CONFIG, 0)


def test_orthogonalize_pushes_singular_values_to_one() -> None:
    x = torch.randn(3, 12, 30)
    for matrices in (x, x.mT):
        values = torch.linalg.svdvals(orthogonalize(matrices))
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_muon_takes_the_hidden_matrices_and_nothing_else() -> None:
    model = small_model(tie_word_embeddings=True)
    optimizer = build_optimizer(model, lr=1e-3, muon_lr=1e-2, weight_decay=0.1)
    muon = {id(p) for p in optimizer.param_groups[0]["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in muon) == ("proj.weight" in name), name
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_adamw_half_equals_torch() -> None:
    ours, theirs = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    a = build_optimizer(ours, lr=0.01, muon_lr=0.1, weight_decay=0.0)
    b = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(5):
        x = torch.randn(8, 4)
        for model, optimizer in ((ours, a), (theirs, b)):
            model.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


@pytest.mark.parametrize("mode", ["autoregressive", "diffusion"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_training_lowers_the_loss(tokenizer: Any, tmp_path: Path, mode: Any, optimizer: Any) -> None:
    model = small_model(initializer_range=0.05, num_hidden_layers=1)
    config = replace(CONFIG, mode=mode, optimizer=optimizer, packing=mode == "diffusion")
    losses: list[float] = []

    def progress(step: int, logs: dict[str, float]) -> None:
        if "loss" in logs:
            losses.append(logs["loss"])

    pb.train(model, tokenizer, samples(60), config, tmp_path, progress=progress)
    assert len(losses) == 3
    assert losses[-1] < losses[0] * 0.9
    assert not model.training
    if mode == "diffusion":
        assert model.config.bd_size == 8


def test_answers_are_followed_by_masks_in_training(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """What follows an answer in its last block is masked while it is decoded, so it is in training."""
    from parablock.training import trainer

    seen: list[torch.Tensor] = []
    real = trainer.diffusion_loss

    def spy(model: Any, input_ids: torch.Tensor, labels: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(input_ids)
        return real(model, input_ids, labels, *args, **kwargs)

    monkeypatch.setattr(trainer, "diffusion_loss", spy)
    model = small_model()
    pb.train(model, tokenizer, samples(8), replace(CONFIG, steps=1, packing=False), tmp_path)
    assert (seen[0][:, 12:16] == model.config.mask_token_id).all()
    assert (seen[0][:, 11] == 62).all()


def test_accumulated_micro_batches_give_the_same_weights(tokenizer: Any, tmp_path: Path) -> None:
    weights = []
    for micro in (8, 2):
        model = small_model(initializer_range=0.05)
        config = replace(CONFIG, steps=3, micro_batch_size=micro, optimizer="adamw", packing=False)
        pb.train(model, tokenizer, samples(60), config, tmp_path / str(micro))
        weights.append(model.model.layers[0].mlp.up_proj.weight)
    torch.testing.assert_close(*weights, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_train_the_same_weights(tokenizer: Any, tmp_path: Path, optimizer: Any) -> None:
    """The same global batch, shared out over two real torchrun processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = [str(Path(__file__).parent / "train_worker.py"), str(tmp_path), optimizer]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    out = subprocess.run([*command, *worker], capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert out.returncode == 0, out.stderr
    model = small_model(initializer_range=0.05)
    config = replace(CONFIG, steps=3, optimizer=optimizer, packing=False)
    pb.train(model, tokenizer, samples(60), config, tmp_path / "single")
    shared = load_file(tmp_path / "weights.safetensors")
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, shared[name], atol=1e-4, rtol=1e-3)


def test_the_model_decodes_while_it_trains(tokenizer: Any, tmp_path: Path) -> None:
    model = small_model(initializer_range=0.05)
    answers: list[list[int]] = []

    def progress(step: int, logs: dict[str, float]) -> None:
        answers.append(pb.generate(model, [1, 2, 3], pb.DecodeConfig(max_new_tokens=5)).tokens[0])

    pb.train(model, tokenizer, samples(60), replace(CONFIG, steps=4, log_every=2), tmp_path, progress=progress)
    assert len(answers) == 3
    assert answers[-1] == pb.generate(model, [1, 2, 3], pb.DecodeConfig(max_new_tokens=5)).tokens[0]


def test_bf16_runs_the_loss_under_autocast(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from parablock.training import trainer

    seen: list[bool] = []
    real = trainer.diffusion_loss

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return real(*args, **kwargs)

    monkeypatch.setattr(trainer, "diffusion_loss", spy)
    model = small_model()
    pb.train(model, tokenizer, samples(8), replace(CONFIG, steps=1, bf16=True), tmp_path)
    assert seen
    assert all(seen)
    assert "forward" not in vars(model)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 64)


def test_an_interrupted_training_continues(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 4

    config = replace(CONFIG, steps=8, save_every=4)
    whole = pb.train(small_model(initializer_range=0.05), tokenizer, samples(60), config, tmp_path / "whole")
    model = small_model(initializer_range=0.05)
    pb.train(model, tokenizer, samples(60), config, tmp_path / "parts", callbacks=[Stop()])
    steps: list[int] = []
    again = small_model(initializer_range=0.05)
    with pytest.raises(ValueError, match="holds checkpoints; pass resume=True"):
        pb.train(again, tokenizer, samples(60), config, tmp_path / "parts")
    pb.train(
        again, tokenizer, samples(60), config, tmp_path / "parts", resume=True,
        progress=lambda step, logs: steps.append(step),
    )  # fmt: skip
    assert min(steps) > 4
    for a, b in zip(again.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_what_is_missing_is_named(tokenizer: Any, tmp_path: Path) -> None:
    model = small_model()
    del model.config.mask_token_id
    with pytest.raises(ValueError, match="mask_token_id is missing"):
        pb.train(model, tokenizer, samples(6), CONFIG, tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "both"}, "mode='both'"),
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 5, "micro_batch_size": 2}, "divisor of batch_size=5"),
        ({"context_length": 100, "block_size": 32}, "multiple of block_size=32"),
        ({"decay_share": 2.0}, "decay_share=2.0"),
        ({"lr": 0.0}, "lr="),
    ],
)
def test_bad_recipes_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pb.TrainConfig(**values)
