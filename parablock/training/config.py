"""What a user can set about training and adaptation."""

from dataclasses import dataclass
from typing import Literal

from parablock.diffusion.config import MOST_MASKS, FirstTokenContext
from parablock.settings import inherited, require, require_at_least, require_choice, setting

Objective = Literal["diffusion", "autoregressive"]
Optimizer = Literal["adamw", "muon"]
Schedule = Literal["stable", "cosine"]
Context = Literal["block", "causal"]
TooLong = Literal["drop", "truncate", "refuse"]


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained, or adapted to block diffusion.

    `block_padding`, `complementary`, `first_token_context` and `ar_loss_weight` are the objective's switches
    (Fast-dLLM v2, table 2, and beyond). `draft_tokens`, `anchors` and `gamma` belong to causal context.
    """

    mode: Objective = setting("diffusion", help="'diffusion' adapts; 'autoregressive' trains as before.")
    context: Context = setting(
        "block", help="'causal': only masks see what is trained, and draft for the model, which stays as it is."
    )
    steps: int = setting(1000, help="Optimisation steps.")
    batch_size: int = setting(32, help="Rows per step, over all processes.")
    micro_batch_size: int = setting(32, help="Rows per forward and process.")
    context_length: int = setting(2048, help="Tokens per row.")
    packing: bool = setting(True, help="Fill rows with several samples; without it a row is one sample.")
    isolate_samples: bool = setting(True, help="Samples in one row see nothing of each other; without it as published.")
    block_padding: bool = setting(True, help="No block holds two samples (ablation: without).")
    block_size: int = setting(32, help="Tokens decoded together.")
    complementary: bool = setting(
        True, help="Learn every token once, in two views (ablation: without, in one noisy view only)."
    )
    first_token_context: FirstTokenContext = setting(
        "noisy", help="What predicts a block's first token: the 'noisy' block before it (published), or 'clean'."
    )
    ar_loss_weight: float = setting(0.0, help="Weight of an autoregressive loss beside, which keeps the AR mode alive.")
    draft_tokens: int = setting(3, help="Causal context: masks behind an anchor, all filled at once.")
    anchors: int = setting(64, help="Causal context: at most so many places of a row, drawn anew in every epoch.")
    gamma: float = setting(0.85, help="Causal context: how much less every further draft of a block counts.")
    optimizer: Optimizer = setting("adamw", help="'adamw', or 'muon' for the hidden matrices.")
    lr: float = setting(1e-4, help="AdamW's learning rate.")
    muon_lr: float = setting(5e-3, help="Muon's learning rate.")
    weight_decay: float = setting(0.0, help="Weight decay.")
    schedule: Schedule = setting("stable", help="'cosine' to zero, or 'stable' with a linear fall to zero at the end.")
    warmup_steps: int = setting(50, help="Steps of linear warm-up.")
    decay_share: float = setting(0.3, help="For 'stable': the share of the steps in which the rate falls.")
    max_grad_norm: float = setting(1.0, help="Gradients are clipped to this norm.")
    bf16: bool = setting(False, help="Mixed precision.")
    gradient_checkpointing: bool = setting(False, help="Less memory, a third more time.")
    fsdp: bool = setting(False, help="Shard model and optimizer over the processes of torchrun (FSDP2).")
    seed: int = setting(0, help="Of order and noise.")
    log_every: int = setting(20, help="Steps between log lines.")
    save_every: int = setting(0, help="Steps between checkpoints to resume from; 0: none.")
    keep_checkpoints: int = setting(2, help="How many of them are kept, the newest.")
    report_to: tuple[str, ...] = setting((), help="Also log to 'tensorboard', 'wandb', 'trackio' (repeatable).")

    def __post_init__(self) -> None:
        require_choice("mode", self.mode, Objective)
        require_choice("context", self.context, Context)
        require_choice("optimizer", self.optimizer, Optimizer)
        require_choice("schedule", self.schedule, Schedule)
        require_choice("first_token_context", self.first_token_context, FirstTokenContext)
        require_at_least(
            self, 1, "steps", "batch_size", "micro_batch_size", "context_length", "block_size", "log_every",
            "draft_tokens", "anchors",
        )  # fmt: skip
        require(self.keep_checkpoints >= 2, "keep_checkpoints", self.keep_checkpoints, "use at least 2: one is whole")
        most = f"use at most {MOST_MASKS}"
        require(self.draft_tokens <= MOST_MASKS, "draft_tokens", self.draft_tokens, most)
        require(
            self.batch_size % self.micro_batch_size == 0,
            "micro_batch_size", self.micro_batch_size, f"use a divisor of batch_size={self.batch_size}",
        )  # fmt: skip
        require(
            self.context_length % self.block_size == 0,
            "context_length", self.context_length, f"use a multiple of block_size={self.block_size}",
        )  # fmt: skip
        require(0 <= self.decay_share <= 1, "decay_share", self.decay_share, "use a value in [0, 1]")
        require(min(self.lr, self.muon_lr) > 0, "lr", (self.lr, self.muon_lr), "use positive learning rates")
        require_at_least(self, 0, "ar_loss_weight")
        if not self.block_padding:
            remedy = "samples that share blocks need packing=True and isolate_samples=False"
            require(self.packing and not self.isolate_samples, "block_padding", self.block_padding, remedy)
        if self.ar_loss_weight:
            remedy = "the autoregressive loss needs complementary=True, which learns every token"
            require(self.complementary, "ar_loss_weight", self.ar_loss_weight, remedy)
        if self.context == "causal":
            self._require_causal()
        if self.fsdp:
            require(self.optimizer == "adamw", "fsdp", self.fsdp, "Muon needs whole matrices; use optimizer='adamw'")

    def _require_causal(self) -> None:
        require(0 < self.gamma <= 1, "gamma", self.gamma, "use a value in (0, 1]")
        require(self.mode == "diffusion", "mode", self.mode, "context='causal' needs mode='diffusion'")
        remedy = "Muon trains the model's own matrices, which stay as they are in causal context; use 'adamw'"
        require(self.optimizer == "adamw", "optimizer", self.optimizer, remedy)
        for name in ("ar_loss_weight", "block_padding", "complementary", "first_token_context"):
            value, default = getattr(self, name), TrainConfig.__dataclass_fields__[name].default
            require(value == default, name, value, "it belongs to block context; leave it out with context='causal'")


@dataclass(frozen=True)
class AdaptConfig(TrainConfig):
    """A whole adaptation: the recipe (`TrainConfig`), and what it starts from."""

    model: str = setting("", help="The AR checkpoint: a directory or a hub id.")
    data: str = setting(
        "",
        help="A JSONL or Parquet file or folder, a hub id ORG/NAME (:CONFIG, @SPLIT), alpaca, nemotron, word-problems.",
    )
    lr: float = inherited(TrainConfig, "lr", 2e-5)
    schedule: Schedule = inherited(TrainConfig, "schedule", "cosine")
    micro_batch_size: int = inherited(TrainConfig, "micro_batch_size", 1)
    max_samples: int | None = setting(None, help="Use only the first so many. Default: all.")
    too_long: TooLong = setting("drop", help="Samples longer than the context: 'drop', 'truncate' or 'refuse'.")
    streaming: bool = setting(False, help="Fetch only what max_samples needs of a hub dataset.")
    data_workers: int = setting(1, help="Processes that tokenize.")
    lora_rank: int = setting(0, help="Train a LoRA adapter of this rank; 0: all weights.")
    lora_alpha: int = setting(32, help="LoRA's scale.")
    lora_dropout: float = setting(0.0, help="LoRA's dropout.")
    lora_targets: tuple[str, ...] = setting(
        (), help="Names of the layers that get LoRA, such as o_proj (repeatable). Default: all linear layers."
    )
    check_every: int = setting(0, help="Steps between checks on held-out prompts; 0: none.")
    check_samples: int = setting(16, help="How many prompts a check answers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, remedy in (("model", "a directory or hub id"), ("data", "a file, a hub id or a shorthand")):
            require(bool(getattr(self, name)), name, getattr(self, name), f"name {remedy}")
        require_choice("too_long", self.too_long, TooLong)
        require_at_least(self, 1, "max_samples", "data_workers", "check_samples")
        require(self.lora_rank >= 0, "lora_rank", self.lora_rank, "use 0 (no LoRA) or more")
        if self.context == "causal":
            remedy = "context='causal' trains an adapter beside the model, say of rank 32"
            require(self.lora_rank > 0, "lora_rank", self.lora_rank, remedy)
            remedy = "drafts are trained without dropout; leave it out with context='causal'"
            require(self.lora_dropout == 0, "lora_dropout", self.lora_dropout, remedy)
