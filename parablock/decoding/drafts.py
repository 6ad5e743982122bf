"""Drafts without a model: what followed the last tokens where they stood before, in the prompt or in the answer.

Shapes: n rows, k of them that search, L positions, c earlier places, K tokens compared, M tokens guessed.
"""

import numpy as np

from parablock.decoding.rows import Rows

PLACES = 64  # how many earlier places of a row are looked at: the latest
COMPARED = np.arange(2, 18)  # how far back, before the last two tokens, places are told apart


def lookup(rows: Rows, which: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The next `most` tokens of the rows `which`, guessed `[n, M]`, and for which rows there is a guess `[n]`.

    A guess is what follows the place `rows.alike_R`, where the row's last tokens stood before. Past the row's end it
    repeats itself. A row whose guesses were all right has moved on to the next place, which is the best again; the
    others search.
    """
    last_n, alike_n = rows.start_R[which], rows.alike_R[which]
    seeking_k = (alike_n == 0).nonzero()[0]
    if len(seeking_k):
        alike_n[seeking_k] = _search(rows.ids_RC, which[seeking_k], last_n[seeking_k])
        rows.alike_R[which] = alike_n
    source_nM = alike_n[:, None] + 1 + np.arange(most) % np.maximum(last_n - alike_n, 1)[:, None]
    return rows.ids_RC[which[:, None], source_nM], alike_n > 0


def _search(ids_RC: np.ndarray, rows_k: np.ndarray, last_k: np.ndarray) -> np.ndarray:
    """Where the last two tokens of these rows, that end at `last_k`, stood before `[k]`; 0: nowhere.

    Of several places, the one that agrees in the most tokens before them, the latest of those.
    """
    width, alike_k = int(last_k.max()) + 1, np.zeros_like(last_k)
    ids_kL = ids_RC[rows_k, :width]
    flat, end_k = ids_kL.ravel(), last_k + width * np.arange(len(rows_k))
    at_c = (ids_kL == flat[end_k, None]).ravel().nonzero()[0]
    row_c = at_c // width
    kept_c = ((flat[at_c - 1] == flat[end_k - 1][row_c]) & (at_c < end_k[row_c])).nonzero()[0]
    if not len(kept_c):
        return alike_k
    # a place 0 among them has no token before it: it means nowhere, and any other is better
    row_c, at_c = row_c[kept_c], at_c[kept_c]
    count_k = np.bincount(row_c, minlength=len(rows_k))
    most = int(count_k.max())
    if most > PLACES:
        late_c = (count_k.cumsum()[row_c] - np.arange(len(row_c)) <= PLACES).nonzero()[0]
        row_c, at_c, count_k = row_c[late_c], at_c[late_c], np.minimum(count_k, PLACES)
    score_c = at_c % width
    if most > 1:
        same_cK = flat.take(at_c[:, None] - COMPARED, mode="clip")
        same_cK = same_cK == flat.take(end_k[:, None] - COMPARED, mode="clip")[row_c]
        same_cK &= score_c[:, None] >= COMPARED
        score_c += np.where(same_cK.all(1), len(COMPARED), same_cK.argmin(1)) * width
    found_k = count_k > 0
    alike_k[found_k] = np.maximum.reduceat(score_c, (count_k.cumsum() - count_k)[found_k]) % width
    return alike_k
