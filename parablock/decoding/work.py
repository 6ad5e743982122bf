"""What a forward runs: a few query tokens of some rows, what they may see, and which predictions are wanted.

Shapes: n pieces (at most one of a row), q queries of all of them, m predictions wanted from them, M predictions of a
whole forward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from parablock.decoding.rows import Rows


@dataclass(frozen=True)
class Placed:
    """Queries that do not stand one behind the other, or do not all see alike: drafts and masks beside known tokens.

    The K/V of a piece lie one behind the other all the same, from its first position on: in *slots*. Query q is the
    token `ids_q` at `position_q`; it sees the slots below `limit_q`, and those from `own_q` to below `end_q`.
    """

    ids_q: np.ndarray
    position_q: np.ndarray
    limit_q: np.ndarray
    own_q: np.ndarray
    end_q: np.ndarray

    def __getitem__(self, index: np.ndarray) -> "Placed":
        return Placed(*(x[index] for x in vars(self).values()))


@dataclass
class Work:
    """Pieces of one kind. Piece i runs `width_n[i]` tokens of row `rows_n[i]` from position `first_n[i]` on.

    A query at position p sees its row up to the end of its grain: `p // grain * grain + grain` tokens. So grain 1 is
    causal attention, and the block size as grain is block-causal attention. `final_n`: how many of a piece's K/V stay,
    at least.
    """

    rows_n: np.ndarray
    first_n: np.ndarray
    width_n: np.ndarray
    grain_n: np.ndarray
    final_n: np.ndarray
    # predictions: of which piece, from which of its queries, for which position, with which of its random numbers;
    # the row's tokens below `text_m`, drafts among them, are the text behind which it stands: all the text there is
    # where that is the position itself
    piece_m: np.ndarray
    query_m: np.ndarray
    target_m: np.ndarray
    draw_m: np.ndarray
    text_m: np.ndarray
    # settle(rows, work, tokens_m, confidence_m): the rows move on; which predictions `[m]` became known
    settle: Callable[[Rows, "Work", np.ndarray, np.ndarray], np.ndarray]
    decoding: bool = True  # False: prefill
    placed: Placed | None = None  # by default a piece's tokens are the row's own, at their own positions

    @property
    def tokens(self) -> int:
        """How many tokens it runs."""
        return int(self.width_n.sum())

    @cached_property
    def row_m(self) -> np.ndarray:
        """The predictions' rows."""
        row_m: np.ndarray = self.rows_n[self.piece_m]
        return row_m


def prefill(rows: Rows, chosen: np.ndarray, width_n: np.ndarray) -> Work:
    """The next `width_n` tokens of each row, of which those up to `prefill_R` count.

    The last one of these predicts the token behind it, if that is masked.
    """
    first_n = rows.start_R[chosen]
    end_n = np.minimum(first_n + width_n, rows.prefill_R[chosen])
    asks_n = (end_n == rows.prefill_R[chosen]) & rows.masked_RC[chosen, end_n]
    piece_m, final_n = asks_n.nonzero()[0], end_n - first_n
    return Work(
        chosen, first_n, width_n, rows.grain_R[chosen], final_n, piece_m, final_n[asks_n] - 1, end_n[asks_n],
        np.zeros_like(piece_m), end_n[asks_n], settle_all, decoding=False,
    )  # fmt: skip


def settle_all(rows: Rows, work: Work, tokens_m: np.ndarray, confidence_m: np.ndarray) -> np.ndarray:
    """Every prediction becomes known."""
    rows.start_R[work.rows_n] += work.final_n
    rows.reveal(work.row_m, work.target_m, tokens_m)
    return np.ones(len(tokens_m), dtype=bool)


@dataclass(frozen=True)
class Mode:
    """A way to decode. `causal`: clean tokens see what stands before them; otherwise the whole of their block, too."""

    causal: bool
    next_work: Callable[[Rows, np.ndarray], Work]  # the next piece of work of each of these rows, their prefill done


@dataclass(frozen=True)
class Settled:
    """What a forward did to the rows that got predictions: K rows, M predictions (A of answers)."""

    rows_K: np.ndarray
    before_K: np.ndarray  # the responses' lengths before
    done_K: np.ndarray  # bool: the response is whole
    row_M: np.ndarray
    target_M: np.ndarray
    chosen_M: np.ndarray  # bool: which predictions became known ...
    confidence_M: np.ndarray  # ... and how sure they were


def settle(rows: Rows, works: list[Work], tokens_M: np.ndarray, confidence_M: np.ndarray) -> Settled:
    """After a forward over `works`, whose predictions follow each other: every mode settles its own."""
    row_M, target_M = join([work.row_m for work in works]), join([work.target_m for work in works])
    row_A = row_M[target_M >= rows.prompt_R[row_M]]  # a prompt's own tokens change nothing of its answer
    begins_A = np.ones(len(row_A), dtype=bool)  # a row's predictions stand together
    begins_A[1:] = row_A[1:] != row_A[:-1]
    rows_K = row_A[begins_A]
    before_K, chosen, at = rows.length_R[rows_K], [], 0
    for work in works:
        mine = slice(at, at + len(work.piece_m))
        chosen.append(work.settle(rows, work, tokens_M[mine], confidence_M[mine]))
        if work.decoding:
            rows.forwards_R[work.rows_n] += 1
        at = mine.stop
    chosen_M = join(chosen)
    if rows.guided_R.any():
        chosen_M = rows.end_at_walls(row_M, target_M, chosen_M)
    done_K = rows.measure(rows_K)
    return Settled(rows_K, before_K, done_K, row_M, target_M, chosen_M, confidence_M)


def join(arrays: list[np.ndarray]) -> np.ndarray:
    """The arrays behind one another."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
