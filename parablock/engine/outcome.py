"""After a forward: which predictions are revealed, where every row then stands, and what its caller is told.

Shapes: M predictions, K rows that got any, S positions of a sub-block.
"""

from dataclasses import dataclass

import numpy as np
import torch

from parablock.decoding.unmasking import reveal
from parablock.engine.request import Update
from parablock.engine.rows import STRATEGIES, EngineRows
from parablock.engine.schedule import Plan


@dataclass(frozen=True)
class Outcome:
    """What a step did to the rows that got predictions."""

    chosen_M: np.ndarray  # bool: which predictions were revealed ...
    confidence_M: np.ndarray  # ... and how sure they were
    before_K: np.ndarray  # the responses' lengths before the step
    first_K: np.ndarray  # bool: the response has its first token now
    done_K: np.ndarray  # bool: it is whole


def apply(rows: EngineRows, plan: Plan, tokens_M: np.ndarray, confidence_M: np.ndarray) -> Outcome:
    """Move the rows on, and reveal what their strategies choose."""
    chosen_M = _choose(rows, plan, confidence_M)
    rows.start_R[plan.prefill] = plan.prefill_end
    rows.start_R[plan.commit] += rows.block_size
    rows.start_R[plan.autoregressive] += 1
    rows.written_R[plan.whole] = True
    rows.written_R[plan.commit] = False
    rows.forwards_R[plan.decoding] += 1
    before_K = rows.length_R[plan.rows_K]
    rows.write(plan.rows_K[plan.owner_M[chosen_M]], plan.target_M[chosen_M], tokens_M[chosen_M])
    done_K = rows.settle(plan.rows_K)
    first_K = (before_K == 0) & (rows.length_R[plan.rows_K] > 0)
    return Outcome(chosen_M, confidence_M, before_K, first_K, done_K)


def _choose(rows: EngineRows, plan: Plan, confidence_M: np.ndarray) -> np.ndarray:
    """Which predictions `[M]` are revealed, by every row's own strategy."""
    K = len(plan.rows_K)
    if len(plan.owner_M) == K:  # one candidate each
        return np.ones(K, dtype=bool)
    shape = (K, int(plan.column_M.max()) + 1)
    candidates_KS, confidence_KS = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=np.float32)
    place = plan.owner_M, plan.column_M
    candidates_KS[place], confidence_KS[place] = True, confidence_M
    strategy_K = rows.strategy_R[plan.rows_K]
    chosen_KS = np.zeros(shape, dtype=bool)
    for number in set(strategy_K.tolist()):
        these = strategy_K == number
        which = plan.rows_K[these]
        chosen = reveal(
            torch.from_numpy(confidence_KS[these]),
            torch.from_numpy(candidates_KS[these]),
            STRATEGIES[number],
            threshold=torch.from_numpy(rows.threshold_R[which])[:, None],
            factor=torch.from_numpy(rows.factor_R[which])[:, None],
            tokens_per_step=torch.from_numpy(rows.tokens_per_step_R[which])[:, None],
        )
        chosen_KS[these] = chosen.numpy()
    chosen_M: np.ndarray = chosen_KS[place]
    return chosen_M


def make_update(rows: EngineRows, plan: Plan, outcome: Outcome, k: int) -> Update:
    """What the step did to row `plan.rows_K[k]`, for its caller."""
    row, D = int(plan.rows_K[k]), rows.block_size
    mine = outcome.chosen_M & (plan.owner_M == k)
    targets = plan.target_M[mine]
    start = int(targets.min()) // D * D
    window = slice(start, start + D)
    confidence = np.full(D, np.nan, dtype=np.float32)
    confidence[targets - start] = outcome.confidence_M[mine]
    return Update(
        tokens=rows.tokens(row)[int(outcome.before_K[k]) :],
        start=start,
        ids=rows.ids_RC[row, window].copy(),
        masked=rows.masked_RC[row, window].copy(),
        revealed=~np.isnan(confidence),
        confidence=confidence,
        forwards=int(rows.forwards_R[row]),
        done=bool(outcome.done_K[k]),
    )
