"""The choices and limits that decoding shares with training."""

from typing import Literal

FirstTokenContext = Literal["noisy", "clean"]  # what predicts a block's first token: the block before it, as published
MOST_MASKS = 15  # of a draft block in causal context
