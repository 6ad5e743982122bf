"""The forward process: clean ids x0 -> noisy ids xt, block by block, and the complementary pair of views.

Fast-dLLM v2, section 3.1. Everything is a pure function; a sample's noise depends on `(seed, epoch, sample)` alone, so
it is the same whatever the batch size, the number of workers or of machines.
"""

import hashlib

import torch
from torch import Tensor

MIN_MASK_PROBABILITY = 1e-3


def mask_probability(t: Tensor) -> Tensor:
    """`t ~ U(0, 1)` -> the probability that a position is masked, `(1 - 1e-3) t + 1e-3`."""
    return (1 - MIN_MASK_PROBABILITY) * t + MIN_MASK_PROBABILITY


def seeded_generator(*key: int | str) -> torch.Generator:
    """A generator on the CPU that depends on `key` alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def sample_noise(length: int, block_size: int, *, seed: int, epoch: int, sample: int) -> Tensor:
    """The noise mask `[length]` (bool, True: masked in the first view) of one sample.

    Each block of `block_size` positions draws its own `t`. `length` need not be a multiple of `block_size`.
    """
    generator = seeded_generator(seed, epoch, sample)
    blocks = -(-length // block_size)
    p = mask_probability(torch.rand(blocks, 1, generator=generator))
    u = torch.rand(blocks, block_size, generator=generator)
    return (u < p).flatten()[:length]


def complementary_views(noise_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which positions each of the two views masks (bool, shaped like `labels`).

    Only positions with a label are ever noised; the second view masks exactly those that the first leaves visible, so
    every response token is learned once.
    """
    learned = labels != -100
    return noise_mask & learned, ~noise_mask & learned
