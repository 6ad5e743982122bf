"""Who attends to whom: the dense masks, and the block layout of a training step.

Shapes: B rows, L tokens a row, D block size, N blocks a row (L = N D), U units, T = U D tokens of a step.

A training step is a list of *units*. A unit is one block of one sample as one stream shows it: clean, or noisy in the
first or the second view. Every unit attends to itself, both directions, and to the clean units before it in its sample;
that one sentence is the block-diffusion mask (Fast-dLLM v2, section 3.1). Units that nothing needs are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from parablock.diffusion.flex import block_mask

CLEAN, NOISY, COMPLEMENT = 0, 1, 2  # the streams


def block_causal_mask(length: int, block_size: int, device: torch.device | str = "cpu") -> Tensor:
    """The mask of inference `[length, length]` (bool, True: attend): a position sees its own block and those before."""
    block = torch.arange(length, device=device) // block_size
    return block[:, None] >= block[None, :]


def block_diffusion_mask(length: int, block_size: int, views: int = 1, device: torch.device | str = "cpu") -> Tensor:
    """The training mask over `[xt ; ... ; x0]` with `views` noisy copies: `[(views + 1) length] ** 2` (bool).

    A noisy block sees itself and the clean blocks before it, a clean block itself and the clean blocks before it.
    """
    block = (torch.arange(length, device=device) // block_size).repeat(views + 1)
    stream = torch.arange(views + 1, device=device).repeat_interleave(length)
    own = (block[:, None] == block[None, :]) & (stream[:, None] == stream[None, :])
    return own | ((stream == views)[None, :] & (block[:, None] > block[None, :]))


class Units(Protocol):
    """What one forward runs over: units of `block_size` tokens, U of them, and what each attends to.

    `groups`: ranges of units, and for each the units before them that they attend to `[units in the range, number]`.
    """

    @property
    def block_size(self) -> int:
        """D."""

    @property
    def groups(self) -> tuple[tuple[int, int, Tensor], ...]:
        """In order of the units, whose block numbers are equal within a range."""

    def positions(self) -> Tensor:
        """Position ids `[1, T]`."""

    def dense_mask(self, window: int = 0) -> Tensor:
        """The mask `[1, 1, T, T]` (bool) of a layer with such a window: the readable reference, quadratic memory."""

    def flex_mask(self, window: int = 0) -> Any:
        """The same as a flex-attention `BlockMask` (CUDA skips its empty tiles)."""


@dataclass(frozen=True)
class BlockLayout:
    """The units of one training step, in order of their block number, and what each attends to.

    `stream`, `row`, `block`: `[U]`, where each unit stands in the batch. `sample`, `number`: `[U]`, which sample it
    belongs to, and how many blocks of it come before. `unit_of` `[3, B, N]`: the unit of a (stream, row, block), -1
    where it was left out. `groups`: for each number that occurs, the range of its units and the clean units before
    each of them `[units in the range, number]`.
    """

    block_size: int
    stream: Tensor
    row: Tensor
    block: Tensor
    sample: Tensor
    number: Tensor
    unit_of: Tensor
    groups: tuple[tuple[int, int, Tensor], ...]

    @property
    def tokens(self) -> int:
        """T: how many tokens the step's one forward runs over."""
        return int(self.block.shape[0]) * self.block_size

    def gather(self, views: Tensor) -> Tensor:
        """The units' slices of `views [3, B, L]` (one row of values per stream), as `[1, T]`."""
        blocks = views.view(*views.shape[:2], -1, self.block_size)
        return blocks[self.stream, self.row, self.block].view(1, -1)

    def positions(self) -> Tensor:
        """Position ids `[1, T]`: every stream counts from the start of its sample."""
        start = self.number * self.block_size
        return (start[:, None] + torch.arange(self.block_size, device=start.device)).view(1, -1)

    def dense_mask(self, window: int = 0) -> Tensor:
        """See `Units`."""
        own = torch.eye(len(self.block), dtype=torch.bool, device=self.block.device)
        before = self.number[:, None] > self.number[None, :]
        units = own | (before & (self.sample[:, None] == self.sample[None, :]) & (self.stream == CLEAN)[None, :])
        return dense_mask_of_units(units, self.positions(), window)

    def flex_mask(self, window: int = 0) -> Any:
        """See `Units`."""
        size, stream, sample, number = self.block_size, self.stream, self.sample, self.number

        def attends(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            q_unit, k_unit = q // size, k // size
            before = (number[q_unit] > number[k_unit]) & (sample[q_unit] == sample[k_unit]) & (stream[k_unit] == CLEAN)
            return (q_unit == k_unit) | before

        return flex_mask_of_tokens(attends, self.positions(), window)


def dense_mask_of_units(units: Tensor, positions: Tensor, window: int) -> Tensor:
    """`[1, 1, T, T]` (bool): tokens at `positions [1, T]` see those of the units that theirs attends to (`[U, U]`)."""
    size = positions.shape[1] // len(units)
    tokens = units.repeat_interleave(size, 0).repeat_interleave(size, 1)[None, None]
    return tokens & near(positions, positions, window)[:, None] if window else tokens


def near(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    """Which positions `keys [..., K]` a window lets those of `queries [..., Q]` see: `[..., Q, K]` (bool)."""
    seen: Tensor = queries[..., :, None] - keys[..., None, :] < window
    return seen


def flex_mask_of_tokens(attends: Callable[..., Tensor], positions: Tensor, window: int) -> Any:
    """The `BlockMask` of a rule over token indices `(batch, head, query, key)`, and of a window over `positions`."""
    (position,) = positions

    def in_window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen: Tensor = attends(b, h, q, k) & (position[q] - position[k] < window)
        return seen

    return block_mask(in_window if window else attends, len(position), position.device)


def block_layout(first: Tensor, second: Tensor, block_size: int, samples: Tensor | None = None) -> BlockLayout:
    """The units that a step needs, given what its two views mask (`[B, L]` bool each).

    `samples [B, N]`: which sample of its row each block belongs to (a sample's blocks stand together); by default a row
    is one sample. A noisy copy of a block that masks nothing would equal the clean copy, so it is left out (prompt-only
    blocks most of all); a clean block is left out when no noisy block of its sample comes after it.
    """
    rows, length = first.shape
    blocks = length // block_size
    noisy = torch.stack([first, second]).view(2, rows, blocks, block_size).any(-1)  # [2, B, N]
    start, end = sample_bounds(torch.zeros_like(noisy[0], dtype=torch.long) if samples is None else samples)
    so_far = noisy.any(0).long().cumsum(-1)
    later_noisy = so_far.gather(-1, end) - so_far  # noisy blocks of the sample strictly after each block
    present = torch.stack([later_noisy > 0, noisy[0], noisy[1]])  # [3, B, N]

    stream, row, block = present.nonzero(as_tuple=True)
    order = (block - start[row, block]).argsort(stable=True)
    stream, row, block = stream[order], row[order], block[order]
    first_block = start[row, block]
    number = block - first_block
    unit_of = torch.full(present.shape, -1, device=first.device)
    unit_of[stream, row, block] = torch.arange(len(block), device=first.device)

    groups = []
    begin = 0
    for blocks_before, count in enumerate(torch.bincount(number).tolist()):
        if count:
            these = slice(begin, begin + count)
            earlier = first_block[these, None] + torch.arange(blocks_before, device=first.device)
            groups.append((begin, begin + count, unit_of[CLEAN][row[these, None], earlier]))
            begin += count
    return BlockLayout(block_size, stream, row, block, row * blocks + first_block, number, unit_of, tuple(groups))


def sample_bounds(samples: Tensor) -> tuple[Tensor, Tensor]:
    """For every block of `samples [B, N]`: the first and the last block of its sample."""
    index = torch.arange(samples.shape[1], device=samples.device).expand_as(samples)
    changes = torch.ones_like(samples, dtype=torch.bool)
    changes[:, 1:] = samples[:, 1:] != samples[:, :-1]
    start = torch.where(changes, index, 0).cummax(-1).values
    last = torch.ones_like(changes)
    last[:, :-1] = changes[:, 1:]
    end = torch.where(last, index, samples.shape[1]).flip(-1).cummin(-1).values.flip(-1)
    return start, end
