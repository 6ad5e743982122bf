"""A prompt's own tokens predicted: how likely the model finds them, from left to right (the chain rule).

Causally, a prefill's queries predict the tokens behind them. In block diffusion token i is predicted from all tokens
before it, with the rest of its block masked (`evals/likelihood.py` has the same definition, for many texts at once): a
forward for every token, a block's first one from the clean block before it. No text of an answer stands before these
predictions (`text_m` is 0): neither penalties nor grammars mean them.

Shapes: n rows, m predictions, D block size.
"""

from dataclasses import replace

import numpy as np

from parablock.decoding.rows import Rows
from parablock.decoding.work import Placed, Work


def scoring(rows: Rows, which: np.ndarray) -> np.ndarray:
    """Which of these rows run `score` before anything else `[n]`."""
    open_n: np.ndarray = (rows.grain_R[which] > 1) & (rows.scored_R[which] < rows.prompt_R[which])
    return open_n


def score(rows: Rows, which: np.ndarray) -> Work:
    """The next token of every row's prompt, from its block as it stood: what comes before is known, the rest masked."""
    D, start_n, target_n = rows.block_size, rows.start_R[which], rows.scored_R[which]
    position_nD = start_n[:, None] + np.arange(D)
    mask_n1 = rows.settings_R["mask_token_id"][which, None]
    ids_nD = np.where(position_nD < target_n[:, None], rows.ids_RC[which[:, None], position_nD], mask_n1)
    full_n, number_n = target_n == start_n + D, np.arange(len(which))
    limit_q = np.repeat(start_n + D, D)
    placed = Placed(ids_nD.ravel(), position_nD.ravel(), limit_q, 0 * limit_q, 0 * limit_q)
    return Work(
        which, start_n, np.full_like(which, D), np.full_like(which, D), D * full_n, number_n, target_n - 1 - start_n,
        target_n, 0 * target_n, 0 * target_n, settle, decoding=False, placed=placed,
    )  # fmt: skip


def also_score(rows: Rows, work: Work) -> Work:
    """A prefill whose causal rows predict their prompts, too, where that is asked for."""
    first_n = work.first_n
    low_n = np.maximum(rows.scored_R[work.rows_n], first_n + 1)
    high_n = np.minimum(first_n + work.final_n, rows.prompt_R[work.rows_n] - 1)
    count_n = np.maximum(high_n - low_n + 1, 0) * (work.grain_n == 1)
    if not count_n.any():
        return work
    piece_k = np.repeat(np.arange(len(count_n)), count_n)
    target_k = low_n[piece_k] + np.arange(len(piece_k)) - (count_n.cumsum() - count_n)[piece_k]
    piece_m, target_m = np.concatenate([work.piece_m, piece_k]), np.concatenate([work.target_m, target_k])
    order_m = np.lexsort([target_m, piece_m])
    piece_m, target_m = piece_m[order_m], target_m[order_m]
    return replace(
        work, piece_m=piece_m, query_m=target_m - 1 - first_n[piece_m], target_m=target_m, draw_m=0 * piece_m,
        text_m=target_m * (target_m >= rows.prompt_R[work.rows_n[piece_m]]), settle=settle,
    )  # fmt: skip


def settle(rows: Rows, work: Work, tokens_m: np.ndarray, confidence_m: np.ndarray) -> np.ndarray:
    """What is predicted behind a prompt becomes known; the prompt is known already."""
    row_m = work.row_m
    chosen_m: np.ndarray = work.target_m >= rows.prompt_R[row_m]
    rows.start_R[work.rows_n] += work.final_n
    rows.reveal(row_m[chosen_m], work.target_m[chosen_m], tokens_m[chosen_m])
    np.maximum.at(rows.scored_R, row_m, work.target_m + 1)
    return chosen_m
