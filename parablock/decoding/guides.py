"""Grammars while rows run: which tokens predictions may be, and how much of a sub-block may be revealed.

Shapes: M predictions of a forward, m those that stand behind text and drafts alone, V vocabulary, W words of 32 bits.
"""

import numpy as np
import torch
from torch import Tensor

from parablock.decoding.rows import FAR, Rows
from parablock.decoding.unmasking import sent
from parablock.decoding.work import Work, join


def restrict(logits_MV: Tensor, rows: Rows, works: list[Work]) -> None:
    """Tokens that its grammar refuses get no probability, in every prediction that stands behind text and drafts.

    The masks are made here, while the device still computes the logits. Where no token may stand is a wall
    (`Rows.wall_R`): the prediction remains as it is, and `settle` ends the answer before it.
    """
    row_M, target_M = join([work.row_m for work in works]), join([work.target_m for work in works])
    which_m = (rows.guided_R[row_M] & (join([work.text_m for work in works]) == target_M)).nonzero()[0]
    if not len(which_m):
        return
    which_m = which_m[np.lexsort((target_M[which_m], row_M[which_m]))]
    row_m, target_m = row_M[which_m], target_M[which_m]
    bits_mW, ends_m = _allowed(rows, row_m, target_m)
    walls_m = np.logical_not(bits_mW.any(1))
    bits_mW[walls_m] = -1
    rows.wall_R[row_m] = FAR
    for m in walls_m.nonzero()[0].tolist()[::-1]:  # the first of a row stays
        guide = rows.guides[row_m[m]]
        assert guide is not None
        rows.wall_R[row_m[m]], rows.whole_R[row_m[m]] = target_m[m], ends_m[m] and not guide.matcher.is_error()
    refused_mV = ~_unpacked(sent(bits_mW.view(np.uint8), logits_MV.device))
    V, known = logits_MV.shape[1], refused_mV.shape[1]
    refused_mV = torch.nn.functional.pad(refused_mV[:, :V], (0, max(0, V - known)), value=True)
    if len(which_m) == len(row_M) and (which_m[1:] > which_m[:-1]).all():
        logits_MV.masked_fill_(refused_mV, -torch.inf)
    else:
        index = sent(which_m, logits_MV.device)
        logits_MV[index] = logits_MV[index].masked_fill(refused_mV, -torch.inf)


def _allowed(rows: Rows, row_m: np.ndarray, target_m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What may stand there, stop tokens where the grammar accepts, and whether it does: `[m, W]`, `[m]`.

    A row's predictions follow each other; behind a draft that the grammar refuses all may stand, and none will.
    """
    begins = np.unique(row_m, return_index=True)[1]
    guides, alone, drafted = [], [], []
    for begin, end in zip(begins, [*begins[1:], len(row_m)], strict=True):
        row, target = row_m[begin], target_m[begin]
        guide = rows.guides[row]
        assert guide is not None
        guide.follow(rows.ids_RC[row, rows.prompt_R[row] : target])
        guides.append(guide)
        if end - begin > 1:
            drafts = rows.ids_RC[row, target : target + end - begin - 1].tolist()
            drafted.append((guide.matcher, int(begin), drafts))
        else:
            alone.append((guide.matcher, int(begin)))
    vocabulary = guides[0].vocabulary
    bits_mW = np.full((len(row_m), vocabulary.words), -1, dtype=np.int32)
    if alone:
        vocabulary.helpers.fill_next_token_bitmask_par(vocabulary.executor, alone, bits_mW)
    if drafted:
        fill = vocabulary.helpers.fill_next_token_bitmask_par_with_draft_tokens
        fill(vocabulary.executor, drafted, bits_mW)
    guide_m = np.repeat(np.arange(len(guides)), np.diff(begins, append=len(row_m)))
    ends_m = bits_mW[:, vocabulary.end // 32] >> vocabulary.end % 32 & 1 > 0
    bits_mW &= np.stack([guide.usable_W for guide in guides])[guide_m]
    bits_mW[ends_m] |= np.stack([guide.stops_W for guide in guides])[guide_m[ends_m]]
    return bits_mW, ends_m


def _unpacked(bytes_mB: Tensor) -> Tensor:
    """Every bit as a bool `[m, 8 B]`, the lowest of a byte first."""
    place_8 = torch.arange(8, dtype=torch.uint8, device=bytes_mB.device)
    return (bytes_mB[:, :, None] >> place_8 & 1).bool().flatten(1)


def allowed_prefix(rows: Rows, work: Work, tokens_m: np.ndarray, chosen_m: np.ndarray) -> np.ndarray:
    """Of what a row with a grammar would reveal, as much as stands without a gap behind the text, and is allowed.

    The first of it is revealed in any case: it was drawn from what is allowed.
    """
    chosen_m = chosen_m.copy()
    for piece in rows.guided_R[work.rows_n].nonzero()[0]:
        mine = (work.piece_m == piece).nonzero()[0]  # from the first masked position on
        run = 1 + int(np.append(chosen_m[mine[1:]], False).argmin())
        guide = rows.guides[work.rows_n[piece]]
        assert guide is not None
        count = max(1, guide.allowed(tokens_m[mine[:run]].tolist())) if run > 1 else 1
        chosen_m[mine] = np.arange(len(mine)) < count
    return chosen_m
