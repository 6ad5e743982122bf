"""Speculative decoding: the autoregressive answer, several tokens per forward where they could be guessed.

A forward runs the last known token and some drafts behind it. Its predictions are those of autoregressive decoding as
far as the drafts are right: these are accepted, with the prediction behind the last of them. All their K/V are final;
those of wrong drafts lie where the next forward writes.

Shapes: n rows, m predictions, M tokens guessed, W widths, k of the n rows.
"""

from functools import partial

import numpy as np

from parablock.decoding.drafts import lookup
from parablock.decoding.modes.autoregressive import AUTOREGRESSIVE
from parablock.decoding.pace import Pace
from parablock.decoding.rows import Rows
from parablock.decoding.work import Mode, Work

WIDTHS_W1 = np.array([[2], [4], [8]])  # with the token before the drafts; few, so that pieces stay alike
SURE = 1.05  # so much faster must drafting seem: what is known of it is never exact
PAUSE = 4  # forwards that do not even look for guesses, after one in which none was worth a draft
LATE, SLOW = 0.9, 0.98  # how much remains of what was known of a row's chance after one more guess, and of all rows'


def next_work(rows: Rows, which: np.ndarray) -> Work:
    """The latest token of every row with its drafts; every prediction is asked for.

    Drafts stand in `ids_RC`, at positions that remain masked. Of a row with guesses one more is compared than is run:
    so it is known how good they are, drafts or not.
    """
    pace, fixed_n = rows.pace, rows.fixed_R[which]
    pace.rows = len(which)
    if pace.pause and not fixed_n.any():
        pace.pause -= 1
        rows.alike_R[which] = 0
        return AUTOREGRESSIVE.next_work(rows, which)
    ahead_n, start_n = rows.ahead_R[which], rows.start_R[which]
    guess_nM, found_n = lookup(rows, which, 1 + int(ahead_n.max()))
    if not found_n.any():
        return AUTOREGRESSIVE.next_work(rows, which)
    # an answer's last token is not run; nor is what has no place for its K/V
    most_n = np.minimum(np.minimum(rows.end_R[which] - 2, rows.room_R[which] - 1) - start_n, ahead_n) * found_n
    width_n = 1 + most_n * fixed_n
    open_n = (found_n & ~fixed_n).nonzero()[0]
    if len(open_n):
        width_n[open_n] = _widths(pace, width_n, rows.chance_R[which[open_n]], most_n[open_n])
    last_n = width_n.cumsum()
    pace.drafts = bool(last_n[-1] > len(which))
    pace.pause = 0 if pace.drafts else PAUSE

    begin_n = last_n - width_n
    piece_m = np.arange(len(which)).repeat(width_n)
    query_m = np.arange(len(piece_m)) - begin_n[piece_m]
    target_m = start_n[piece_m] + query_m + 1
    guess_m = np.where(found_n[piece_m], guess_nM[piece_m, query_m], -1)
    if pace.drafts:
        drafts_m = (query_m + 1 < width_n[piece_m]).nonzero()[0]
        rows.ids_RC[which[piece_m[drafts_m]], target_m[drafts_m]] = guess_m[drafts_m]
    one_n = np.ones_like(which)
    return Work(
        which, start_n, width_n, one_n, one_n, piece_m, query_m, target_m, np.zeros_like(piece_m),
        partial(settle, guess_m=guess_m, begin_n=begin_n),
    )  # fmt: skip


def _widths(pace: Pace, width_n: np.ndarray, chance_k: np.ndarray, most_k: np.ndarray) -> np.ndarray:
    """How many tokens each of some rows runs, so that the forward makes the most tokens per second.

    All that draft have one width: the rows that gain the most by it, as many as pay. A draft's gain is the chance that
    it and all before it are right. What runs beside is worth the time it takes.
    """
    width_k = np.ones_like(most_k)
    if (chance_k / (1 - chance_k)).sum() <= (SURE - 1) * len(width_n):  # not even for nothing
        return width_k
    gain_Wk = np.where(most_k >= WIDTHS_W1 - 1, (chance_k - chance_k**WIDTHS_W1) / (1 - chance_k), 0)
    order_Wk = np.argsort(-gain_Wk, axis=1, kind="stable")
    tokens, more_k = pace.padded or int(width_n.sum()), np.arange(1, len(chance_k) + 1)
    plain, whole = pace.seconds(np.array([tokens, tokens + pace.beside]), drafts=False)
    worth = len(width_n) * whole / plain
    tokens_Wk = tokens + pace.beside + (WIDTHS_W1 - 1) * (pace.padded or more_k)
    made_Wk = worth + np.take_along_axis(gain_Wk, order_Wk, 1).cumsum(1)
    rate_Wk = made_Wk / np.maximum.accumulate(pace.seconds(tokens_Wk, drafts=True), axis=1)
    best, last = np.unravel_index(rate_Wk.argmax(), rate_Wk.shape)
    if rate_Wk[best, last] > SURE * worth / whole:
        drafting = order_Wk[best, : last + 1]
        width_k[drafting] = np.where(gain_Wk[best, drafting] > 0, WIDTHS_W1[best], 1)
    return width_k


def settle(
    rows: Rows, work: Work, tokens_m: np.ndarray, confidence_m: np.ndarray, guess_m: np.ndarray, begin_n: np.ndarray
) -> np.ndarray:
    """Every row accepts its drafts up to the first wrong one, and the prediction behind them. `guess_m` -1: none."""
    which, row_m, width_n = work.rows_n, work.row_m, work.width_n
    right_m = (tokens_m == guess_m) & ~rows.stopping(row_m, tokens_m)
    # how many guesses of a row are right before the first that is not
    right_n = np.minimum.reduceat(np.where(right_m, width_n[work.piece_m], work.query_m), begin_n)
    accepted_n = np.minimum(right_n, width_n - 1)
    chosen_m: np.ndarray = work.query_m <= accepted_n[work.piece_m]
    if rows.pace.drafts:
        rows.ids_RC[row_m, work.target_m] = np.maximum(rows.settings_R["mask_token_id"][row_m], 0)
        rows.drafted_R[which] += width_n - 1
        rows.accepted_R[which] += accepted_n
    rows.reveal(row_m[chosen_m], work.target_m[chosen_m], tokens_m[chosen_m])
    rows.start_R[which] += accepted_n + 1
    _learn(rows, which, right_n, width_n, guess_m[begin_n] >= 0)
    return chosen_m


def _learn(rows: Rows, which: np.ndarray, right_n: np.ndarray, width_n: np.ndarray, guessed_n: np.ndarray) -> None:
    """Of the guesses of the rows, `right_n` were right, and if that was not the whole width, the next one wrong."""
    whole_n = right_n == width_n
    rows.alike_R[which] = (rows.alike_R[which] + width_n) * whole_n
    which, right_k, whole_k = which[guessed_n], right_n[guessed_n], whole_n[guessed_n]
    chance_k = 1 - (1 - rows.chance_R[which]) * LATE**right_k
    rows.chance_R[which] = np.minimum(np.where(whole_k, chance_k, LATE * chance_k), 0.99)
    right = int(right_k.sum())
    tried = right + len(which) - int(whole_k.sum())
    rows.pace.chance = right / tried + SLOW**tried * (rows.pace.chance - right / tried)


SPECULATIVE = Mode(causal=True, next_work=next_work)
