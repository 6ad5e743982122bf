"""What both decoding loops share: the rows' tokens, the rule that ends a row, and the step that a caller sees.

Shapes: R rows, C capacity of the token buffers, W width of the window a step shows, S positions proposed in a step.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from parablock.decoding.config import DecodeConfig
from parablock.decoding.unmasking import propose, uniform

Kind = Literal["prefill", "denoise", "commit", "autoregressive"]


@dataclass(frozen=True)
class Limits:
    """When a row ends: after `max_new_tokens`, or with one of `stop_token_ids`."""

    max_new_tokens: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One forward, as a caller sees it.

    `start [R]`: where the shown window begins (absolute position). `ids [R, W]` and `masked [R, W]`: its tokens, and
    which are still unknown. `revealed [R, W]`: what this step revealed; `confidence [R, W]`: with which confidence (nan
    elsewhere). `new_tokens [R]`: how many response tokens each row has so far without a gap; `decode_forwards [R]`: in
    how many forwards it took part, prefill excluded; `done [R]`: finished rows.
    """

    kind: Kind
    start: np.ndarray
    ids: np.ndarray
    masked: np.ndarray
    revealed: np.ndarray
    confidence: np.ndarray
    new_tokens: np.ndarray
    decode_forwards: np.ndarray
    done: np.ndarray
    _rows: "Rows" = field(repr=False)

    def tokens(self, row: int = 0) -> list[int]:
        """The response of a row so far, up to its first masked position."""
        start = int(self._rows.prompt_R[row])
        ids: list[int] = self._rows.ids_RC[row, start : start + int(self.new_tokens[row])].tolist()
        return ids


@dataclass
class Rows:
    """The rows' tokens on the host. Positions from `prompt_R` on are the response.

    In block diffusion a masked position of `ids_RC` holds the mask token; `masked_RC` alone says what is masked (a
    prompt may hold mask tokens, too).
    """

    ids_RC: np.ndarray
    masked_RC: np.ndarray
    prompt_R: np.ndarray
    limits: Limits
    done_R: np.ndarray = field(init=False)
    length_R: np.ndarray = field(init=False)  # response tokens so far, without a gap, the stop token included
    stop_R: np.ndarray = field(init=False)  # position of the first stop token of the response, or far beyond
    forwards_R: np.ndarray = field(init=False)  # decode forwards (prefill not counted)

    def __post_init__(self) -> None:
        self.done_R = np.zeros(len(self.prompt_R), dtype=bool)
        self.length_R = np.zeros_like(self.prompt_R)
        self.stop_R = np.full_like(self.prompt_R, np.iinfo(np.int64).max - 1)
        self.forwards_R = np.zeros_like(self.prompt_R)

    def reveal(self, target_RS: np.ndarray, tokens_RS: np.ndarray, chosen_RS: np.ndarray) -> None:
        """Write the chosen tokens, then end the rows that hold a whole response.

        A row ends with a stop token that has no mask before it, or when `max_new_tokens` stand without a gap.
        """
        rows, slots = chosen_RS.nonzero()
        targets, tokens = target_RS[rows, slots], tokens_RS[rows, slots]
        self.ids_RC[rows, targets] = tokens
        self.masked_RC[rows, targets] = False
        stops = np.isin(tokens, self.limits.stop_token_ids)
        np.minimum.at(self.stop_R, rows[stops], targets[stops])
        # the buffer's end is always masked, so there is a first gap
        end_R = np.minimum(self.masked_RC.argmax(1), self.prompt_R + self.limits.max_new_tokens)
        stopped_R = self.stop_R < end_R
        length_R = np.where(stopped_R, self.stop_R + 1, end_R) - self.prompt_R
        self.length_R = np.where(self.done_R, self.length_R, length_R)
        self.done_R = self.done_R | stopped_R | (length_R == self.limits.max_new_tokens)

    def step(
        self,
        kind: Kind,
        start_R: np.ndarray,
        width: int,
        target_RS: np.ndarray,
        confidence_RS: np.ndarray,
        chosen_RS: np.ndarray,
    ) -> Step:
        """A snapshot of the window `start_R .. start_R + width` after a forward."""
        rows = np.arange(len(start_R))[:, None]
        window = start_R[:, None] + np.arange(width)
        confidence = np.full(window.shape, np.nan, dtype=np.float32)
        revealed = np.zeros(window.shape, dtype=bool)
        r, s = chosen_RS.nonzero()
        column = target_RS[r, s] - start_R[r]
        inside = (column >= 0) & (column < width)
        r, s, column = r[inside], s[inside], column[inside]
        confidence[r, column] = confidence_RS[r, s]
        revealed[r, column] = True
        return Step(
            kind, start_R.copy(), self.ids_RC[rows, window], self.masked_RC[rows, window], revealed, confidence,
            self.length_R.copy(), self.forwards_R.copy(), self.done_R.copy(), self,
        )  # fmt: skip


def token_buffer(prompts: list[list[int]], capacity: int, fill: int) -> np.ndarray:
    """The prompts in rows of `capacity` tokens, `fill` after them."""
    ids_RC = np.full((len(prompts), capacity), fill, dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids_RC[row, : len(prompt)] = prompt
    return ids_RC


def draw(
    logits_RSV: Tensor, target_RS: np.ndarray, state: Rows, config: DecodeConfig, seed: int
) -> tuple[Tensor, Tensor]:
    """Tokens and confidences `[R, S]` for the positions `target_RS`; the mask token is never among them."""
    device = logits_RSV.device
    if config.mask_token_id is not None:
        logits_RSV[..., config.mask_token_id] = -torch.inf
    numbers = None
    if config.temperature > 0.0:
        row = torch.arange(len(target_RS), device=device)[:, None]
        forward = torch.from_numpy(state.forwards_R).to(device)[:, None]
        numbers = uniform(seed, row, torch.from_numpy(target_RS).to(device), forward)
    return propose(logits_RSV, numbers, temperature=config.temperature, top_p=config.top_p, top_k=config.top_k)


def to_host(tokens: Tensor, confidence: Tensor, *chosen: Tensor) -> tuple[np.ndarray, ...]:
    """What a step proposed, in one transfer: the only place where decoding waits for the device."""
    packed = torch.stack([tokens.double(), confidence.double(), *(c.double() for c in chosen)]).cpu().numpy()
    return (packed[0].astype(np.int64), packed[1].astype(np.float32), *(p.astype(bool) for p in packed[2:]))
