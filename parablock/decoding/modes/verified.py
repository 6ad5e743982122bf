"""Block diffusion, verified (after S2D2): the tokens of a causal pass through the block, several per forward.

What it computes, token by token: the known tokens of the active block see each other causally, over the committed
blocks, and the last one predicts the next token; a full block is committed, both directions, and predicts the next
block's first token. A forward runs the last known token, drafts behind it, and masks to the end of a sub-block, which
see all of these and each other. The predictions of the former are the truth as far as the drafts are right: those are
accepted, and the prediction behind them. If all were right, what the masks predict are the next drafts.

Drafts that fill the block are verified beside the commit that they would make: then a piece is a clean copy of the
block, masks of the next block, and behind them the block once more, causally.

Shapes: n rows, m predictions, q queries of all pieces, D block size (also a draft's place in its block), W the widest
piece.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from parablock.decoding.rows import DRAFTERS, Rows
from parablock.decoding.work import Mode, Placed, Work

LIKELY = 0.5  # a draft that is surer is verified, if all before it are; behind a wrong one nothing is drafted at once
MASKS = DRAFTERS.index("masks")


@dataclass(frozen=True)
class Drafted:
    """Where some rows stand in their blocks.

    `known_n` tokens of the block are known, `drafts_n` more are likely; `ends_n`: the answer likely ends behind them.
    `filled_n`: they are the rest of the block, and the answer goes on; `sure_n`: how likely it is that all are right.
    """

    known_n: np.ndarray
    drafts_n: np.ndarray
    ends_n: np.ndarray
    filled_n: np.ndarray
    sure_n: np.ndarray


@dataclass(frozen=True)
class Layout:
    """A piece: so many queries of the block, clean; of masks of the next block; and of the block, causally.

    The last begin at the place `from_n` of the block; known tokens and drafts reach to `behind_n`, then masks follow.
    """

    clean_n: np.ndarray
    next_n: np.ndarray
    from_n: np.ndarray
    causal_n: np.ndarray
    behind_n: np.ndarray


def next_work(rows: Rows, which: np.ndarray) -> Work:
    """Every row's drafts, verified, and masks behind them; or the commit of a full block."""
    drafted = _drafted(rows, which)
    drafts = _positions(rows, which, drafted)
    rows.ids_RC[drafts] = rows.draft_RK[drafts[0], drafts[1] % rows.block_size]
    layout = _layout(rows, which, drafted)
    start_n, D = rows.start_R[which], rows.block_size
    width_n = layout.clean_n + layout.next_n + layout.causal_n
    runs_nW = np.arange(int(width_n.max())) < width_n[:, None]
    piece_q, query_q = runs_nW.nonzero()
    clean_q, next_q, from_q, behind_q = (
        x_n[piece_q] for x_n in (layout.clean_n, layout.next_n, layout.from_n, layout.behind_n)
    )
    causal_q = query_q >= clean_q + next_q
    place_q = query_q + causal_q * (from_q - clean_q - next_q)  # in its block; of masks of the next one, D and more
    first_n = start_n + layout.from_n
    placed = _placed(rows, which, layout, piece_q, query_q, place_q)

    # which queries are asked: for the truth, for the next block's first token, for drafts (the last one is not run)
    known_q = drafted.known_n[piece_q]
    commit_q = ~causal_q & (place_q == D - 1)
    truth_q = causal_q & (place_q >= known_q - 1) & (place_q < np.minimum(behind_q, D - 1))
    masks_q = np.where(causal_q, place_q >= behind_q, place_q >= D)
    drafts_q = masks_q & ((place_q + 1) % D > 0) & ~drafted.ends_n[piece_q]
    drafts_q &= placed.position_q + 1 < rows.end_R[which[piece_q]] - 1
    asked_m = (commit_q | truth_q | drafts_q).nonzero()[0]
    piece_m, target_m = piece_q[asked_m], placed.position_q[asked_m] + 1
    text_q = start_n[piece_q] + np.where(causal_q, behind_q, D)
    return Work(
        which, first_n, width_n, np.ones_like(which), np.zeros_like(which), piece_m, query_q[asked_m],
        target_m, np.zeros_like(piece_m), np.where(drafts_q[asked_m], text_q[asked_m], target_m),
        partial(
            settle, drafted=drafted, drafts=drafts, clean_n=layout.clean_n > 0, truth_m=truth_q[asked_m],
            new_m=drafts_q[asked_m],
        ),
        placed=placed,
    )  # fmt: skip


def _drafted(rows: Rows, which: np.ndarray) -> Drafted:
    """The likely drafts of every row: up to the first that is not, or that would end the answer."""
    D, start_n = rows.block_size, rows.start_R[which]
    masked_nD, place_D = rows.masked_block(which), np.arange(D)
    known_n = np.where(masked_nD.any(1), masked_nD.argmax(1), D)
    ids_nD, sure_nD = rows.draft_RK[which, :D], rows.sure_RK[which, :D]
    likely_nD = sure_nD > LIKELY
    row, place = likely_nD.nonzero()
    stops_nD = np.zeros_like(likely_nD)
    stops_nD[row, place] = rows.stopping(which[row], ids_nD[row, place])
    behind_nD = place_D >= known_n[:, None]
    # the answer's last token is not run
    over_nD = behind_nD & (~likely_nD | stops_nD | (start_n[:, None] + place_D >= rows.end_R[which, None] - 1))
    reach_n = np.where(over_nD.any(1), over_nD.argmax(1), D)
    ends_n = stops_nD[np.arange(len(which)), np.minimum(reach_n, D - 1)] & (reach_n < D)
    sure_n = np.where(behind_nD & (place_D < reach_n[:, None]), sure_nD, 1.0).prod(1)
    filled_n = (reach_n == D) & (start_n + D < rows.end_R[which])
    return Drafted(known_n, reach_n - known_n, ends_n, filled_n, sure_n)


def _positions(rows: Rows, which: np.ndarray, drafted: Drafted) -> tuple[np.ndarray, np.ndarray]:
    """Where drafts stand in `ids_RC`, at positions that remain masked, while a forward verifies them."""
    behind_nD = np.arange(rows.block_size) - drafted.known_n[:, None]
    n, place = ((behind_nD >= 0) & (behind_nD < drafted.drafts_n[:, None])).nonzero()
    return which[n], rows.start_R[which[n]] + place


def _layout(rows: Rows, which: np.ndarray, drafted: Drafted) -> Layout:
    """The pieces of whole sub-blocks: few widths, so that pieces stay alike."""
    D, size_n, start_n = rows.block_size, rows.settings_R["sub_block_size"][which], rows.start_R[which]
    known_n, room_n = drafted.known_n, rows.room_R[which] - start_n
    full_n = known_n == D
    beside_n = drafted.filled_n & ~full_n & (drafted.sure_n > LIKELY) & (room_n >= 2 * D)
    clean_n, causal_n = D * (full_n | beside_n), D * beside_n
    # masks of the next block, where there is room and something to draft
    next_n = size_n * ((clean_n > 0) & (room_n >= clean_n + causal_n + size_n))
    next_n *= start_n + D + 1 < rows.end_R[which] - 1
    behind_n = np.where(beside_n, D, np.minimum(known_n + drafted.drafts_n, D - 1))
    # elsewhere from the sub-block of the last token whose K/V are not written, to that of the first draft behind
    from_n = np.where(rows.written_R[which], (known_n - 1) // size_n * size_n, 0) * (clean_n == 0)
    to_n = np.minimum(((behind_n + 1) // size_n + 1) * size_n, D)
    return Layout(clean_n, next_n, from_n, np.where(clean_n > 0, causal_n, to_n - from_n), behind_n)


def _placed(
    rows: Rows, which: np.ndarray, layout: Layout, piece_q: np.ndarray, query_q: np.ndarray, place_q: np.ndarray
) -> Placed:
    """What stands where: the K/V of the block's causal copy lie behind those of its clean one, if there is one."""
    D, row_q, start_q = rows.block_size, which[piece_q], rows.start_R[which][piece_q]
    clean_q, next_q, behind_q = (x_n[piece_q] for x_n in (layout.clean_n, layout.next_n, layout.behind_n))
    slot_q = start_q + layout.from_n[piece_q] + query_q
    causal_q = query_q >= clean_q + next_q
    copy_q = causal_q & (clean_q > 0)
    masks_q = place_q >= np.where(causal_q, behind_q, D)

    ids_q = rows.settings_R["mask_token_id"][row_q]
    ids_q[~masks_q] = rows.ids_RC[row_q[~masks_q], (start_q + place_q)[~masks_q]]
    whole_q = start_q + np.where(causal_q, (layout.from_n + layout.causal_n)[piece_q], D + next_q * masks_q)
    limit_q = np.where(causal_q & ~masks_q, slot_q + 1, whole_q)
    own_q, end_q = (start_q + clean_q + next_q) * copy_q, (slot_q + 1) * copy_q
    return Placed(ids_q, start_q + place_q, np.where(copy_q, start_q, limit_q), own_q, end_q)


def settle(
    rows: Rows, work: Work, tokens_m: np.ndarray, confidence_m: np.ndarray, *, drafted: Drafted,
    drafts: tuple[np.ndarray, np.ndarray], clean_n: np.ndarray, truth_m: np.ndarray, new_m: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Every row accepts its drafts up to the first wrong one, and the truth behind them; if none is wrong, it keeps
    the new drafts, and a block that is full has been committed.
    """
    which, row_m, piece_m, D = work.rows_n, work.row_m, work.piece_m, rows.block_size
    place_m = work.target_m - rows.start_R[row_m]
    ahead_m = place_m - drafted.known_n[piece_m]  # so many drafts stand before it
    guess_m = rows.draft_RK[row_m, np.minimum(place_m, D - 1)]
    wrong_m = truth_m & (ahead_m < drafted.drafts_n[piece_m]) & (tokens_m != guess_m)
    accepted_n = drafted.drafts_n.copy()
    np.minimum.at(accepted_n, piece_m[wrong_m], ahead_m[wrong_m])
    right_n = accepted_n == drafted.drafts_n
    moves_n = right_n & clean_n
    chosen_m: np.ndarray = np.where(truth_m, ahead_m <= accepted_n[piece_m], ~new_m & moves_n[piece_m])
    rows.ids_RC[drafts] = rows.settings_R["mask_token_id"][drafts[0]]
    rows.drafted_RS[which, MASKS] += drafted.drafts_n
    rows.accepted_RS[which, MASKS] += accepted_n
    rows.reveal(row_m[chosen_m], work.target_m[chosen_m], tokens_m[chosen_m])
    rows.start_R[which] += D * moves_n
    rows.written_R[which] = ~clean_n

    rows.sure_RK[which] = 0
    kept_m = new_m & right_n[piece_m]
    _keep(rows, row_m[kept_m], work.target_m[kept_m], tokens_m[kept_m], confidence_m[kept_m])
    # a commit and what runs beside it want room: of the next block, and behind it
    rows.ahead_R[which] = (3 * D - 1) * _drafted(rows, which).filled_n
    return chosen_m


def _keep(rows: Rows, row_m: np.ndarray, target_m: np.ndarray, tokens_m: np.ndarray, confidence_m: np.ndarray) -> None:
    """What masks predict of these rows' blocks are the next drafts."""
    place_m = target_m - rows.start_R[row_m]
    rows.draft_RK[row_m, place_m], rows.sure_RK[row_m, place_m] = tokens_m, confidence_m


VERIFIED = Mode(causal=False, next_work=next_work)
