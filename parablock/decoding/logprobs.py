"""Log-probabilities of tokens: what the model itself gives them, before any setting changes its distribution.

They are those of the prediction that made the token known: of the AR distribution in autoregressive and speculative
decoding, in block diffusion of the distribution under which the token was revealed. Temperature, penalties, biases and
cuts play no part; the mask token is never written, so it gets no probability.

Shapes: M predictions, m those whose rows ask for it, V vocabulary, K most probable tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from parablock.decoding.rows import Rows
from parablock.decoding.unmasking import sent
from parablock.decoding.work import Work, join

MOST_TOP = 20


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token in nats, and the most probable tokens there with theirs, the first the best."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Distributions:
    """Of some predictions (`which_m` of M): their log-probabilities, kept before the logits are changed."""

    which_m: np.ndarray
    row_m: np.ndarray
    target_m: np.ndarray
    log_p_mV: Tensor

    def read(self, rows: Rows, tokens_M: np.ndarray) -> dict[int, TokenLogprob]:
        """What is told of each of them: of the prompt's token where it predicts the prompt, else of that in M."""
        prompt_m = self.target_m < rows.prompt_R[self.row_m]
        tokens_m = tokens_M[self.which_m]
        tokens_m = np.where(prompt_m, rows.ids_RC[self.row_m, self.target_m * prompt_m], tokens_m)
        most = min(int(rows.top_R[self.row_m].max()), self.log_p_mV.shape[1])
        index_m1 = sent(tokens_m, self.log_p_mV.device)[:, None]
        top_mK, ids_mK = self.log_p_mV.topk(most, dim=1)
        told_mK = torch.cat([self.log_p_mV.gather(1, index_m1), top_mK], 1).tolist()
        counts_m = rows.top_R[self.row_m].tolist()
        return {
            m: TokenLogprob(own, tuple(zip(ids[:count], top[:count], strict=True)))
            for m, (own, *top), ids, count in zip(
                self.which_m.tolist(), told_mK, ids_mK.tolist(), counts_m, strict=True
            )
        }


def distributions(logits_MV: Tensor, rows: Rows, works: list[Work]) -> Distributions | None:
    """The distributions of the rows that ask for log-probabilities; None: no row does, which costs nothing."""
    row_M = join([work.row_m for work in works])
    which = (rows.top_R[row_M] >= 0).nonzero()[0]
    if not len(which):
        return None
    row_m, target_m = row_M[which], join([work.target_m for work in works])[which]
    logits_mV = logits_MV[sent(which, logits_MV.device)].float()
    mask_token_m = rows.settings_R["mask_token_id"][row_m]
    m = (mask_token_m >= 0).nonzero()[0]
    at, token = sent(np.stack([m, mask_token_m[m]]), logits_mV.device)
    logits_mV[at, token] = -torch.inf
    return Distributions(which, row_m, target_m, torch.log_softmax(logits_mV, -1))
