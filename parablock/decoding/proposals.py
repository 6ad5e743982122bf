"""What the logits of a step propose: a token and its confidence for every wanted prediction, by each row's settings.

Shapes: M predictions, m some of them, V vocabulary.
"""

import numpy as np
import torch
from torch import Tensor

from parablock.decoding.adjust import adjusted
from parablock.decoding.guides import restrict
from parablock.decoding.rows import Rows
from parablock.decoding.unmasking import propose, sent, uniform
from parablock.decoding.work import Work, join


def propose_tokens(logits_MV: Tensor, rows: Rows, works: list[Work]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and confidences `[M]` on the host, for all works' predictions; the mask token is never among them."""
    row_M = join([work.row_m for work in works])
    if not len(row_M):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    if rows.guided_R.any():
        restrict(logits_MV, rows, works)
    device = logits_MV.device
    settings_M = rows.settings_R[row_M]
    mask_token_M = settings_M["mask_token_id"]
    if (mask_token_M == mask_token_M[0]).all():
        if mask_token_M[0] >= 0:
            logits_MV[:, int(mask_token_M[0])] = -torch.inf
    else:
        has = (mask_token_M >= 0).nonzero()[0]
        where = sent(np.stack([has, mask_token_M[has]]), device)
        logits_MV[where[0], where[1]] = -torch.inf
    logits_MV = adjusted(logits_MV, rows, works)
    sampled = (settings_M["temperature"] > 0).nonzero()[0]
    if len(sampled) < len(row_M):
        tokens, confidence = propose(logits_MV, None)
    if len(sampled):
        target_M, draw_M = join([work.target_m for work in works]), join([work.draw_m for work in works])
        drawn = _sample(logits_MV, settings_M[sampled], target_M[sampled], draw_M[sampled], sampled)
        if len(sampled) == len(row_M):
            tokens, confidence = drawn
        else:
            index = sent(sampled, device)
            tokens[index], confidence[index] = drawn
    if device.type == "cpu":
        return tokens.numpy(), confidence.numpy()
    host = torch.stack([tokens.double(), confidence.double()]).cpu().numpy()  # the one wait
    return host[0].astype(np.int64), host[1].astype(np.float32)


def _sample(
    logits_MV: Tensor, settings_m: np.ndarray, target_m: np.ndarray, draw_m: np.ndarray, which_m: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Samples for some predictions, each with its row's settings and random numbers."""
    device = logits_MV.device
    top_k_m = settings_m["top_k"]
    whole = np.stack([settings_m["seed"], settings_m["sample"], target_m, draw_m, top_k_m, which_m])
    seed, sample, target, draw, top_k, which = sent(whole, device)
    shares = np.stack([settings_m["temperature"], settings_m["top_p"], settings_m["min_p"]])
    temperature, top_p, min_p = sent(shares, device)
    return propose(
        logits_MV[which],
        uniform(seed, sample, target, draw),
        temperature=temperature[:, None],
        top_p=top_p[:, None],
        top_k=top_k[:, None] if (top_k_m < logits_MV.shape[-1]).any() else None,
        min_p=min_p[:, None] if settings_m["min_p"].any() else None,
    )
