"""Fast-dLLM v2's published decoding loop: the model calls that it makes, made on a stock model, and its habits undone.

After what `batch_sample` in `v2/generation_functions.py` of its repository does (the decoder of its evaluations) and
`generate` of its checkpoints (one request), written anew, as plainly as possible: the baseline of `official.py`. It
decides by itself, so its tokens must come out as those of `pb.generate`. Where the published code goes astray it is
helped, at no cost: a mask token is never revealed, a prompt of exactly one block is not forgotten, and a stop token is
seen wherever it stands. Shapes: R rows, C capacity, D block size, S sub-block size, Q queries, V vocabulary.
"""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import parablock as pb
from parablock.decoding.cache import BlockCache


@dataclass(frozen=True)
class Way:
    """How the loop goes about its work. By default as `batch_sample` does; `generate` stops at once."""

    stop_at_once: bool = False  # else a row that has stopped is denoised on, to the end of its block
    head_everywhere: bool = True  # else only where a token is wanted
    concatenate: bool = True  # else K/V are written in place, and a block sees them without a mask


class Concatenated(BlockCache):
    """K/V as the published code holds them: a forward attends to a new copy of all of them, its own behind the others'.

    `commit`: the copy stays. `keep`: K/V of the block are kept for the forwards over its sub-blocks, each of which
    replaces those at `narrow`.
    """

    def __init__(self) -> None:
        super().__init__(0, 0)  # `buffers` hold what is committed
        self.block: list[Any] = []
        self.commit, self.keep = False, False
        self.narrow: int | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Called by every attention layer: what it attends to."""
        states = key_states, value_states
        if self.narrow is not None:
            for kept, own in zip(self.block[layer_idx], states, strict=True):
                kept[:, :, self.narrow : self.narrow + own.shape[2]] = own
            states = self.block[layer_idx]
        elif self.keep:
            self.block[layer_idx : layer_idx + 1] = [states]
        if layer_idx < len(self.buffers):
            states = tuple(torch.cat(pair, 2) for pair in zip(self.buffers[layer_idx], states, strict=True))
        if self.commit:
            self.buffers[layer_idx : layer_idx + 1] = [states]
        return states


@dataclass
class Calls:
    """A stock model and the K/V of a batch whose rows stand at the same block."""

    model: Any
    way: Way
    kv: BlockCache
    block_size: int
    keep: bool  # K/V of a block, for forwards over its sub-blocks

    def forward(self, ids_RQ: Tensor, start: int, columns: Tensor, *, offset: int = 0, commit: bool = False) -> Tensor:
        """Logits `[R, columns, V]` of the tokens from `start + offset` on; `start` tokens are committed.

        Everywhere they are computed if that is the way.
        """
        D, Q = self.block_size, ids_RQ.shape[1]
        position_Q = torch.arange(start + offset, start + offset + Q)
        visible = start + max(D, Q)
        if isinstance(self.kv, Concatenated):
            self.kv.commit, self.kv.keep, self.kv.narrow = commit, self.keep, offset if Q < D else None
        else:
            self.kv.place(position_Q.numpy()[None], visible, ids_RQ.device)
        mask = None
        if Q > D or (Q == D and self.way.concatenate):
            mask = (torch.arange(visible) // D <= position_Q[:, None] // D)[None, None]
        logits: Tensor = self.model(
            input_ids=ids_RQ, position_ids=position_Q[None], attention_mask=mask, past_key_values=self.kv,
            use_cache=True, is_causal=False, logits_to_keep=0 if self.way.head_everywhere else columns,
        ).logits  # fmt: skip
        return logits[:, columns] if self.way.head_everywhere else logits

    def drop(self, keep_R: Tensor) -> None:
        """Only these rows go on."""
        self.kv.buffers = [(keys[keep_R], values[keep_R]) for keys, values in self.kv.buffers]


@torch.no_grad()
def decode(model: Any, prompts: list[list[int]], config: pb.DecodeConfig, way: Way = Way()) -> pb.GenerateOutput:
    """What the published loop makes of these prompts, up to where each of them ends.

    `config` as for `pb.generate`, greedy and by threshold: the limit, the stop tokens, the sub-block size, and whether
    to use the sub-block cache (the published `use_block_cache`). A row ends at its limit as it would at a stop token.
    With the cache a row's tokens depend on its neighbours: all run their whole block when one of them needs to.
    """
    started = time.perf_counter()
    assert config.max_new_tokens is not None
    D, S, mask_token_id = model.config.bd_size, config.sub_block_size, model.config.mask_token_id
    ended = partial(
        ends, limit=config.max_new_tokens, stops=torch.tensor(config.stop_token_ids or (), dtype=torch.long),
        mask_token_id=mask_token_id,
    )  # fmt: skip
    length_R, row_R = torch.tensor([len(prompt) for prompt in prompts]), torch.arange(len(prompts))
    capacity = (int(length_R.max()) + config.max_new_tokens + D - 1) // D * D
    ids_RC = torch.full((len(prompts), capacity + 1), mask_token_id)  # a commit tells what comes behind its block
    for row, prompt in enumerate(prompts):
        ids_RC[row, : len(prompt)] = torch.tensor(prompt)
    tokens: list[list[int]] = [[] for _ in prompts]
    forwards, decode_forwards_R = 0, torch.zeros_like(length_R)
    kv = Concatenated() if way.concatenate else BlockCache(len(prompts), capacity)
    calls = Calls(model, way, kv, D, config.sub_block_cache)

    def commit(first: int, end: int) -> None:
        logits_RV = calls.forward(ids_RC[:, first:end], first, torch.tensor([end - first - 1]), commit=True)[:, 0]
        logits_RV[:, mask_token_id] = -torch.inf
        next_R = ids_RC[:, end]
        ids_RC[:, end] = torch.where(next_R == mask_token_id, logits_RV.argmax(-1), next_R)

    start = int(length_R.min()) // D * D  # longer prompts go on block by block
    if start:
        commit(0, start)
        forwards += 1
    while True:
        written = False
        for sub in range(0, D, S):
            part_RS = ids_RC[:, start + sub : start + sub + S]
            while True:
                wanted_RS = part_RS == mask_token_id
                if way.stop_at_once:
                    wanted_RS &= (ended(ids_RC, length_R) < 0)[:, None]
                if not wanted_RS.any():
                    break
                narrow = config.sub_block_cache and written and not wanted_RS[:, 0].any()
                offset, width = (sub, S) if narrow else (0, D)
                columns = torch.arange(sub - offset - 1, sub - offset + S - 1).clamp(min=0)  # the token shift
                block = ids_RC[:, start + offset : start + offset + width]
                logits_RSV = calls.forward(block, start, columns, offset=offset)
                logits_RSV[..., mask_token_id] = -torch.inf
                reveal(part_RS, wanted_RS, logits_RSV, config.threshold)
                written, forwards = True, forwards + 1
                decode_forwards_R[row_R] += 1
        end_R = ended(ids_RC, length_R)
        for row, ids, first, end in zip(row_R.tolist(), ids_RC, length_R.tolist(), end_R.tolist(), strict=True):
            tokens[row] = ids[first : end + 1].tolist()
        going_R = end_R < 0
        if not going_R.any():
            seconds, none = time.perf_counter() - started, [0] * len(tokens)  # are drafted
            return pb.GenerateOutput(tokens, forwards, decode_forwards_R.tolist(), seconds, none, none, {}, {})
        commit(start, start + D)
        forwards += 1
        decode_forwards_R[row_R] += 1
        start += D
        row_R, ids_RC, length_R = row_R[going_R], ids_RC[going_R], length_R[going_R]
        if not going_R.all():
            calls.drop(going_R)


def reveal(part_RS: Tensor, wanted_RS: Tensor, logits_RSV: Tensor, threshold: float) -> None:
    """Writes what is sure enough into the sub-block, and each row's surest token."""
    probability_RSV = torch.softmax(logits_RSV, -1)
    token_RS = probability_RSV.argmax(-1)
    confidence_RS = probability_RSV.gather(-1, token_RS[..., None])[..., 0]
    confidence_RS = torch.where(wanted_RS, confidence_RS, -torch.inf)
    chosen_RS = confidence_RS > threshold
    chosen_RS[torch.arange(len(part_RS)), confidence_RS.argmax(-1)] = True
    chosen_RS &= wanted_RS
    part_RS[chosen_RS] = token_RS[chosen_RS]


def ends(ids_RC: Tensor, length_R: Tensor, *, limit: int, stops: Tensor, mask_token_id: int) -> Tensor:
    """Where each row ends, `[R]`: at its first stop token or its limit, if all is known up to there; otherwise -1."""
    position_C = torch.arange(ids_RC.shape[1])
    ends_RC = torch.isin(ids_RC, stops) & (position_C >= length_R[:, None])
    ends_RC |= position_C == length_R[:, None] + limit - 1
    ends_RC &= (ids_RC == mask_token_id).cumsum(1) == 0
    return torch.where(ends_RC.any(1), ends_RC.int().argmax(1), -1)
