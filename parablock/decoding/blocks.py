"""The reference loop of block diffusion: prefill, denoise block by block, commit (Fast-dLLM v2, section 3.3).

Shapes: R rows, D block size, S sub-block size, C capacity of the token buffers.

Every row walks at its own pace: in one step one row may denoise its first sub-block while another commits a block. A
step is one forward over whole blocks, `[R, D]`, or, when no row needs more, over one sub-block each, `[R, S]`; where a
row takes part in a wider forward than it needs, only its own slice of the cache is written. So a row's tokens do not
depend on its neighbours. The control state lives on the host in numpy; the one device sync of a step fetches the
proposed tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from parablock.decoding.cache import BlockCache
from parablock.decoding.config import DecodeConfig
from parablock.decoding.forward import forward, forward_prompts
from parablock.decoding.steps import Kind, Limits, Rows, Step, draw, to_host, token_buffer
from parablock.decoding.unmasking import reveal
from parablock.diffusion.masks import block_causal_mask
from parablock.settings import Model


@dataclass
class _Blocks(Rows):
    """Where every row stands: its tokens, what is still masked, and the block it is decoding."""

    start_R: np.ndarray  # first position of the row's active block = its committed length
    written_R: np.ndarray  # bool: the active block has K/V from an earlier forward


@dataclass(frozen=True)
class _Plan:
    """The next forward: Q is the block size, or the sub-block size when no row needs its whole block."""

    active_R: np.ndarray  # rows that are not done
    commit_R: np.ndarray  # rows whose block is full: this forward commits it
    whole_R: np.ndarray  # rows that need all of their block, the committing ones among them
    position_RQ: np.ndarray  # what runs
    slot_RQ: np.ndarray  # where its K/V are written; the spare slot for what must stay as it is
    source_RS: np.ndarray  # which of the Q logits predict ...
    target_RS: np.ndarray  # ... these positions (token shift)
    candidate_RS: np.ndarray  # bool: positions that may be revealed


@torch.inference_mode()
def decode_blocks(
    model: Model, prompts: list[list[int]], config: DecodeConfig, limits: Limits, seed: int
) -> Iterator[Step]:
    """Decode `prompts`; yields one `Step` per forward, the prefill included. `config.block_size` must be set."""
    D = config.block_size
    assert D is not None
    state = _start(prompts, config, limits)
    cache = BlockCache(len(prompts), state.ids_RC.shape[1])
    if state.start_R.any():
        yield _prefill(model, cache, state, config, seed)
    rows = np.arange(len(prompts))
    while not state.done_R.all():
        plan = _plan(state, config, cache.capacity)
        alike = bool((plan.source_RS == plan.source_RS[0]).all())
        logits = forward(
            model,
            cache,
            state.ids_RC[rows[:, None], plan.position_RQ],
            start_R=plan.position_RQ[:, 0],
            slots_RQ=plan.slot_RQ,
            visible_R=state.start_R + D,
            keep=plan.source_RS[0] if alike else None,
        )
        if not alike:
            source = torch.from_numpy(plan.source_RS).to(logits.device)
            logits = logits.gather(1, source[..., None].expand(-1, -1, logits.shape[-1]))
        tokens, confidence = draw(logits, plan.target_RS, state, config, seed)
        chosen = reveal(
            confidence,
            torch.from_numpy(plan.candidate_RS).to(logits.device),
            config.strategy,
            threshold=config.threshold,
            factor=config.factor,
            tokens_per_step=config.tokens_per_step,
        )
        tokens_RS, confidence_RS, chosen_RS = to_host(tokens, confidence, chosen)

        state.forwards_R += plan.active_R
        state.written_R = (state.written_R | plan.whole_R) & ~plan.commit_R
        state.start_R = state.start_R + D * plan.commit_R
        state.reveal(plan.target_RS, tokens_RS, chosen_RS)
        kind: Kind = "commit" if (plan.commit_R == plan.active_R).all() else "denoise"
        yield state.step(kind, state.start_R, D, plan.target_RS, confidence_RS, chosen_RS)


def _plan(state: _Blocks, config: DecodeConfig, spare_slot: int) -> _Plan:
    """Every row's next action: denoise its current sub-block, alone or with the whole block, or commit."""
    D, S = config.block_size, config.sub_block_size
    assert D is not None
    block_RD = state.start_R[:, None] + np.arange(D)
    masked_RD = np.take_along_axis(state.masked_RC, block_RD, 1)
    active_R = ~state.done_R
    commit_R = active_R & ~masked_RD.any(1)
    first_R = masked_RD.argmax(1)  # the first masked position; sub-blocks are revealed left to right
    sub_R = first_R // S * S  # where its sub-block begins
    # the token shift takes the prediction of a sub-block's first position from outside it
    whole_R = active_R & (commit_R | ~state.written_R | (sub_R == first_R) | (not config.sub_block_cache))

    wide = bool(whole_R.any())
    offset_R = np.zeros_like(sub_R) if wide else sub_R  # of the first query in the block
    query_RQ = offset_R[:, None] + np.arange(D if wide else S)
    in_sub_RQ = (query_RQ >= sub_R[:, None]) & (query_RQ < sub_R[:, None] + S)
    position_RQ = state.start_R[:, None] + query_RQ
    write_RQ = active_R[:, None] & (whole_R[:, None] | in_sub_RQ)

    in_block_RS = sub_R[:, None] + np.arange(S)
    source_RS = np.maximum(in_block_RS - 1 - offset_R[:, None], 0)
    target_RS = state.start_R[:, None] + in_block_RS
    candidate_RS = np.take_along_axis(masked_RD, in_block_RS, 1) & active_R[:, None]
    # a committing row asks its last position for the first token of the next block
    source_RS[commit_R, 0] = D - 1
    target_RS[commit_R, 0] = state.start_R[commit_R] + D
    candidate_RS[commit_R, 0] = True
    return _Plan(
        active_R, commit_R, whole_R, position_RQ, np.where(write_RQ, position_RQ, spare_slot), source_RS, target_RS,
        candidate_RS,
    )  # fmt: skip


def _start(prompts: list[list[int]], config: DecodeConfig, limits: Limits) -> _Blocks:
    """Prompts known, everything after them masked; the active block is the one that holds the first masked position."""
    D, mask_token_id = config.block_size, config.mask_token_id
    assert D is not None
    assert mask_token_id is not None
    lengths = np.array([len(p) for p in prompts])
    capacity = -(-int(lengths.max() + limits.max_new_tokens) // D) * D + D  # one block to spare: a commit's first token
    return _Blocks(
        ids_RC=token_buffer(prompts, capacity, mask_token_id),
        masked_RC=np.arange(capacity) >= lengths[:, None],
        prompt_R=lengths,
        limits=limits,
        start_R=lengths // D * D,
        written_R=np.zeros(len(prompts), dtype=bool),
    )


def _prefill(model: Model, cache: BlockCache, state: _Blocks, config: DecodeConfig, seed: int) -> Step:
    """All whole blocks of all prompts in one block-causal forward.

    A prompt that ends on a block boundary gets its first new token from the last logits.
    """
    D = config.block_size
    assert D is not None
    length = int(state.start_R.max())
    mask = None if length == D else block_causal_mask(length, D)[None, None]
    logits = forward_prompts(model, cache, state.ids_RC[:, :length], np.maximum(state.start_R - 1, 0), mask)
    boundary_R1 = ((state.prompt_R == state.start_R) & (state.start_R > 0))[:, None]
    tokens, confidence = draw(logits, state.start_R[:, None], state, config, seed)
    tokens_R1, confidence_R1 = to_host(tokens, confidence)
    state.reveal(state.start_R[:, None], tokens_R1, boundary_R1)
    return state.step("prefill", state.start_R, D, state.start_R[:, None], confidence_R1, boundary_R1)
