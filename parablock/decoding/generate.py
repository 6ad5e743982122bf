"""`generate` and `stream`: check the request against the model, run the loop of the chosen mode, gather the tokens."""

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from parablock.decoding.autoregressive import decode_autoregressive
from parablock.decoding.blocks import decode_blocks
from parablock.decoding.config import DecodeConfig
from parablock.decoding.steps import Limits, Step
from parablock.diffusion.support import require_full_attention, require_open_attention
from parablock.settings import Model

DEFAULT_NEW_TOKENS = 512

Prompts = Tensor | Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class GenerateOutput:
    """What `generate` returns.

    `tokens`: the new token ids of each row, prompt excluded, stop token included. `forwards`: model calls made (NFE),
    prefill and commits included. `decode_forwards`: the decode forwards each row took part in, prefill excluded.
    `seconds`: wall-clock time, prefill included.
    """

    tokens: list[list[int]]
    forwards: int
    decode_forwards: list[int]
    seconds: float

    @property
    def new_tokens(self) -> int:
        """Response tokens of all rows together."""
        return sum(len(row) for row in self.tokens)

    @property
    def tokens_per_forward(self) -> float:
        """Response tokens per decode forward of a row: the ratio of the sums over all rows."""
        return self.new_tokens / max(1, sum(self.decode_forwards))

    @property
    def tokens_per_second(self) -> float:
        """Response tokens per second, all rows together, prefill time included."""
        return self.new_tokens / self.seconds


def generate(model: Model, input_ids: Prompts, config: DecodeConfig | None = None) -> GenerateOutput:
    """Decode one or many prompts to the end.

    Args:
        model: a stock transformers decoder. For `mode="diffusion"` its config holds `bd_size` and `mask_token_id`, or
            `config` names `block_size` and `mask_token_id`.
        input_ids: `[B, L]` or `[L]` ids, or a list of rows of any lengths.
        config: how to decode; see `DecodeConfig`.

    Raises:
        ValueError: an empty prompt, one that does not fit the model's context, or settings the model cannot serve.
    """
    started = time.perf_counter()
    for forwards, step in enumerate(stream(model, input_ids, config), start=1):
        last = forwards, step
    forwards, step = last
    return GenerateOutput(
        tokens=[step.tokens(row) for row in range(len(step.done))],
        forwards=forwards,
        decode_forwards=step.decode_forwards.tolist(),
        seconds=time.perf_counter() - started,
    )


def stream(model: Model, input_ids: Prompts, config: DecodeConfig | None = None) -> Iterator[Step]:
    """Decode like `generate`, but yield every forward as a `Step` (for live display). Errors are raised at once."""
    config = config or DecodeConfig()
    prompts = as_rows(input_ids)
    config = resolve(model, prompts, config)
    assert config.max_new_tokens is not None
    limits = Limits(config.max_new_tokens, config.stop_token_ids or ())
    seed = int(torch.randint(2**31, ()).item()) if config.seed is None else config.seed
    if config.mode == "diffusion":
        return decode_blocks(model, prompts, config, limits, seed)
    return decode_autoregressive(model, prompts, config, limits, seed)


def as_rows(input_ids: Prompts) -> list[list[int]]:
    """One or many prompts as lists of ids; ValueError for an empty one."""
    rows: list[Any] = input_ids.tolist() if isinstance(input_ids, Tensor) else list(input_ids)
    if rows and not isinstance(rows[0], (list, tuple, Tensor)):
        rows = [rows]
    prompts = [[int(i) for i in row] for row in rows]
    if not prompts:
        raise ValueError("there is no prompt; pass at least one row of token ids")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} is empty; it needs at least one token")
    return prompts


def resolve(model: Model, prompts: list[list[int]], config: DecodeConfig) -> DecodeConfig:
    """Fill in what the checkpoint decides, and refuse what it cannot do."""
    require_full_attention(model.config)
    require_open_attention(model)
    own = model.config
    vocabulary = model.get_input_embeddings().weight.shape[0]
    block_size = config.block_size or getattr(own, "bd_size", None)
    mask_token_id = config.mask_token_id
    if mask_token_id is None:
        mask_token_id = getattr(own, "mask_token_id", None)
    possible = block_size is not None and mask_token_id is not None
    mode = config.mode or ("diffusion" if possible else "autoregressive")
    if mode == "diffusion":
        if block_size is None or mask_token_id is None:
            lacking = "mask token" if mask_token_id is None else "block size"
            raise ValueError(
                f"mode='diffusion': the checkpoint names no {lacking}, it was never adapted to block diffusion; adapt "
                "it with parablock adapt, or decode with mode='autoregressive'"
            )
        config.check_sub_block(block_size)
        if getattr(own, "bd_size", None) not in (None, block_size):
            warn_of_block_size(own.bd_size, block_size)
    if mask_token_id is not None and not 0 <= mask_token_id < vocabulary:
        raise ValueError(f"mask_token_id={mask_token_id} is outside the vocabulary of {vocabulary} tokens")
    for number, prompt in enumerate(prompts):
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise ValueError(f"prompt {number} holds an id outside the vocabulary of {vocabulary} tokens")
    context = own.max_position_embeddings
    longest = max(len(prompt) for prompt in prompts)
    max_new_tokens = config.max_new_tokens or max(1, min(DEFAULT_NEW_TOKENS, context - longest))
    if longest + max_new_tokens > context:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the model's context of "
            f"{context} tokens; shorten the prompt or lower max_new_tokens"
        )
    stops = config.stop_token_ids
    if stops is None:
        eos = model.generation_config.eos_token_id if model.generation_config else None
        eos = own.eos_token_id if eos is None else eos
        stops = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return replace(
        config,
        mode=mode,
        max_new_tokens=max_new_tokens,
        block_size=block_size,
        mask_token_id=mask_token_id,
        stop_token_ids=stops,
    )


def warn_of_block_size(own: int, asked: int | None) -> None:
    """A model decodes best in the blocks it was trained with."""
    warnings.warn(
        f"block_size={asked}, but the checkpoint was trained with {own}: a mismatch costs accuracy "
        "(Fast-dLLM v2, table 4); keep its own, and change sub_block_size instead",
        stacklevel=4,
    )
