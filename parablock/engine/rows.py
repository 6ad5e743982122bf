"""The state of all running requests, one array entry per row: no step loops over rows in Python.

Shapes: R rows, C capacity in tokens, P pages of a row, n some of the rows, D block size, S positions of a sub-block.
"""

from typing import get_args

import numpy as np

from parablock.decoding.config import DecodeConfig, Strategy

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
FAR = np.iinfo(np.int64).max - 1


class EngineRows:
    """A row is free, or runs one request: `active_R`. Positions count from the prompt's first token."""

    def __init__(self, rows: int, pages_per_row: int, block_size: int) -> None:
        self.block_size = block_size
        self.spare = rows  # one row more than requests can have: padding, all its K/V in page 0
        rows += 1
        capacity = pages_per_row * block_size
        whole, real, flag = np.int64, np.float32, bool
        self.ids_RC = np.zeros((rows, capacity), dtype=whole)  # the mask token at masked positions
        self.masked_RC = np.zeros((rows, capacity), dtype=flag)
        self.table_RP = np.zeros((rows, pages_per_row), dtype=whole)  # page of every block; 0: none
        self.active_R = np.zeros(rows, dtype=flag)
        self.order_R = np.zeros(rows, dtype=whole)  # of admission
        self.autoregressive_R = np.zeros(rows, dtype=flag)
        self.prompt_R = np.zeros(rows, dtype=whole)
        self.end_R = np.zeros(rows, dtype=whole)  # prompt + max_new_tokens
        self.prefill_R = np.zeros(rows, dtype=whole)  # how much of the prompt is prefilled before decoding begins
        self.start_R = np.zeros(rows, dtype=whole)  # the first position without final K/V
        self.written_R = np.zeros(rows, dtype=flag)  # the active block has K/V from an earlier forward
        self.length_R = np.zeros(rows, dtype=whole)  # response tokens so far, without a gap
        self.stop_R = np.zeros(rows, dtype=whole)  # position of the first stop token of the response, or FAR
        self.forwards_R = np.zeros(rows, dtype=whole)
        # settings
        self.stops_RK = np.full((rows, 1), -1, dtype=whole)
        self.mask_token_R = np.zeros(rows, dtype=whole)  # -1: none
        self.sub_block_R = np.zeros(rows, dtype=whole)
        self.sub_block_cache_R = np.zeros(rows, dtype=flag)
        self.strategy_R = np.zeros(rows, dtype=whole)
        self.threshold_R = np.zeros(rows, dtype=real)
        self.factor_R = np.zeros(rows, dtype=real)
        self.tokens_per_step_R = np.zeros(rows, dtype=whole)
        self.temperature_R = np.zeros(rows, dtype=real)
        self.top_p_R = np.zeros(rows, dtype=real)
        self.top_k_R = np.zeros(rows, dtype=whole)
        self.seed_R = np.zeros(rows, dtype=whole)
        self.sample_R = np.zeros(rows, dtype=whole)
        self.streaming_R = np.zeros(rows, dtype=flag)

    def free(self) -> int | None:
        """A row that runs nothing, if there is one."""
        free = (~self.active_R[: self.spare]).nonzero()[0]
        return int(free[0]) if len(free) else None

    def occupy(
        self,
        row: int,
        order: int,
        prompt: np.ndarray,
        pages: list[int],
        cached: int,
        config: DecodeConfig,
        sample: int,
        streaming: bool,
    ) -> None:
        """Begin a request in `row`; the first `cached` tokens of its prompt have their K/V already."""
        assert config.max_new_tokens is not None
        assert config.seed is not None
        D, length = self.block_size, len(prompt)
        autoregressive = config.mode == "autoregressive"
        mask_token = -1 if config.mask_token_id is None else config.mask_token_id
        self.ids_RC[row] = 0 if autoregressive else mask_token
        self.ids_RC[row, :length] = prompt
        self.masked_RC[row] = True
        self.masked_RC[row, :length] = False
        self.table_RP[row] = 0
        self.table_RP[row, : len(pages)] = pages
        self.active_R[row] = True
        self.order_R[row] = order
        self.autoregressive_R[row] = autoregressive
        self.prompt_R[row] = length
        self.end_R[row] = length + config.max_new_tokens
        self.prefill_R[row] = length if autoregressive else length // D * D
        self.start_R[row] = cached
        self.written_R[row] = False
        self.length_R[row] = self.forwards_R[row] = 0
        self.stop_R[row] = FAR

        stops = config.stop_token_ids or ()
        if len(stops) > self.stops_RK.shape[1]:
            more = len(stops) - self.stops_RK.shape[1]
            self.stops_RK = np.pad(self.stops_RK, ((0, 0), (0, more)), constant_values=-1)
        self.stops_RK[row] = -1
        self.stops_RK[row, : len(stops)] = stops
        self.mask_token_R[row] = mask_token
        self.sub_block_R[row] = config.sub_block_size
        self.sub_block_cache_R[row] = config.sub_block_cache
        self.strategy_R[row] = STRATEGIES.index(config.strategy)
        self.threshold_R[row] = config.threshold
        self.factor_R[row] = config.factor
        self.tokens_per_step_R[row] = config.tokens_per_step
        self.temperature_R[row] = config.temperature
        self.top_p_R[row] = config.top_p
        self.top_k_R[row] = FAR if config.top_k is None else config.top_k
        self.seed_R[row] = config.seed
        self.sample_R[row] = sample
        self.streaming_R[row] = streaming

    def tokens(self, row: int) -> list[int]:
        """The response so far, up to its first gap."""
        start = int(self.prompt_R[row])
        ids: list[int] = self.ids_RC[row, start : start + int(self.length_R[row])].tolist()
        return ids

    def window(self, rows_n: np.ndarray) -> np.ndarray:
        """The positions `[n, D]` of the active blocks."""
        return self.start_R[rows_n, None] + np.arange(self.block_size)

    def masked_window(self, rows_n: np.ndarray) -> np.ndarray:
        """Which positions of the active blocks are masked `[n, D]`."""
        # a full row's window may lie beyond its buffer; nothing is left to reveal there
        window = np.minimum(self.window(rows_n), self.masked_RC.shape[1] - 1)
        masked_nD: np.ndarray = self.masked_RC[rows_n[:, None], window]
        return masked_nD

    def write(self, rows_m: np.ndarray, positions_m: np.ndarray, tokens_m: np.ndarray) -> None:
        """Reveal tokens, and note the stop tokens among them."""
        self.ids_RC[rows_m, positions_m] = tokens_m
        self.masked_RC[rows_m, positions_m] = False
        stops_m = (tokens_m[:, None] == self.stops_RK[rows_m]).any(1)
        np.minimum.at(self.stop_R, rows_m[stops_m], positions_m[stops_m])

    def settle(self, rows_n: np.ndarray) -> np.ndarray:
        """Update the lengths of `rows_n`; which of them hold a whole response `[n]`.

        A response ends with a stop token that has no mask before it, or when all its tokens stand without a gap.
        """
        masked_nD = self.masked_window(rows_n)
        start_n, end_n = self.start_R[rows_n], self.end_R[rows_n]
        gap_n = start_n + np.where(masked_nD.any(1), masked_nD.argmax(1), self.block_size)
        gap_n = np.where(self.autoregressive_R[rows_n], start_n + 1, gap_n)
        gap_n = np.minimum(gap_n, end_n)
        stopped_n = self.stop_R[rows_n] < gap_n
        self.length_R[rows_n] = np.where(stopped_n, self.stop_R[rows_n] + 1, gap_n) - self.prompt_R[rows_n]
        done: np.ndarray = stopped_n | (gap_n == end_n)
        return done
