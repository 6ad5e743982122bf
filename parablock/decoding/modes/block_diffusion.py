"""Block diffusion (Fast-dLLM v2, section 3.3): a block is denoised sub-block by sub-block, then committed.

Shapes: n rows, m predictions, D block size, S positions of a sub-block.
"""

import numpy as np

from parablock.decoding.guides import allowed_prefix
from parablock.decoding.rows import STRATEGIES, Rows
from parablock.decoding.unmasking import reveal
from parablock.decoding.work import Mode, Work


def next_work(rows: Rows, which: np.ndarray) -> Work:
    """Every row's current sub-block, alone or in its whole block, or the commit of a full block."""
    D = rows.block_size
    start_n, settings_n = rows.start_R[which], rows.settings_R[which]
    sub_size_n = settings_n["sub_block_size"]
    masked_nD = rows.masked_block(which)
    commit_n = np.logical_not(masked_nD.any(1))
    first_n = masked_nD.argmax(1)  # the first masked position; sub-blocks are revealed left to right
    sub_n = first_n // sub_size_n * sub_size_n  # where its sub-block begins
    # the token shift takes the prediction of a sub-block's first position from outside it
    whole_n = commit_n | ~rows.written_R[which] | (sub_n == first_n) | ~settings_n["sub_block_cache"]

    offset_n = np.where(whole_n, 0, sub_n)
    place_D = np.arange(D)
    wanted_nD = masked_nD & (place_D < (sub_n + sub_size_n)[:, None])
    wanted_nD[commit_n, 0] = True  # a committing row asks its last position for the next block's first token
    piece_m, place_m = wanted_nD.nonzero()
    commit_m = commit_n[piece_m]
    query_m = np.where(commit_m, D - 1, np.maximum(place_m - 1 - offset_n[piece_m], 0))
    target_m = start_n[piece_m] + np.where(commit_m, D, place_m)
    return Work(
        which, start_n + offset_n, np.where(whole_n, D, sub_size_n), np.full_like(which, D), D * commit_n, piece_m,
        query_m, target_m, rows.forwards_R[which][piece_m], (start_n + np.where(commit_n, D, first_n))[piece_m], settle,
    )  # fmt: skip


def settle(rows: Rows, work: Work, tokens_m: np.ndarray, confidence_m: np.ndarray) -> np.ndarray:
    """Each row reveals what its strategy chooses among the masked positions of its sub-block."""
    row_m = work.row_m
    chosen_m = _choose(rows, work, confidence_m)
    if rows.guided_R.any():
        chosen_m = allowed_prefix(rows, work, tokens_m, chosen_m)
    rows.start_R[work.rows_n] += work.final_n
    rows.written_R[work.rows_n] = work.final_n == 0
    rows.reveal(row_m[chosen_m], work.target_m[chosen_m], tokens_m[chosen_m])
    return chosen_m


def _choose(rows: Rows, work: Work, confidence_m: np.ndarray) -> np.ndarray:
    n = len(work.rows_n)
    if len(confidence_m) == n:  # one candidate each
        return np.ones(n, dtype=bool)
    settings_n = rows.settings_R[work.rows_n]
    column_m = work.target_m % settings_n["sub_block_size"][work.piece_m]  # its place in the sub-block
    shape = (n, int(column_m.max()) + 1)
    candidates_nS, confidence_nS = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=np.float32)
    place = work.piece_m, column_m
    candidates_nS[place], confidence_nS[place] = True, confidence_m
    chosen_nS = np.zeros(shape, dtype=bool)
    for number in set(settings_n["strategy"].tolist()):
        these = settings_n["strategy"] == number
        own = {name: settings_n[name][these, None] for name in ("threshold", "factor", "tokens_per_step")}
        chosen_nS[these] = reveal(confidence_nS[these], candidates_nS[these], STRATEGIES[number], **own)
    chosen_m: np.ndarray = chosen_nS[place]
    return chosen_m


BLOCK_DIFFUSION = Mode(causal=False, next_work=next_work)
