"""Logits as a request's settings change them: biases, penalties on what stands there, no stop token too early.

A prediction's penalties look at the text behind which it stands (`Work.text_m`) and at nothing else. So they do not
depend on the mode's forwards, nor on other rows: speculative decoding remains the autoregressive one.

Shapes: M predictions, m those that are changed, V vocabulary, n some rows, L positions of their texts, K entries.
"""

import numpy as np
import torch
from torch import Tensor

from parablock.decoding.rows import Rows
from parablock.decoding.unmasking import sent
from parablock.decoding.work import Work, join


def adjusted(logits_MV: Tensor, rows: Rows, works: list[Work]) -> Tensor:
    """The logits with every row's settings applied, in this order, as vLLM does: float32 where any has some.

    - `logit_bias` is added;
    - `repetition_penalty`: of tokens in prompt or text, positive logits are divided by it, others multiplied;
    - `frequency_penalty`, as often as a token stands in the answer's text, and `presence_penalty` are subtracted;
    - before `min_tokens` tokens, stop tokens are impossible, unless a grammar allows nothing else.
    """
    row_M = join([work.row_m for work in works])
    which = rows.adjusts_R[row_M].nonzero()[0]
    if not len(which):
        return logits_MV
    row_m, text_m = row_M[which], join([work.text_m for work in works])[which]
    target_m = join([work.target_m for work in works])[which]
    every = len(which) == len(row_M)
    logits_MV = logits_MV.float()  # whose in-place changes are the caller's own, where they were float32 already
    index = None if every else sent(which, logits_MV.device)
    logits_mV = logits_MV if index is None else logits_MV[index]
    biases_m = (rows.biased_RK[row_m] >= 0).any(1)
    if biases_m.any():
        m, k = (rows.biased_RK[row_m] >= 0).nonzero()
        at, token = sent(np.stack([m, rows.biased_RK[row_m[m], k]]), logits_mV.device)
        logits_mV.index_put_((at, token), sent(rows.bias_RK[row_m[m], k], logits_mV.device), accumulate=True)
    _penalise(logits_mV, rows, row_m, text_m)
    early_m = target_m < rows.prompt_R[row_m] + rows.settings_R["min_tokens"][row_m]
    if early_m.any():
        stops_mK = rows.stops_RK[row_m]
        m, k = ((stops_mK >= 0) & (stops_mK < logits_mV.shape[1]) & early_m[:, None]).nonzero()
        at, token = sent(np.stack([m, stops_mK[m, k]]), logits_mV.device)
        before = logits_mV[at, token]
        logits_mV[at, token] = -torch.inf
        logits_mV[at, token] = torch.where(logits_mV.amax(1)[at] > -torch.inf, -torch.inf, before)
    if index is None:
        return logits_mV
    return logits_MV.index_copy_(0, index, logits_mV)


def _penalise(logits_mV: Tensor, rows: Rows, row_m: np.ndarray, text_m: np.ndarray) -> None:
    """Lower what stands in the texts: that alone is read and written, so the size of the vocabulary hardly counts."""
    settings_m, device = rows.settings_R[row_m], logits_mV.device
    names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
    repetition_m, frequency_m, presence_m = (settings_m[name] for name in names)
    repeats_m = repetition_m != 1
    counts_m = repeats_m | (frequency_m != 0) | (presence_m != 0)
    if not counts_m.any():
        return
    # the texts travel once for every row, and from the answer on where nobody asks for the prompt
    rows_n, n_m = np.unique(row_m, return_inverse=True)
    begin_m, end_m = np.where(repeats_m, 0, rows.prompt_R[row_m]), np.where(counts_m, text_m, 0)
    first = int(begin_m[counts_m].min())
    last = max(first, int(end_m.max()))
    ids_nL = sent(rows.ids_RC[rows_n, first:last], device)
    n, begin, prompt, end = sent(np.stack([n_m, begin_m, rows.prompt_R[row_m], end_m]), device)[:, :, None]
    place_L = torch.arange(first, last, device=device)
    ids_mL = ids_nL[n[:, 0]]
    known_mL = (place_L >= begin) & (place_L < end)
    repetition, frequency, presence = sent(np.stack([repetition_m, frequency_m, presence_m]), device)[:, :, None]
    # a token has one value wherever it stands, in another row's part, too: so all places may write it
    count_mL = _times(ids_mL, known_mL & (place_L >= prompt), logits_mV)
    value_mL = logits_mV.gather(1, ids_mL)
    if repeats_m.any():
        changed_mL = torch.where(value_mL > 0, value_mL / repetition, value_mL * repetition)
        value_mL = torch.where(_times(ids_mL, known_mL, logits_mV) > 0, changed_mL, value_mL)
    logits_mV.scatter_(1, ids_mL, value_mL - frequency * count_mL - presence * (count_mL > 0))


def _times(ids_mL: Tensor, counted_mL: Tensor, like_mV: Tensor) -> Tensor:
    """How often the token of each place stands at the counted ones of its row `[m, L]`."""
    return torch.zeros_like(like_mV).scatter_add_(1, ids_mL, counted_mL.float()).gather(1, ids_mL)
