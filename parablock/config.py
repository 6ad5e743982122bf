"""What a user can set, one frozen dataclass per stage; every wrong value is a ValueError that names it."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

Model = Any  # a decoder-only language model of transformers; what its config holds depends on the architecture
Mode = Literal["diffusion", "autoregressive"]
Strategy = Literal["threshold", "factor", "fixed"]


def _require(ok: bool, name: str, value: object, remedy: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r} is out of range; {remedy}")


def require_library(name: str, extra: str) -> None:
    """ValueError that names the remedy unless the library of an optional extra is installed."""
    if find_spec(name) is None:
        raise ValueError(f"this needs {name}; install it with: pip install 'parablock[{extra}]'")


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained (`mode="autoregressive"`) or adapted to block diffusion (`mode="diffusion"`).

    `lr` is AdamW's, `muon_lr` Muon's; both warm up over `warmup_steps`, stay flat, and fall linearly to zero over the
    last `decay_share` of the steps. `batch_size` counts rows per optimisation step, `micro_batch_size` rows per
    forward and process. `packing` fills rows of `context_length` tokens with several samples; without it a row is one
    sample.
    """

    mode: Mode = "diffusion"
    steps: int = 1000
    batch_size: int = 32
    micro_batch_size: int = 32
    context_length: int = 2048
    packing: bool = True
    block_size: int = 32
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    muon_lr: float = 5e-3
    weight_decay: float = 0.0
    warmup_steps: int = 50
    decay_share: float = 0.3
    max_grad_norm: float = 1.0
    bf16: bool = False
    seed: int = 0
    log_every: int = 20
    save_every: int = 0

    def __post_init__(self) -> None:
        _require(self.mode in ("diffusion", "autoregressive"), "mode", self.mode, "use 'diffusion' or 'autoregressive'")
        _require(self.optimizer in ("adamw", "muon"), "optimizer", self.optimizer, "use 'adamw' or 'muon'")
        for name in ("steps", "batch_size", "micro_batch_size", "context_length", "block_size", "log_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "use at least 1")
        _require(
            self.batch_size % self.micro_batch_size == 0,
            "micro_batch_size", self.micro_batch_size, f"use a divisor of batch_size={self.batch_size}",
        )  # fmt: skip
        _require(
            self.context_length % self.block_size == 0,
            "context_length", self.context_length, f"use a multiple of block_size={self.block_size}",
        )  # fmt: skip
        _require(0 <= self.decay_share <= 1, "decay_share", self.decay_share, "use a value in [0, 1]")
        _require(min(self.lr, self.muon_lr) > 0, "lr", (self.lr, self.muon_lr), "use positive learning rates")


@dataclass(frozen=True)
class DecodeConfig:
    """How text is decoded. `mode="diffusion"` reveals several tokens per forward, `"autoregressive"` one.

    `strategy`: `"threshold"` reveals every position whose confidence is above `threshold`, `"factor"` as many of the
    most confident ones as `factor` allows, `"fixed"` the `tokens_per_step` most confident. `sub_block_cache` reuses the
    K/V of the other sub-blocks of the block being decoded. None means:
    512, or what the context leaves (`max_new_tokens`); the checkpoint's own (`block_size`, `mask_token_id`,
    `stop_token_ids`); no limit (`top_k`); a fresh one (`seed`).
    """

    mode: Mode = "diffusion"
    max_new_tokens: int | None = None
    block_size: int | None = None
    sub_block_size: int = 8
    strategy: Strategy = "threshold"
    threshold: float = 0.9
    factor: float = 1.0
    tokens_per_step: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    sub_block_cache: bool = True
    stop_token_ids: tuple[int, ...] | None = None
    mask_token_id: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _require(self.mode in ("diffusion", "autoregressive"), "mode", self.mode, "use 'diffusion' or 'autoregressive'")
        _require(
            self.strategy in ("threshold", "factor", "fixed"),
            "strategy", self.strategy, "use 'threshold', 'factor' or 'fixed'",
        )  # fmt: skip
        for name in ("max_new_tokens", "sub_block_size", "tokens_per_step", "top_k"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "use at least 1")
        _require(0.0 <= self.threshold <= 1.0, "threshold", self.threshold, "use a value in [0, 1]")
        _require(self.factor > 0.0, "factor", self.factor, "use a positive value")
        _require(self.temperature >= 0.0, "temperature", self.temperature, "use 0 (greedy) or more")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "use a value in (0, 1]")
        if self.block_size is not None:
            _require(self.block_size >= 1, "block_size", self.block_size, "use at least 1")
            self.check_sub_block(self.block_size)

    def check_sub_block(self, block_size: int) -> None:
        """ValueError unless `block_size` is a whole number of sub-blocks."""
        _require(
            block_size % self.sub_block_size == 0,
            "sub_block_size", self.sub_block_size, f"use a divisor of the block size {block_size}",
        )  # fmt: skip
