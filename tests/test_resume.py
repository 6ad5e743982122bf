"""Trainings that are killed, stopped, starved of disk or lost: what is left is whole, and going on ends the same."""

import json
import random
import resource
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import train_worker
from conftest import small_model
from processes import start_function, start_program
from test_training import ENVIRONMENT, run_worker
from train_worker import CONFIG, samples
from transformers import AutoTokenizer, TrainerCallback

import parablock as pb
from parablock.checkpoints.named import BUNDLED
from parablock.training.guards import TrainingStoppedError, checkpoints

LONG: dict[str, Any] = {"steps": 24, "log_every": 1, "save_every": 2, "optimizer": "adamw"}


def run_until(
    folder: Path, step: int, how: int, *flags: str, processes: int = 1, changes: dict[str, Any] = LONG
) -> int:
    """Start the worker, alone or under torchrun, send it a signal once it has reported `step`; the exit status."""
    arguments = [str(folder), json.dumps(changes), *flags]
    if processes == 1:
        started = start_function(train_worker.main, arguments, environment=ENVIRONMENT)
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        command = [sys.executable, *launcher, train_worker.__file__, *arguments]
        started = start_program(command, environment=ENVIRONMENT)
    with started as process:
        process.wait_for(f"^STEP {step}$")
        process.send_signal(how)
        return process.wait()


def test_killed_at_random_steps_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = run_worker(tmp_path / "whole", LONG)
    draw = random.Random(0)
    for step in (draw.randint(3, 8), draw.randint(11, 20)):
        assert run_until(tmp_path / "killed", step, signal.SIGKILL, "--resume") == -signal.SIGKILL
        assert not (tmp_path / "killed" / "model").exists()
    # what a kill in the middle of a write leaves is not resumed from
    newest = checkpoints(tmp_path / "killed" / "run")[-1]
    broken = newest.with_name("checkpoint-23")
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"half")
    again = run_worker(tmp_path / "killed", LONG, "--resume")
    assert not broken.exists()
    for name, p in whole.items():
        assert torch.equal(p, again[name]), name


@pytest.mark.parametrize(
    ("processes", "changes"),
    [(1, {}), (2, {"fsdp": True}), (2, {"fsdp": True, "context": "causal"})],
    ids=["alone", "fsdp2", "fsdp2-causal"],
)
def test_sigterm_ends_with_a_checkpoint_and_nothing_is_lost(
    tmp_path: Path, processes: int, changes: dict[str, Any]
) -> None:
    changes = {**LONG, "steps": 12, **changes}
    assert run_until(tmp_path / "stopped", 5, signal.SIGTERM, processes=processes, changes=changes) == 1
    newest = checkpoints(tmp_path / "stopped" / "run")[-1]
    assert 5 <= int(newest.name.split("-")[1]) < 12
    again = run_worker(tmp_path / "stopped", changes, "--resume", processes=processes)
    for name, p in run_worker(tmp_path / "whole", changes, processes=processes).items():
        assert torch.equal(p, again[name]), name


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                model.lm_head.weight.data[0, 0] = float("nan")

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "diffusion")
    config = replace(CONFIG, steps=12, save_every=2, log_every=20)
    model = small_model(initializer_range=0.05)
    with pytest.raises(ValueError, match=r"no longer finite after step 6; lower the learning.*last good.*checkpoint-4"):
        pb.train(model, tokenizer, samples(60), config, tmp_path, callbacks=[Poison()])
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    model = small_model(initializer_range=0.05)
    config = replace(config, log_every=1, save_every=0)
    with pytest.raises(ValueError, match=r"the loss is nan at step 6.*No checkpoint was written"):
        pb.train(model, tokenizer, samples(60), config, tmp_path / "b", callbacks=[Poison()])


class FullDisk(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:  # from now on no file can grow beyond 20 kB
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def train_on_a_full_disk(folder: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "diffusion")
    config = replace(CONFIG, steps=12, save_every=2)
    pb.train(small_model(), tokenizer, samples(60), config, folder, callbacks=[FullDisk()])


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    with start_function(train_on_a_full_disk, str(tmp_path / "run"), environment=ENVIRONMENT) as process:
        assert process.wait() == 1
        assert "a checkpoint could not be written" in process.err
        assert f"The last good checkpoint is {tmp_path / 'run' / 'checkpoint-4'}" in process.err
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY  # it was the other process


def test_sigterm_is_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "diffusion")

    class Terminate(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(TrainingStoppedError, match=r"after step 3\. No checkpoint was written"):
        pb.train(small_model(), tokenizer, samples(60), CONFIG, tmp_path, callbacks=[Terminate()])
    assert signal.getsignal(signal.SIGTERM) is before
