"""The recipe around `transformers.Trainer`: train an AR model on chats, or adapt one to block diffusion."""

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from parablock.data.chat import Sample
from parablock.diffusion.drafting import draft_loss
from parablock.diffusion.gate import gate_of
from parablock.diffusion.objective import Attention, autoregressive_loss, diffusion_loss
from parablock.diffusion.support import attention as using_attention
from parablock.settings import Model, require
from parablock.training.config import TrainConfig
from parablock.training.gate_trainer import GateTrainer
from parablock.training.guards import Guards, TrainingStoppedError, checkpoints, last_good, remove_broken
from parablock.training.mask_token import prepare
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
    lengths: Sequence[int] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Model:
    """Train `model` in place on `samples`; returns it.

    With `context="causal"` it is the gate attached to the model that learns (`draft_loss`), and nothing else; what
    follows here of mask token and block size is of block context.

    With `mode="diffusion"` the model gets a mask token if it has none, and its config records both it and the block
    size (`prepare`), so that what is saved afterwards is a block-diffusion checkpoint. `lengths`: the samples' token
    counts, if known. `output_dir` receives the Trainer's own checkpoints (every `save_every` steps); with `resume`
    training continues from the newest whole one there, if there is any, and ends with the very weights of a run that
    was never interrupted. `progress(step, logs)` is called every `log_every` steps with the Trainer's log (`loss`,
    ...). SIGTERM ends the run after the step, with a checkpoint.

    Raises:
        ValueError: no padding token, no samples, no gate for causal context or one for other drafts, checkpoints in
            `output_dir` without `resume`, or a loss that is no longer a number.
        OSError: a checkpoint could not be written (a full disk); the message names the last good one.
        TrainingStoppedError: SIGTERM.
    """
    folder = Path(output_dir)
    if checkpoints(folder) and not resume:
        raise ValueError(f"{str(folder)!r} holds checkpoints; pass resume=True to continue, or name another folder")
    if config.context == "causal":
        _require_gate(model, config)
    elif config.mode == "diffusion":
        prepare(model, tokenizer, config.block_size)
    padding = padding_token(model, tokenizer, config)
    guards = Guards(model, folder)
    common: dict[str, Any] = {
        "model": model,
        "args": _arguments(config, output_dir),
        "train_dataset": RowDataset(samples, config, padding, lengths),
        "data_collator": partial(collate, pad_token_id=padding),
        "callbacks": [*callbacks, *([_Report(progress)] if progress else []), guards],
    }
    if config.optimizer == "muon":
        muon = build_optimizer(model, lr=config.lr, muon_lr=config.muon_lr, weight_decay=config.weight_decay)
        common["optimizers"] = (muon, None)
    with _loss_as_forward(model, config, padding):
        trainer = (GateTrainer if config.context == "causal" else Trainer)(**common)
        trainer.remove_callback(PrinterCallback)
        if trainer.is_world_process_zero():
            remove_broken(folder)
        whole = checkpoints(folder)
        guards.listen()
        try:
            trainer.train(resume_from_checkpoint=str(whole[-1]) if whole else None)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not remove_broken(folder):  # it was not in a checkpoint's writing
                raise
            raise OSError(f"a checkpoint could not be written ({error}). {last_good(folder)}") from error
        finally:
            guards.deafen()
        atexit.register(_leave_process_group)
    if guards.stopped_at is not None:
        raise TrainingStoppedError(f"stopped by SIGTERM after step {guards.stopped_at}. {last_good(folder)}")
    return model.eval()


def _leave_process_group() -> None:
    """At exit, while threads can still be joined: a gloo group that is left open can abort the interpreter's end.

    Only after a training that succeeded: closing a group that other processes still wait in can block.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _require_gate(model: Model, config: TrainConfig) -> None:
    gate = gate_of(model)
    if gate is None:
        raise ValueError("context='causal' trains a gate, and the model has none; attach(model, new_gate(model, ...))")
    remedy = f"the model's gate fills {gate.draft_tokens} at once"
    require(gate.draft_tokens == config.draft_tokens, "draft_tokens", config.draft_tokens, remedy)


@contextmanager
def _loss_as_forward(model: Model, config: TrainConfig, mask_token_id: int) -> Iterator[None]:
    """The loss in the place of the model's forward, while it trains.

    So whatever wraps a model for training (autocast, DDP, FSDP, PEFT) runs around the loss as around any forward. A
    call without labels is the model's own forward: callbacks can decode with the model while it trains.
    """
    before = {name: forward for name, forward in model.__dict__.items() if name == "forward"}
    own_forward = model.forward
    attention = _checkpointed_attention(model) if config.gradient_checkpointing else None

    def forward(*args: Any, num_items_in_batch: Tensor | int | None = None, **kwargs: Any) -> Any:
        if kwargs.get("labels") is None:
            return own_forward(*args, **kwargs)
        return {"loss": _loss(model, config, kwargs, num_items_in_batch, mask_token_id, attention)}

    model.forward = forward
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)
        model.__dict__.update(before)  # the class's own again, or what another wrapper had put there
        if config.gradient_checkpointing:
            model.gradient_checkpointing_disable()


def _loss(
    model: Model, config: TrainConfig, batch: dict[str, Tensor], num_items: Tensor | int | None, mask_token_id: int,
    attention: Attention | None,
) -> Tensor:  # fmt: skip
    """What the recipe minimises, of a batch as `collate` makes it."""
    ids, labels = batch["input_ids"], batch["labels"]
    rows: dict[str, Any] = {
        "block_size": config.block_size, "samples": batch.get("samples"), "num_items": num_items
    }  # fmt: skip
    if config.context == "causal":
        return draft_loss(model, ids, labels, batch["anchors"], gamma=config.gamma, rerun_alike=True, **rows)
    if config.mode == "autoregressive":
        return autoregressive_loss(model, ids, labels, **rows)
    loss = diffusion_loss(
        model, ids, labels, batch["noise_mask"], mask_token_id=mask_token_id, attention=attention,
        first_token_context=config.first_token_context, **rows,
    )  # fmt: skip
    if config.ar_loss_weight:
        loss = loss + config.ar_loss_weight * autoregressive_loss(model, ids, labels, **rows)
    return loss


def _checkpointed_attention(model: Model) -> Attention:
    """Turn gradient checkpointing on; returns the attention to train with.

    The second pass over a layer runs long after the loss has given the model's own attention back: it takes the one
    that was in use when the layer ran first, and the masks that the gate saw then.
    """

    def passes() -> tuple[Any, Any]:
        gate = gate_of(model)
        return nullcontext(), _again(model, model.config._attn_implementation, None if gate is None else gate.masked)

    # the name of transformers before 5.2x, where only one of the two exists
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": passes})
    if not torch.cuda.is_available():  # where the Trainer will move the model, wherever it is now
        return "block"
    return "flex" if model._supports_flex_attn else "dense"


@contextmanager
def _again(model: Model, attention: str, masked: Tensor | None) -> Iterator[None]:
    """A layer's second pass: the attention, and the masks for the gate, of the first."""
    gate = gate_of(model)
    with using_attention(model, attention):
        if gate is not None:
            gate.masked = masked
        yield


def padding_token(model: Model, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> int:
    """What fills a sample's last block.

    In block diffusion the mask token does (paper section 3.1): while an answer is decoded, what follows its end in the
    block is masked, too. A padding token there would tell the model in training where the answer ends. In causal
    context nothing sees what follows an answer.
    """
    if config.mode == "diffusion" and config.context == "block":
        return int(model.config.mask_token_id)
    known = [tokenizer.pad_token_id, *([tokenizer.eos_token_id] if config.context == "causal" else [])]
    for token in known:
        if isinstance(token, int):
            return token
    raise ValueError("the tokenizer has no padding token; set tokenizer.pad_token")


def _schedule(config: TrainConfig) -> dict[str, Any]:
    if config.schedule == "cosine":
        return {"lr_scheduler_type": "cosine"}
    decay = {"num_decay_steps": int(config.steps * config.decay_share), "decay_type": "linear"}
    return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": decay}


def _arguments(config: TrainConfig, output_dir: str | Path) -> TrainingArguments:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rows = config.micro_batch_size * processes
    if config.batch_size % rows:
        raise ValueError(
            f"batch_size={config.batch_size} cannot be shared out over {processes} processes with "
            f"micro_batch_size={config.micro_batch_size}; use a multiple of {rows}"
        )
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=config.steps,
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.batch_size // rows,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=config.max_grad_norm,
        **_schedule(config),
        warmup_steps=min(config.warmup_steps, config.steps),
        bf16=config.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        logging_steps=config.log_every,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 500,
        save_total_limit=config.keep_checkpoints,
        train_sampling_strategy="sequential",  # the rows come in the order of the run
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        report_to=list(config.report_to) or "none",
        logging_nan_inf_filter=False,
        fsdp="full_shard" if config.fsdp else None,
        fsdp_config={"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"} if config.fsdp else None,
        disable_tqdm=True,
    )
    # on a machine with several GPUs the Trainer of a single process would share rows out to copies of the model, whose
    # forward is still the loss of the first (nn.DataParallel); torchrun starts a process for each GPU
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
