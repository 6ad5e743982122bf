"""The state of all running requests, one array entry per row: no step loops over rows in Python.

Shapes: R rows, C capacity in tokens, n some of the rows, m some positions of them, D block size, K stop tokens.
"""

from collections.abc import Sequence
from typing import get_args

import numpy as np

from parablock.decoding.config import DecodeConfig, Strategy
from parablock.decoding.grammar import Guide
from parablock.decoding.pace import Pace
from parablock.diffusion.config import MOST_MASKS
from parablock.diffusion.gate import Gate

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
FAR = np.iinfo(np.int64).max - 1
MOST_DRAFTS = 7  # where nobody says how many
DRAFTERS = ("masks", "lookup")
SETTINGS = [
    ("mask_token_id", np.int64),  # -1: none
    ("sub_block_size", np.int64), ("sub_block_cache", bool), ("strategy", np.int64), ("threshold", np.float32),
    ("factor", np.float32), ("tokens_per_step", np.int64), ("temperature", np.float32), ("top_p", np.float32),
    ("top_k", np.int64), ("seed", np.int64), ("sample", np.int64), ("draft_threshold", np.float32),
    ("min_p", np.float32), ("presence_penalty", np.float32), ("frequency_penalty", np.float32),
    ("repetition_penalty", np.float32), ("min_tokens", np.int64),
]  # fmt: skip


def by_drafter(counts_S: np.ndarray) -> dict[str, int]:
    """Counts under the names of the drafters."""
    return dict(zip(DRAFTERS, counts_S.tolist(), strict=True))


class Rows:
    """A row is free, or runs one request: `active_R`. Positions count from the prompt's first token.

    A position of `ids_RC` that is `masked_RC` holds the mask token; `masked_RC` alone says what is masked (a prompt may
    hold mask tokens, too). Drafts stand at masked positions, while a forward verifies them.
    """

    def __init__(self, rows: int, capacity: int, block_size: int, gate: Gate | None = None) -> None:
        self.block_size = block_size
        self.gate = gate
        whole, flag = np.int64, bool
        self.ids_RC = np.zeros((rows, capacity), dtype=whole)
        self.masked_RC = np.zeros((rows, capacity), dtype=flag)
        self.active_R = np.zeros(rows, dtype=flag)
        self.order_R = np.zeros(rows, dtype=whole)  # of admission
        self.mode_R = np.zeros(rows, dtype=whole)  # its number among the modes
        # a query sees its row up to the end of its grain: its whole block, or (grain 1, causal) itself
        self.grain_R = np.ones(rows, dtype=whole)
        self.prompt_R = np.zeros(rows, dtype=whole)
        self.end_R = np.zeros(rows, dtype=whole)  # prompt + max_new_tokens
        self.prefill_R = np.zeros(rows, dtype=whole)  # how many known tokens are prefilled before decoding begins
        self.start_R = np.zeros(rows, dtype=whole)  # the first position without final K/V
        self.written_R = np.zeros(rows, dtype=flag)  # the active block has K/V from an earlier forward
        self.length_R = np.zeros(rows, dtype=whole)  # response tokens so far without a gap, the stop token included
        self.stop_R = np.zeros(rows, dtype=whole)  # position of the first stop token of the response, or FAR
        self.forwards_R = np.zeros(rows, dtype=whole)  # decode forwards, the prefill not among them
        self.room_R = np.zeros(rows, dtype=whole)  # positions below it have a place for their K/V
        self.ahead_R = np.zeros(rows, dtype=whole)  # how many slots behind the last known token a forward may use
        self.most_R = np.zeros(rows, dtype=whole)  # the most drafts of a forward; 0: the mode makes none
        self.fixed_R = np.zeros(rows, dtype=flag)  # always so many, if there are guesses; else as it pays
        # drafts of the forward before, to be verified: they stand behind the last known token
        self.draft_RK = np.zeros((rows, max(MOST_MASKS, block_size)), dtype=whole)
        self.sure_RK = np.zeros(self.draft_RK.shape, dtype=np.float64)  # their confidence; 0: there is none
        self.masks_R = np.zeros(rows, dtype=whole)  # how many masks make a draft block; 0: no masks are used
        self.hope_RK = np.zeros((rows, MOST_MASKS), dtype=np.float64)  # that new drafts up to the k-th are right
        self.looks_R = np.zeros(rows, dtype=flag)  # earlier places are looked up
        self.alike_R = np.zeros(rows, dtype=whole)  # where the last known tokens stood before; 0: nobody knows
        self.chance_R = np.zeros(rows, dtype=np.float64)  # that a guess is right, as it was lately
        self.drafted_RS = np.zeros((rows, len(DRAFTERS)), dtype=whole)
        self.accepted_RS = np.zeros((rows, len(DRAFTERS)), dtype=whole)
        self.stops_RK = np.full((rows, 1), -1, dtype=whole)
        self.adjusts_R = np.zeros(rows, dtype=flag)  # its logits are changed before a token is chosen (`adjust.py`)
        self.biased_RK, self.bias_RK = np.full((rows, 1), -1, dtype=whole), np.zeros((rows, 1), dtype=np.float32)
        # what is told of the predictions, besides tokens (`logprobs.py`): so many most probable ones; -1: nothing
        self.top_R = np.full(rows, -1, dtype=whole)
        self.scored_R = np.zeros(rows, dtype=whole)  # the next position of the prompt to be predicted; FAR: none
        self.settings_R = np.zeros(rows, dtype=SETTINGS)  # named like the fields of `DecodeConfig`
        self.guides: list[Guide | None] = [None] * rows  # where a row stands in its grammar
        self.guided_R = np.zeros(rows, dtype=flag)  # it has one
        self.wall_R = np.full(rows, FAR, dtype=whole)  # nothing may stand there; FAR: nobody knows of such a place
        self.whole_R = np.zeros(rows, dtype=flag)  # what stands before the wall is a whole answer
        self.pace = Pace()

    def begin(
        self, row: int, prompt: Sequence[int] | np.ndarray, config: DecodeConfig, sample: int, mode: int, grain: int
    ) -> None:
        """A request begins in `row`: its prompt is known, the rest masked. `config` has nothing left open.

        Raises:
            OverflowError: a number that has no place in 64 bits.
        """
        assert config.max_new_tokens is not None
        assert config.seed is not None
        length = len(prompt)
        self.stops_RK = _set(self.stops_RK, row, config.stop_token_ids or ())
        self.adjusts_R[row] = config.adjusts
        self.biased_RK = _set(self.biased_RK, row, [token for token, _ in config.logit_bias])
        self.bias_RK = _set(self.bias_RK, row, [bias for _, bias in config.logit_bias])
        self.top_R[row], self.scored_R[row] = -1, FAR
        changed = {"strategy": STRATEGIES.index(config.strategy), "sample": sample}
        changed |= {"top_k": FAR if config.top_k is None else config.top_k}
        changed |= {"mask_token_id": -1 if config.mask_token_id is None else config.mask_token_id}
        self.settings_R[row] = tuple((vars(config) | changed)[name] for name, _ in SETTINGS)

        self.ids_RC[row] = max(0, changed["mask_token_id"])
        self.ids_RC[row, :length] = prompt
        self.masked_RC[row] = True
        self.masked_RC[row, :length] = False
        self.mode_R[row] = mode
        self.grain_R[row] = grain
        self.prompt_R[row] = length
        self.end_R[row] = length + config.max_new_tokens
        self.prefill_R[row] = length // grain * grain
        self.start_R[row] = self.length_R[row] = self.forwards_R[row] = 0
        self.drafted_RS[row] = self.accepted_RS[row] = 0
        self.ahead_R[row] = self.most_R[row] = self.masks_R[row] = self.alike_R[row] = 0
        self.sure_RK[row] = 0
        self.room_R[row] = self.ids_RC.shape[1]
        if config.mode == "speculative":
            self._begin_drafting(row, config)
        elif config.verified:
            self.masks_R[row] = config.sub_block_size
        self.written_R[row] = False
        self.stop_R[row] = FAR
        self.guides[row], self.guided_R[row] = None, False
        self.active_R[row] = True

    def guide(self, row: int, guide: Guide) -> None:
        """A grammar holds for the row's answer, from the beginning on.

        Raises:
            ValueError: another tokenizer than that of the grammars before.
        """
        if any(other is not None and other.vocabulary.words != guide.vocabulary.words for other in self.guides):
            raise ValueError("the grammar was compiled for another tokenizer than those before; use the model's own")
        self.guides[row], self.guided_R[row], self.wall_R[row] = guide, True, FAR

    def _begin_drafting(self, row: int, config: DecodeConfig) -> None:
        most = min(config.draft_tokens or MOST_DRAFTS, self.block_size - 1)
        self.most_R[row], self.fixed_R[row] = most, config.draft_tokens is not None
        self.looks_R[row], self.chance_R[row] = config.drafter != "masks", self.pace.chance
        # all slots lie in the block of the last known token and the next one
        self.ahead_R[row] = most
        if self.gate is not None and config.drafter != "lookup":
            self.masks_R[row] = min(self.gate.draft_tokens, most)
            self.ahead_R[row] = self.block_size - 1
            self.hope_RK[row] = self.pace.hope

    def take_out(self, row: int) -> tuple[dict[str, np.ndarray], Guide | None]:
        """The row is free; what it held, for `put_back`."""
        saved = {name: array[row].copy() for name, array in vars(self).items() if isinstance(array, np.ndarray)}
        self.active_R[row] = False
        return saved, self.guides[row]

    def put_back(self, row: int, saved: dict[str, np.ndarray], guide: Guide | None) -> None:
        """What was taken out goes on in `row`; the tokens that had final K/V are prefilled again."""
        self.stops_RK[row] = self.biased_RK[row] = -1  # there may be room for more by now
        for name, value in saved.items():
            getattr(self, name)[row, ... if value.ndim == 0 else slice(len(value))] = value
        self.guides[row] = guide
        self.prefill_R[row] = np.maximum(self.start_R[row], self.prefill_R[row])
        self.start_R[row] = 0

    def tokens(self, row: int, begin: int = 0) -> list[int]:
        """The response so far, up to its first gap, from its token `begin` on."""
        start = int(self.prompt_R[row])
        ids: list[int] = self.ids_RC[row, start + begin : start + int(self.length_R[row])].tolist()
        return ids

    def masked_block(self, rows_n: np.ndarray) -> np.ndarray:
        """Which of the D positions from `start_R` on are masked `[n, D]`."""
        # a full row's block may lie beyond its buffer; nothing is left to reveal there
        block_nD = np.minimum(self.start_R[rows_n, None] + np.arange(self.block_size), self.masked_RC.shape[1] - 1)
        masked_nD: np.ndarray = self.masked_RC[rows_n[:, None], block_nD]
        return masked_nD

    def stopping(self, rows_m: np.ndarray, tokens_m: np.ndarray) -> np.ndarray:
        """Which tokens end their row's answer `[m]`."""
        stops_m: np.ndarray = (tokens_m[:, None] == self.stops_RK[rows_m]).any(1)
        return stops_m

    def reveal(self, rows_m: np.ndarray, positions_m: np.ndarray, tokens_m: np.ndarray) -> None:
        """Tokens become known; the stop tokens among them are noted."""
        self.ids_RC[rows_m, positions_m] = tokens_m
        self.masked_RC[rows_m, positions_m] = False
        stops_m = self.stopping(rows_m, tokens_m)
        if stops_m.any():
            np.minimum.at(self.stop_R, rows_m[stops_m], positions_m[stops_m])

    def end_at_walls(self, rows_M: np.ndarray, positions_M: np.ndarray, chosen_M: np.ndarray) -> np.ndarray:
        """What was revealed at walls and behind is masked again, and its answers end; which reveals remain `[M]`."""
        gone_M: np.ndarray = chosen_M & (positions_M >= np.where(self.guided_R, self.wall_R, FAR)[rows_M])
        if gone_M.any():
            rows_m, at_m = rows_M[gone_M], positions_M[gone_M]
            self.masked_RC[rows_m, at_m] = True
            self.ids_RC[rows_m, at_m] = np.maximum(self.settings_R["mask_token_id"][rows_m], 0)
            wall_m = self.wall_R[rows_m]
            self.start_R[rows_m] = np.minimum(self.start_R[rows_m], wall_m)
            self.stop_R[rows_m] = np.where(self.whole_R[rows_m], wall_m - 1, FAR)  # the last token ends it ...
            self.end_R[rows_m] = np.where(self.whole_R[rows_m], self.end_R[rows_m], wall_m)  # ... or it is cut
        left_M: np.ndarray = chosen_M & ~gone_M
        return left_M

    def measure(self, rows_n: np.ndarray) -> np.ndarray:
        """Update the lengths of `rows_n`; which of them hold a whole response `[n]`.

        A response ends with a stop token that has no mask before it, or when all its tokens stand without a gap.
        """
        masked_nD = self.masked_block(rows_n)
        start_n, end_n = self.start_R[rows_n], self.end_R[rows_n]
        gap_n = start_n + np.where(masked_nD.any(1), masked_nD.argmax(1), self.block_size)
        gap_n = np.minimum(gap_n, end_n)
        stopped_n = self.stop_R[rows_n] < gap_n
        self.length_R[rows_n] = np.where(stopped_n, self.stop_R[rows_n] + 1, gap_n) - self.prompt_R[rows_n]
        done: np.ndarray = stopped_n | (gap_n == end_n)
        return done


def _set(values_RK: np.ndarray, row: int, values: Sequence[float]) -> np.ndarray:
    """The array with these values of a row, and -1 behind them; wider, where they need it."""
    more = max(0, len(values) - values_RK.shape[1])
    values_RK = np.pad(values_RK, ((0, 0), (0, more)), constant_values=-1) if more else values_RK
    values_RK[row] = -1
    values_RK[row, : len(values)] = values
    return values_RK
