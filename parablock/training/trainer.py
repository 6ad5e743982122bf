"""The recipe around `transformers.Trainer`: train an AR model on chats, or adapt one to block diffusion."""

import atexit
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from parablock.config import Model, TrainConfig
from parablock.data.chat import Sample
from parablock.diffusion.objective import diffusion_loss
from parablock.training.optimizer import build_optimizer
from parablock.training.rows import RowDataset, collate

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState

Progress = Callable[[int, dict[str, float]], None]  # (optimisation step, what was logged)


class _Report(TrainerCallback):
    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_log(self, args: TrainingArguments, state: "TrainerState", control: "TrainerControl", **kwargs: Any) -> None:
        self.progress(state.global_step, state.log_history[-1])


def train(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    config: TrainConfig,
    output_dir: str | Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Model:
    """Train `model` in place on `samples`; returns it.

    With `mode="diffusion"` the model's config must hold `mask_token_id`; block size and mask id are recorded there, so
    that what is saved afterwards is a block-diffusion checkpoint. `output_dir` receives the Trainer's own checkpoints
    (every `save_every` steps, the last two are kept); with `resume` training continues from the newest one there, if
    there is any. `progress(step, logs)` is called every `log_every` steps with the Trainer's log (`loss`, ...).

    Raises:
        ValueError: no mask or padding token, no samples, or checkpoints in `output_dir` without `resume`.
    """
    saved = sorted(Path(output_dir).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    if saved and not resume:
        raise ValueError(f"{str(output_dir)!r} holds checkpoints; pass resume=True to continue, or name another folder")
    padding = _padding(model, tokenizer, config)
    dataset = RowDataset(
        samples,
        block_size=config.block_size,
        context_length=config.context_length,
        pad_token_id=padding,
        packing=config.packing,
        seed=config.seed,
    )
    common: dict[str, Any] = {
        "model": model,
        "args": _arguments(config, output_dir),
        "train_dataset": dataset,
        "data_collator": partial(_collate, pad_token_id=padding, with_noise=config.mode == "diffusion"),
        "callbacks": [*callbacks, *([_Report(progress)] if progress else [])],
    }
    if config.optimizer == "muon":
        muon = build_optimizer(model, lr=config.lr, muon_lr=config.muon_lr, weight_decay=config.weight_decay)
        common["optimizers"] = (muon, None)
    forward_before = {name: f for name, f in model.__dict__.items() if name == "forward"}
    if config.mode == "diffusion":
        model.config.bd_size = config.block_size
        model.forward = _loss_as_forward(model, config.block_size, padding)
    try:
        trainer = Trainer(**common)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(saved[-1]) if saved else None)
        atexit.register(_leave_process_group)
    finally:
        model.__dict__.pop("forward", None)
        model.__dict__.update(forward_before)  # the class's own again, or what another wrapper had put there
    return model.eval()


def _leave_process_group() -> None:
    """At exit, while threads can still be joined: a gloo group that is left open can abort the interpreter's end.

    Only after a training that succeeded: closing a group that other processes still wait in can block.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _loss_as_forward(model: Model, block_size: int, mask_token_id: int) -> Callable[..., Any]:
    """The block-diffusion loss in the place of the model's forward, while it trains.

    So whatever wraps a model for training (autocast, DDP, FSDP, PEFT) runs around the loss as around any forward. A
    call without a noise mask is the model's own forward: callbacks can decode with the model while it trains.
    """
    own_forward = model.forward

    def forward(*args: Any, noise_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if noise_mask is None:
            return own_forward(*args, **kwargs)
        loss = diffusion_loss(
            model, kwargs["input_ids"], kwargs["labels"], noise_mask, block_size=block_size,
            mask_token_id=mask_token_id, num_items=kwargs.get("num_items_in_batch"),
        )  # fmt: skip
        return {"loss": loss}

    return forward


def _padding(model: Model, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> int:
    """What fills a sample's last block.

    In block diffusion the mask token does (paper section 3.1): while an answer is decoded, what follows its end in the
    block is masked, too. A padding token there would tell the model in training where the answer ends.
    """
    if config.mode == "diffusion":
        if getattr(model.config, "mask_token_id", None) is None:
            raise ValueError("model.config.mask_token_id is missing; name the token that stands at masked positions")
        return int(model.config.mask_token_id)
    if not isinstance(tokenizer.pad_token_id, int):
        raise ValueError("the tokenizer has no padding token; set tokenizer.pad_token")
    return tokenizer.pad_token_id


def _collate(rows: list[dict[str, Tensor]], *, pad_token_id: int, with_noise: bool) -> dict[str, Tensor]:
    batch = collate(rows, pad_token_id)
    if not with_noise:
        del batch["noise_mask"]
    return batch


def _arguments(config: TrainConfig, output_dir: str | Path) -> TrainingArguments:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rows = config.micro_batch_size * processes
    if config.batch_size % rows:
        raise ValueError(
            f"batch_size={config.batch_size} cannot be shared out over {processes} processes with "
            f"micro_batch_size={config.micro_batch_size}; use a multiple of {rows}"
        )
    return TrainingArguments(
        output_dir=str(output_dir),
        max_steps=config.steps,
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.batch_size // rows,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": int(config.steps * config.decay_share), "decay_type": "linear"},
        warmup_steps=min(config.warmup_steps, config.steps),
        bf16=config.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        logging_steps=config.log_every,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 500,
        save_total_limit=2,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=True,
    )
