"""Autoregressive decoding: one token per row and forward. The honest baseline of every speed-up."""

import numpy as np

from parablock.decoding.rows import Rows
from parablock.decoding.work import Mode, Work, settle_all


def next_work(rows: Rows, which: np.ndarray) -> Work:
    """The latest token of every row, which predicts the next."""
    position_n, one_n, number_n = rows.start_R[which], np.ones_like(which), np.arange(len(which))
    nothing_n = np.zeros_like(which)  # a token's random number depends on its position alone
    next_n = position_n + 1
    return Work(which, position_n, one_n, one_n, one_n, number_n, nothing_n, next_n, nothing_n, next_n, settle_all)


AUTOREGRESSIVE = Mode(causal=True, next_work=next_work)
