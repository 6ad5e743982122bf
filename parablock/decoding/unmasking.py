"""Which tokens a denoising step proposes, and which of them it reveals.

Shapes: R rows, S positions of the current sub-block, V vocabulary. A setting is one value, or a tensor that broadcasts
over the rows when each has its own.
"""

import numpy as np
import torch
from torch import Tensor

from parablock.decoding.config import Strategy


def propose(
    logits_RSV: Tensor,
    uniform_RS: Tensor | None,
    *,
    temperature: float | Tensor = 1.0,
    top_p: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    min_p: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A token for every position and its confidence: the probability it has under the decoding distribution.

    Greedy (`uniform_RS` is None): the most probable token. Otherwise a sample of softmax(logits / temperature), cut to
    the tokens with at least `min_p` times the largest probability and to its `top_k` most probable tokens, then to
    their `top_p` nucleus, and renormalised; drawn by inverse transform from `uniform_RS` in [0, 1). Settings that are
    tensors broadcast to `[R, S, 1]`.

    Returns `tokens_RS` and `confidence_RS` (float32).
    """
    if uniform_RS is None:
        confidence, tokens = torch.softmax(logits_RSV.float(), -1).max(-1)
        return tokens, confidence
    probability, order = torch.softmax(logits_RSV.float() / temperature, -1).sort(-1, descending=True)
    if min_p is not None:
        probability = probability.masked_fill(probability < min_p * probability[..., :1], 0.0)
    if top_k is not None:
        place = torch.arange(probability.shape[-1], device=probability.device)
        probability = probability.masked_fill(place >= top_k, 0.0)
    cumulative = probability.cumsum(-1)
    # the most probable token always belongs to it
    nucleus = cumulative - probability < top_p * cumulative[..., -1:]
    probability = probability * nucleus
    cumulative = probability.cumsum(-1)
    total = cumulative[..., -1:]
    rank = torch.searchsorted(cumulative, uniform_RS[..., None] * total, right=True)
    rank = rank.minimum(nucleus.sum(-1, keepdim=True) - 1)
    return order.gather(-1, rank)[..., 0], (probability / total).gather(-1, rank)[..., 0]


def reveal(
    confidence_RS: np.ndarray,
    candidates_RS: np.ndarray,
    strategy: Strategy,
    *,
    threshold: float | np.ndarray = 0.9,
    factor: float | np.ndarray = 1.0,
    tokens_per_step: int | np.ndarray = 1,
) -> np.ndarray:
    """Which of the masked positions `candidates_RS` (bool) to reveal: at least one in every row that has any.

    - threshold: all whose confidence is above `threshold`, and the most confident one (Fast-dLLM, algorithm 1);
    - factor: the largest n with (n + 1)(1 - c_n) < factor, c sorted in descending order (Fast-dLLM, section 3.3);
    - fixed: the `tokens_per_step` most confident.

    Settings that are arrays broadcast to `[R, S]`.
    """
    chosen: np.ndarray
    confidence = np.where(candidates_RS, confidence_RS, np.float32(-1))
    if strategy == "threshold":
        chosen = confidence > threshold
        chosen[np.arange(len(chosen)), confidence.argmax(-1)] = True
        chosen &= candidates_RS
        return chosen
    order = np.argsort(-confidence, axis=-1, kind="stable")
    rank = np.arange(1, confidence.shape[-1] + 1)  # n
    if strategy == "factor":
        ordered = np.take_along_axis(confidence, order, -1)
        allowed = ((rank + 1) * (1 - ordered) < factor) & (ordered >= 0)
        count: int | np.ndarray = (allowed * rank).max(-1, keepdims=True).clip(min=1)
    else:
        count = tokens_per_step
    taken = np.broadcast_to(rank <= count, candidates_RS.shape)
    chosen = np.zeros_like(candidates_RS)
    np.put_along_axis(chosen, order, taken, -1)
    chosen &= candidates_RS
    return chosen


def uniform(seed: int | Tensor, row_R1: Tensor, position_RS: Tensor, draw_R1: Tensor) -> Tensor:
    """Counter-based random numbers in [0, 1), float32: a hash of `(seed, row, position, draw)`.

    A row's numbers depend on nothing else, so neither on its neighbours in the batch nor on the device.
    """
    state = torch.zeros_like(position_RS) + seed
    for part in (row_R1, position_RS, draw_R1):
        state = _mix(state ^ _mix(part.expand_as(state) + 1))
    return (state >> 40 & 0xFFFFFF).float() / 2**24


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64, in wrapping 64-bit arithmetic."""
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & 0x1FFFFFFFF)


def sent(numbers: np.ndarray, device: torch.device) -> Tensor:
    """On the device, without waiting for the forward that runs there."""
    return torch.from_numpy(numbers).to(device, non_blocking=True)
