"""The choices that block diffusion leaves to its training."""

from typing import Literal

FirstTokenContext = Literal["noisy", "clean"]  # what predicts a block's first token: the block before it, as published
