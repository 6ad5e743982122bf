"""The recipe: rows, the optimizer, and real short trainings with transformers' Trainer."""

import copy
import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import train_worker
from conftest import small_model
from processes import start_function
from safetensors.torch import load_file
from torch.distributed import TCPStore
from train_worker import CONFIG, samples

import parablock as pb
from parablock.checkpoints.named import BUNDLED
from parablock.training.optimizer import build_optimizer, orthogonalize
from parablock.training.rows import RowDataset, collate


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BUNDLED / "diffusion")


def rows(packing: bool, **changes: Any) -> RowDataset:
    return RowDataset(samples(6), replace(CONFIG, **{"packing": packing, "seed": 3, **changes}), 0)


def test_noise_does_not_depend_on_packing_or_order() -> None:
    single, packed = rows(False), rows(True)
    assert len(packed.groups) == 3
    for number, group in enumerate(packed.groups):
        row = packed.row(number, epoch=0)
        for place, sample in enumerate(group):
            part = {k: v[16 * place : 16 * (place + 1)] for k, v in row.items() if k != "samples"}
            assert all(torch.equal(part[k], v) for k, v in single.row(sample, epoch=0).items())
            assert (row["samples"][2 * place : 2 * (place + 1)] == place).all()
    before = single.row(2, epoch=0)["noise_mask"]
    assert not torch.equal(before, single.row(2, epoch=1)["noise_mask"])
    assert not torch.equal(rows(False, seed=4).row(2, epoch=0)["noise_mask"], before)


def test_a_run_is_one_order_of_rows() -> None:
    run = rows(False, steps=3, batch_size=4, micro_batch_size=4)
    assert len(run) == 12
    epochs = [sorted(run[i]["input_ids"][0].item() for i in range(start, start + 6)) for start in (0, 6)]
    assert epochs[0] == epochs[1]  # every sample once per epoch
    first = [run[i]["input_ids"].tolist() for i in range(12)]
    assert first[:6] != first[6:]  # in another order
    assert [rows(False, steps=3, batch_size=4, micro_batch_size=4)[i]["input_ids"].tolist() for i in range(12)] == first


def test_the_switches_of_a_row() -> None:
    whole = rows(True).row(0, epoch=0)
    assert (whole["labels"].view(2, 16)[:, 0] == -100).all()
    one_view = rows(True, complementary=False).row(0, epoch=0)
    assert torch.equal(one_view["labels"], whole["labels"].masked_fill(~whole["noise_mask"], -100))
    assert "samples" not in rows(True, isolate_samples=False).row(0, epoch=0)
    shared = rows(True, isolate_samples=False, block_padding=False)
    assert [len(group) for group in shared.groups] == [2, 2, 2]
    row = shared.row(0, epoch=0)
    first, second = (samples(6)[number].input_ids for number in shared.groups[0])
    assert row["input_ids"].tolist() == [*first, *second]  # 24 tokens: no padding between, and none needed after


def test_anchors_are_drawn_from_the_answers_by_epoch_and_sample() -> None:
    run = rows(True, context="causal", optimizer="adamw", anchors=3)
    seen = set()
    for epoch in range(20):
        row = run.row(0, epoch)
        assert "noise_mask" not in row
        assert int(row["anchors"].sum()) == 3
        seen |= set(row["anchors"].nonzero()[:, 0].tolist())
        assert torch.equal(row["anchors"], run.row(0, epoch)["anchors"])
    # a sample is 5 tokens of prompt and 7 of answer, padded to 16: the token after the next one is to be learned
    assert seen == {*range(3, 10), *range(19, 26)}
    alone = rows(False, context="causal", optimizer="adamw", anchors=99)
    assert int(alone.row(0, 0)["anchors"].sum()) == 7
    batch = collate([alone.row(0, 0), run.row(0, 0)], 61)
    assert batch["anchors"].shape == (2, 32)
    assert not batch["anchors"][0, 16:].any()


def test_collate_pads_on_the_right() -> None:
    batch = collate([rows(False).row(0, epoch=0), rows(True, isolate_samples=False).row(0, epoch=0)], 61)
    assert batch["input_ids"].shape == (2, 32)
    assert (batch["input_ids"][0, 16:] == 61).all()
    assert (batch["labels"][0, 16:] == -100).all()
    assert not batch["noise_mask"][0, 16:].any()


def test_a_sample_longer_than_the_context_is_named() -> None:
    with pytest.raises(ValueError, match="sample 0 needs 16 tokens, more than the context of 8"):
        rows(False, context_length=8).row(0, epoch=0)
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


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_worker(folder: Path, changes: dict[str, Any], *flags: str, processes: int = 1) -> dict[str, torch.Tensor]:
    """Train to the end, in a process of its own or in several; returns the weights."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0,
    }  # fmt: skip
    with ExitStack() as stack:
        workers = []
        for rank in range(processes):
            # what torchrun tells its processes
            told = {**shared, "RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
            environment = {**ENVIRONMENT, **{name: str(value) for name, value in told.items()}}
            arguments = [str(folder), json.dumps(changes), *flags]
            workers.append(stack.enter_context(start_function(train_worker.main, arguments, environment=environment)))
        for running in workers:
            assert running.wait() == 0, running.err
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "packing": False},
        {"optimizer": "muon", "packing": False},
        {"optimizer": "adamw", "ar_loss_weight": 0.5},
        {"optimizer": "adamw", "fsdp": True},
        {"optimizer": "adamw", "context": "causal", "anchors": 4},
        {"optimizer": "adamw", "context": "causal", "anchors": 4, "fsdp": True},
    ],
    ids=["ddp", "ddp-muon", "ddp-packed-with-ar-loss", "fsdp2", "ddp-causal", "fsdp2-causal"],
)
def test_two_processes_train_as_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The same global batch, shared out over two real processes: same losses, same weights."""
    changes = {"steps": 4, "log_every": 1, **changes}
    shared = run_worker(tmp_path / "two", changes, processes=2)
    alone = run_worker(tmp_path / "one", {**changes, "fsdp": False})
    for name, p in alone.items():
        torch.testing.assert_close(p, shared[name], atol=1e-4, rtol=1e-3)
    losses = [json.loads((tmp_path / name / "losses.json").read_text()) for name in ("one", "two")]
    assert losses[0].keys() == losses[1].keys() == {"1", "2", "3", "4"}
    for step, loss in losses[0].items():
        assert losses[1][step] == pytest.approx(loss, rel=1e-4)


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


def test_only_an_adaptation_adds_mask_token_and_block_size(tokenizer: Any, tmp_path: Path) -> None:
    for mode, expected in (("autoregressive", (None, None)), ("diffusion", (8, tokenizer.mask_token_id))):
        model = small_model()
        model.config.bd_size = model.config.mask_token_id = None
        pb.train(model, tokenizer, samples(6), replace(CONFIG, mode=mode, steps=1), tmp_path / mode)
        assert (model.config.bd_size, model.config.mask_token_id) == expected
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        pb.train(model, tokenizer, samples(6), replace(CONFIG, mode="autoregressive"), tmp_path / "unpadded")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "both"}, "mode='both'"),
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 5, "micro_batch_size": 2}, "divisor of batch_size=5"),
        ({"context_length": 100, "block_size": 32}, "multiple of block_size=32"),
        ({"decay_share": 2.0}, "decay_share=2.0"),
        ({"lr": 0.0}, "lr="),
        ({"context": "both"}, "context='both'"),
        ({"context": "causal", "optimizer": "muon"}, "optimizer='muon'"),
        ({"context": "causal", "mode": "autoregressive"}, "mode='autoregressive' .* context='causal' needs"),
        ({"context": "causal", "ar_loss_weight": 0.5}, "ar_loss_weight=0.5 .* belongs to block context"),
        ({"context": "causal", "gamma": 0.0}, "gamma=0.0"),
    ],
)
def test_bad_recipes_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pb.TrainConfig(**values)


@pytest.mark.parametrize("ar_loss_weight", [0.0, 0.5])
def test_gradient_checkpointing_trains_the_same_weights(tokenizer: Any, tmp_path: Path, ar_loss_weight: float) -> None:
    weights = []
    for on in (False, True):
        model = small_model(initializer_range=0.05)
        before = model.config._attn_implementation
        config = replace(CONFIG, steps=3, optimizer="adamw", gradient_checkpointing=on, ar_loss_weight=ar_loss_weight)
        pb.train(model, tokenizer, samples(60), config, tmp_path / str(on))
        weights.append(model.model.layers[0].mlp.up_proj.weight)
        assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        assert model.config._attn_implementation == before
    torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-4)


def test_the_cosine_schedule_ends_at_zero(tokenizer: Any, tmp_path: Path) -> None:
    rates: list[float] = []
    config = replace(CONFIG, steps=10, schedule="cosine", log_every=1, optimizer="adamw")
    progress = lambda _, logs: rates.append(logs["learning_rate"]) if "learning_rate" in logs else None  # noqa: E731
    pb.train(small_model(), tokenizer, samples(60), config, tmp_path, progress=progress)
    assert max(rates) == config.lr
    assert rates[-1] < 0.05 * config.lr
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_tensorboard_gets_the_losses(tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    pb.train(small_model(), tokenizer, samples(60), replace(CONFIG, steps=3, report_to=("tensorboard",)), tmp_path)
    assert list(tmp_path.rglob("events.out.tfevents*"))
