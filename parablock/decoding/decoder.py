"""One decoder for all modes: how a request begins, what its row runs next, what a caller sees of it.

Whoever decodes, `generate` for a batch or the engine for whoever comes, does the same: `begin` a request, then in turns
run the works (`work.prefill` until a row's known tokens have their K/V, then `next_work`), let `proposals` name tokens,
and `work.settle` what became known.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from parablock.decoding.config import DecodeConfig
from parablock.decoding.grammar import CompiledGrammar
from parablock.decoding.modes.autoregressive import AUTOREGRESSIVE
from parablock.decoding.modes.block_diffusion import BLOCK_DIFFUSION
from parablock.decoding.modes.speculative import SPECULATIVE
from parablock.decoding.modes.verified import VERIFIED
from parablock.decoding.rows import Rows
from parablock.decoding.work import Settled, Work

MODES = {
    "diffusion": BLOCK_DIFFUSION, "verified": VERIFIED, "autoregressive": AUTOREGRESSIVE, "speculative": SPECULATIVE
}  # fmt: skip
NUMBERS = {name: number for number, name in enumerate(MODES)}


def begin(
    rows: Rows, row: int, prompt: Sequence[int] | np.ndarray, config: DecodeConfig, sample: int = 0,
    grammar: CompiledGrammar | None = None,
) -> None:  # fmt: skip
    """A request begins in `row` (see `Rows.begin`), its answer held to a grammar if there is one."""
    assert config.mode is not None
    name = "verified" if config.verified else config.mode
    grain = 1 if MODES[name].causal else rows.block_size
    rows.begin(row, prompt, config, sample, NUMBERS[name], grain)
    if grammar is not None:
        rows.guide(row, grammar.begin(config))


def next_work(rows: Rows, which: np.ndarray, beside: int = 0) -> list[Work]:
    """What the rows `which` run next, their prefill done: one `Work` for every mode among them.

    `beside`: about how many tokens the forward runs for other rows.
    """
    mode_n = rows.mode_R[which]
    works = []
    rows.pace.plan(beside)
    for number, mode in enumerate(MODES.values()):
        mine = which[mode_n == number]
        if len(mine):
            works.append(mode.next_work(rows, mine))
            rows.pace.beside += works[-1].tokens
    return works


@dataclass(frozen=True)
class Window:
    """The blocks that some rows are decoding, after a step: `start [n]`, others `[n, D]` and `[n, K]`; see `Step`.

    Of a row that moved on to another block, the window begins with the first token of the step.
    """

    start: np.ndarray
    ids: np.ndarray
    masked: np.ndarray
    revealed: np.ndarray
    confidence: np.ndarray
    drafts: np.ndarray
    refused: np.ndarray


@dataclass(frozen=True)
class Before:
    """What a forward is about to verify: what stands behind each row's last known token; drafts so far."""

    ids_RK: np.ndarray
    drafted_R: np.ndarray
    accepted_R: np.ndarray


def before(rows: Rows) -> Before:
    """The rows as they stand when their next work is planned, for `window`."""
    position_RK = rows.start_R[:, None] + np.arange(1, rows.block_size)
    ids_RK = np.take_along_axis(rows.ids_RC, np.minimum(position_RK, rows.ids_RC.shape[1] - 1), axis=1)
    return Before(ids_RK, rows.drafted_RS.sum(1), rows.accepted_RS.sum(1))


def window(rows: Rows, settled: Settled, which: np.ndarray, before: Before) -> Window:
    """What the step that `settled` tells of did to the active blocks of the rows `which`."""
    D = rows.block_size
    start_n = rows.start_R[which] // D * D
    index_R = np.full(len(rows.active_R), -1)
    index_R[which] = np.arange(len(which))
    shown_M = settled.chosen_M & (index_R[settled.row_M] >= 0)
    n = index_R[settled.row_M[shown_M]]
    np.minimum.at(start_n, n, settled.target_M[shown_M])  # of a step across two blocks all is shown
    position_nD = np.minimum(start_n[:, None] + np.arange(D), rows.ids_RC.shape[1] - 1)
    confidence_nD = np.full(position_nD.shape, np.nan, dtype=np.float32)
    confidence_nD[n, settled.target_M[shown_M] - start_n[n]] = settled.confidence_M[shown_M]
    return Window(
        start_n, rows.ids_RC[which[:, None], position_nD], rows.masked_RC[which[:, None], position_nD],
        ~np.isnan(confidence_nD), confidence_nD, _drafts(rows, which), _refused(rows, which, before),
    )  # fmt: skip


def _drafts(rows: Rows, which: np.ndarray) -> np.ndarray:
    """What masks have drafted and no forward has verified yet `[n, K]`: up to a gap or the answer's end."""
    draft_nK, place_K = rows.draft_RK[which], np.arange(1, rows.draft_RK.shape[1] + 1)
    shown_nK = (rows.sure_RK[which] > 0) & (place_K <= rows.most_R[which, None])
    shown_nK &= rows.start_R[which, None] + place_K < rows.end_R[which, None]
    shown_nK &= (rows.stop_R[which] > rows.start_R[which])[:, None]
    return np.where(np.logical_and.accumulate(shown_nK, axis=1), draft_nK, -1)


def _refused(rows: Rows, which: np.ndarray, before: Before) -> np.ndarray:
    """The drafts that the step has verified and that were not accepted `[n, K]`."""
    drafted_n = rows.drafted_RS[which].sum(1) - before.drafted_R[which]
    accepted_n = rows.accepted_RS[which].sum(1) - before.accepted_R[which]
    draft_nK = before.ids_RK[which]
    place_K = np.arange(draft_nK.shape[1])
    source_nK = np.minimum(accepted_n[:, None] + place_K, draft_nK.shape[1] - 1)
    refused_nK = np.take_along_axis(draft_nK, source_nK, axis=1)
    refused_n = (drafted_n - accepted_n) * (rows.most_R[which] > 0)
    return np.where(place_K < refused_n[:, None], refused_nK, -1)
