"""Speculative decoding: the autoregressive answer, several tokens per forward where they could be guessed.

A forward runs the last known token, some drafts behind it (the chain), and draft blocks: masks for what may come out.
The predictions of the chain are those of autoregressive decoding as far as the drafts are right: these are accepted,
with the prediction behind the last of them. What the masks of that outcome predict are the next forward's drafts. K/V
of accepted tokens are final; those of wrong drafts and of masks lie where the next forward writes.

Shapes: n rows, m predictions (one of every query), L drafts of the longest chain, G = L + 1 outcomes (so many drafts
are right), k masks of a draft block, C = L + G k candidates for a place in the forward, M tokens looked up.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from parablock.decoding.drafts import lookup
from parablock.decoding.modes.autoregressive import AUTOREGRESSIVE
from parablock.decoding.pace import choose_widths
from parablock.decoding.rows import DRAFTERS, Rows
from parablock.decoding.work import Mode, Placed, Work
from parablock.diffusion.config import MOST_MASKS

LATE, SLOW = 0.9, 0.98  # how much remains of what was known of a row's chance after one more guess, and of all rows'
NEVER = np.iinfo(np.int64).max
MASKS, LOOKUP = (DRAFTERS.index(name) for name in ("masks", "lookup"))


@dataclass(frozen=True)
class Chain:
    """The drafts of some rows: `ids_nL`, how likely each is right if those before it are (0: no draft), from where.

    `looked_nM`: what was looked up, drafted or not, and `found_n`: whether it was.
    """

    ids_nL: np.ndarray
    sure_nL: np.ndarray
    source_n: np.ndarray
    looked_nM: np.ndarray
    found_n: np.ndarray


@dataclass(frozen=True)
class Asked:
    """The predictions of a forward: the outcome a mask belongs to (-1: none, a known token or draft) and its place."""

    chain: Chain
    begin_n: np.ndarray  # where a piece's predictions begin
    drafts_n: np.ndarray  # how many drafts it runs
    outcome_m: np.ndarray
    place_m: np.ndarray


def next_work(rows: Rows, which: np.ndarray) -> Work:
    """The latest token of every row, its drafts and masks; every query's prediction is asked for.

    Drafts stand in `ids_RC`, at positions that remain masked. Of a row that looks up one token more is compared than is
    run: so it is known how good guesses are, drafted or not.
    """
    pace, fixed_n = rows.pace, rows.fixed_R[which]
    pace.rows = len(which)
    if not rows.most_R[which].any() or (not fixed_n.any() and pace.rests(len(which))):
        return _nothing(rows, which)
    # how many positions may still be run: an answer's last token is not, nor is what has no place for its K/V
    room_n = rows.room_R[which] - 1 - rows.start_R[which]
    ahead_n = np.minimum(rows.end_R[which] - 2 - rows.start_R[which], room_n)
    chain, later = _chain(rows, which, ahead_n), pace.later()
    value_nC = _values(rows, which, chain, ahead_n, later)
    if not value_nC.any():
        return _nothing(rows, which) if not chain.found_n.any() else _work(rows, which, chain, value_nC > 0)
    order_nC = np.argsort(-value_nC, axis=1, kind="stable")
    most_n = np.minimum((value_nC > 0).sum(1), np.minimum(rows.ahead_R[which], room_n))
    width_n = 1 + most_n * fixed_n
    open_n = ((most_n > 0) & ~fixed_n).nonzero()[0]
    if len(open_n):
        # what was hoped of these drafts has been counted, when their masks ran
        counted = later * float(chain.sure_nL[chain.source_n == MASKS].cumprod(1).sum())
        value_kC = np.take_along_axis(value_nC[open_n], order_nC[open_n], 1)
        width_n[open_n] = choose_widths(pace, width_n, value_kC, most_n[open_n], counted)
    chosen_nC = np.zeros(value_nC.shape, dtype=bool)
    np.put_along_axis(chosen_nC, order_nC, np.arange(order_nC.shape[1]) < (width_n - 1)[:, None], 1)
    return _work(rows, which, chain, chosen_nC)


def _nothing(rows: Rows, which: np.ndarray) -> Work:
    """No drafts; what was drafted and looked up is forgotten."""
    rows.alike_R[which], rows.sure_RK[which] = 0, 0
    return AUTOREGRESSIVE.next_work(rows, which)


def _chain(rows: Rows, which: np.ndarray, ahead_n: np.ndarray) -> Chain:
    """Of every row the drafts that masks made in the forward before, or what is looked up if more comes of it."""
    most_n = np.maximum(np.minimum(rows.most_R[which], ahead_n), 0)
    place_L = np.arange(int(rows.most_R[which].max()))
    ids_nL, sure_nL = (
        x_RK[which[:, None], np.minimum(place_L, x_RK.shape[1] - 1)] for x_RK in (rows.draft_RK, rows.sure_RK)
    )
    sure_nL = np.where(place_L < np.minimum(most_n, rows.draft_RK.shape[1])[:, None], sure_nL, 0)
    source_n, found_n = np.full_like(which, MASKS), np.zeros(len(which), dtype=bool)
    looked_nM = ids_nL[:, :0]
    if (looks_n := rows.looks_R[which]).any():
        looked_nM, found_n = lookup(rows, which, 1 + len(place_L))
        found_n &= looks_n
        likely_nL = rows.chance_R[which, None] * (place_L < most_n[:, None])
        better_n = found_n & (likely_nL.cumprod(1).sum(1) > sure_nL.cumprod(1).sum(1))
        source_n[better_n] = LOOKUP
        ids_nL = np.where(better_n[:, None], looked_nM[:, :-1], ids_nL)
        sure_nL = np.where(better_n[:, None], likely_nL, sure_nL)
    drafts = sure_nL.nonzero()
    sure_nL[drafts] *= ~rows.stopping(which[drafts[0]], ids_nL[drafts])  # no draft ends an answer
    worth_nL = sure_nL.cumprod(1)
    sure_nL[worth_nL <= rows.settings_R["draft_threshold"][which, None]] = 0
    return Chain(ids_nL, sure_nL, source_n, looked_nM, found_n)


def _values(rows: Rows, which: np.ndarray, chain: Chain, ahead_n: np.ndarray, later: float) -> np.ndarray:
    """How many tokens each candidate will have made in the mean: the drafts, then every outcome's masks `[n, C]`.

    A draft makes one if it and all before it are right; a mask, if its outcome comes and it and all before it are, less
    what it will take to verify that (`later`: what remains). Of any chain or block the first are worth the most, and
    the drafts before an outcome more than its masks.
    """
    worth_nL = chain.sure_nL.cumprod(1)
    masks_n = rows.masks_R[which]
    most = int(masks_n.max())
    if not most:
        return worth_nL
    outcome_nG = np.ones((len(which), worth_nL.shape[1] + 1))
    outcome_nG[:, 1:] = worth_nL
    outcome_nG[:, :-1] *= 1 - chain.sure_nL
    place_k, hope_nk = np.arange(1, most + 1), np.minimum.accumulate(rows.hope_RK[which, :most], axis=1)
    value_nGk = later * outcome_nG[:, :, None] * hope_nk[:, None]
    # what a mask predicts is a draft only where it can be run
    behind_Gk = np.arange(worth_nL.shape[1] + 1)[:, None] + place_k
    value_nGk *= (behind_Gk < ahead_n[:, None, None]) & (place_k <= masks_n[:, None, None])
    return np.concatenate([worth_nL, value_nGk.reshape(len(which), -1)], 1)


def _work(rows: Rows, which: np.ndarray, chain: Chain, chosen_nC: np.ndarray) -> Work:
    """The last known tokens with the chosen candidates behind them."""
    start_n, L = rows.start_R[which], chain.ids_nL.shape[1]
    runs = np.ones((len(which), 1 + chosen_nC.shape[1]), dtype=bool)  # the last known token, and the candidates
    runs[:, 1:] = chosen_nC
    width_n, drafts_n = runs.sum(1), chosen_nC[:, :L].sum(1)
    piece_m, column_m = runs.nonzero()
    begin_n = width_n.cumsum() - width_n
    query_m = np.arange(len(piece_m)) - begin_n[piece_m]
    rows.pace.decided(len(which), drafts=len(piece_m) > len(which))
    outcome_m, place_m, position_m = np.full_like(piece_m, -1), np.zeros_like(piece_m), start_n[piece_m] + query_m
    placed, behind_m = None, (column_m > 0).nonzero()[0]
    if len(behind_m):
        drafts_m = behind_m[column_m[behind_m] <= L]
        ids_m = chain.ids_nL[piece_m[drafts_m], column_m[drafts_m] - 1]
        rows.ids_RC[which[piece_m[drafts_m]], position_m[drafts_m]] = ids_m
    if len(behind_m) and len(masks_m := behind_m[column_m[behind_m] > L]):
        outcome, place = np.divmod(column_m[masks_m] - 1 - L, (chosen_nC.shape[1] - L) // (L + 1))
        outcome_m[masks_m], place_m[masks_m] = outcome, place
        placed = _placed(rows, which[piece_m], position_m, masks_m, start_n[piece_m[masks_m]] + outcome, place)
        position_m = placed.position_q
    one_n = np.ones_like(which)
    asked = Asked(chain, begin_n, drafts_n, outcome_m, place_m)
    return Work(
        which, start_n, width_n, one_n, one_n, piece_m, query_m, position_m + 1, np.zeros_like(piece_m),
        position_m + 1 if placed is None else placed.limit_q, partial(settle, asked=asked), placed=placed,
    )  # fmt: skip


def _placed(
    rows: Rows, row_m: np.ndarray, slot_m: np.ndarray, masks_m: np.ndarray, last: np.ndarray, place: np.ndarray
) -> Placed:
    """Masks see the row up to the `last` token of their outcome, and those of their block that stand before them."""
    ids_m, position_m, limit_m = rows.ids_RC[row_m, slot_m], slot_m.copy(), slot_m + 1
    own_m, end_m = np.zeros_like(slot_m), np.zeros_like(slot_m)
    slot = slot_m[masks_m]
    assert rows.gate is not None
    ids_m[masks_m] = np.array(rows.gate.mask_ids(MOST_MASKS))[place]
    position_m[masks_m], limit_m[masks_m] = last + 1 + place, last + 1
    own_m[masks_m], end_m[masks_m] = slot - place, slot + 1
    return Placed(ids_m, position_m, limit_m, own_m, end_m)


def settle(rows: Rows, work: Work, tokens_m: np.ndarray, confidence_m: np.ndarray, asked: Asked) -> np.ndarray:
    """Every row accepts its drafts up to the first wrong one and the prediction behind, and keeps its new drafts."""
    which, row_m, piece_m, query_m = work.rows_n, work.row_m, work.piece_m, work.query_m
    chain, known_m = asked.chain, asked.outcome_m < 0
    drafted_m = known_m & (query_m < asked.drafts_n[piece_m])
    guess_m = chain.ids_nL[piece_m, np.minimum(query_m, chain.ids_nL.shape[1] - 1)]
    wrong_m = known_m & ~(drafted_m & (tokens_m == guess_m))
    accepted_n = np.minimum.reduceat(np.where(wrong_m, query_m, NEVER), asked.begin_n)
    chosen_m: np.ndarray = known_m & (query_m <= accepted_n[piece_m])
    if rows.pace.drafts:
        rows.ids_RC[row_m[drafted_m], work.target_m[drafted_m]] = np.maximum(
            rows.settings_R["mask_token_id"][row_m[drafted_m]], 0
        )
        rows.drafted_RS[which, chain.source_n] += asked.drafts_n
        rows.accepted_RS[which, chain.source_n] += accepted_n
    rows.reveal(row_m[chosen_m], work.target_m[chosen_m], tokens_m[chosen_m])
    rows.start_R[which] += accepted_n + 1
    if chain.found_n.any():
        looked_m = chain.looked_nM[piece_m, np.minimum(query_m, chain.looked_nM.shape[1] - 1)]
        wrong_m = chosen_m & ((tokens_m != looked_m) | rows.stopping(row_m, tokens_m))
        right_n = np.minimum.reduceat(np.where(wrong_m, query_m, NEVER), asked.begin_n)
        _learn(rows, which, np.minimum(right_n, accepted_n + 1), accepted_n + 1, chain.found_n)
    if work.placed is not None or rows.sure_RK[which].any():
        mine_m = (asked.outcome_m == accepted_n[piece_m]).nonzero()[0]
        _keep(rows, which, row_m[mine_m], asked.place_m[mine_m], tokens_m[mine_m], confidence_m[mine_m])
    return chosen_m


def _keep(
    rows: Rows, which: np.ndarray, row_m: np.ndarray, place_m: np.ndarray, tokens_m: np.ndarray, sure_m: np.ndarray
) -> None:
    """What the masks of the outcome predict are the next drafts; how sure they are is what is hoped of later ones."""
    rows.sure_RK[which] = 0
    if len(row_m):
        rows.draft_RK[row_m, place_m], rows.sure_RK[row_m, place_m] = tokens_m, np.minimum(sure_m, 0.999)
        worth_m = rows.sure_RK[row_m].cumprod(1)[np.arange(len(row_m)), place_m]
        hope_m = LATE * rows.hope_RK[row_m, place_m] + (1 - LATE) * worth_m
        rows.hope_RK[row_m, place_m] = hope_m
        rows.pace.hope[place_m] = hope_m  # of the last of these rows


def _learn(rows: Rows, which: np.ndarray, right_n: np.ndarray, compared_n: np.ndarray, found_n: np.ndarray) -> None:
    """Of what was looked up, `right_n` tokens were right, and if those were not all compared, the next one wrong."""
    whole_n = right_n == compared_n
    rows.alike_R[which] = (rows.alike_R[which] + compared_n) * (whole_n & found_n)
    which, right_k, whole_k = which[found_n], right_n[found_n], whole_n[found_n]
    chance_k = 1 - (1 - rows.chance_R[which]) * LATE**right_k
    rows.chance_R[which] = np.minimum(np.where(whole_k, chance_k, LATE * chance_k), 0.99)
    right = int(right_k.sum())
    tried = right + len(which) - int(whole_k.sum())
    rows.pace.chance = right / tried + SLOW**tried * (rows.pace.chance - right / tried)


SPECULATIVE = Mode(causal=True, next_work=next_work)
