"""Autoregressive decoding on the same stock model and cache: the honest baseline of every speed-up.

One causal prefill over the whole prompts, then one token per row and forward.
"""

from collections.abc import Iterator

import numpy as np
import torch

from parablock.decoding.cache import BlockCache
from parablock.decoding.config import DecodeConfig
from parablock.decoding.forward import forward, forward_prompts
from parablock.decoding.steps import Kind, Limits, Rows, Step, draw, to_host, token_buffer
from parablock.settings import Model


@torch.inference_mode()
def decode_autoregressive(
    model: Model, prompts: list[list[int]], config: DecodeConfig, limits: Limits, seed: int
) -> Iterator[Step]:
    """Decode `prompts` token by token; yields one `Step` per forward, the prefill (which gives a token) included."""
    lengths = np.array([len(p) for p in prompts])
    longest = int(lengths.max())
    capacity = longest + limits.max_new_tokens + 1
    ids = token_buffer(prompts, capacity, fill=0)
    state = Rows(ids, np.arange(capacity) >= lengths[:, None], lengths, limits)
    cache = BlockCache(len(prompts), capacity)
    rows = np.arange(len(prompts))

    causal = torch.ones(longest, longest, dtype=torch.bool).tril_()[None, None]
    logits = forward_prompts(model, cache, ids[:, :longest], lengths - 1, causal)
    yield _take(state, logits, lengths, config, seed, "prefill")

    next_R = lengths.copy()  # the token each row runs next; a finished row repeats its last one
    while not state.done_R.all():
        logits = forward(model, cache, ids[rows, next_R][:, None], start_R=next_R, visible_R=next_R + 1)
        state.forwards_R += ~state.done_R
        next_R = next_R + ~state.done_R
        yield _take(state, logits, next_R, config, seed, "autoregressive")


def _take(
    state: Rows,
    logits: torch.Tensor,
    target_R: np.ndarray,
    config: DecodeConfig,
    seed: int,
    kind: Kind,
) -> Step:
    """One token per unfinished row, written at `target_R`."""
    tokens, confidence = draw(logits, target_R[:, None], state, config, seed)
    chosen_R1 = ~state.done_R[:, None]
    tokens_R1, confidence_R1 = to_host(tokens, confidence)
    state.reveal(target_R[:, None], tokens_R1, chosen_R1)
    return state.step(kind, target_R, 1, target_R[:, None], confidence_R1, chosen_R1)
