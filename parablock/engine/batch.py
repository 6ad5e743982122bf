"""The requests that run: each has a row, and pages of the K/V memory that it takes as it grows.

Shapes: R rows, P pages of a row.
"""

import time

import numpy as np

from parablock.decoding.decoder import begin
from parablock.decoding.rows import FAR, Rows, by_drafter
from parablock.engine.config import EngineConfig
from parablock.engine.pages import PagePool
from parablock.engine.request import Handle
from parablock.engine.runner import Runner


class Batch:
    """Rows of running requests, the handles they belong to, and `table_RP`: the page of every block; 0: none (yet)."""

    def __init__(self, runner: Runner, config: EngineConfig, pages: int, pages_per_row: int) -> None:
        self.runner = runner
        self.block_size = runner.block_size
        self.pool = PagePool(pages, self.block_size, prefix_cache=config.prefix_cache)
        # one row more than requests can have: padding, without pages
        self.rows = Rows(config.max_rows + 1, pages_per_row * self.block_size, self.block_size, runner.gate)
        self.table_RP = np.zeros((config.max_rows + 1, pages_per_row), dtype=np.int64)
        self.streaming_R = np.zeros(config.max_rows + 1, dtype=bool)
        self.handles: list[Handle | None] = [None] * config.max_rows
        self.admitted = 0

    @property
    def active(self) -> np.ndarray:
        """The numbers of the rows that run a request."""
        return self.rows.active_R.nonzero()[0]

    def free_row(self) -> int | None:
        """A row that runs nothing, if there is one."""
        free = (~self.rows.active_R[:-1]).nonzero()[0]
        return int(free[0]) if len(free) else None

    def admit(self, handle: Handle, row: int) -> bool:
        """Begin a request in a free row, or go on with it; False if there is no memory yet for what is known of it."""
        rows, request, D = self.rows, handle.request, self.block_size
        running = len(self.active)
        kept = None
        if handle.paused is None:
            begin(rows, row, request.prompt, handle.config, request.sample, request.grammar)
            rows.order_R[row] = self.admitted
            rows.top_R[row] = -1 if request.logprobs is None else request.logprobs
            rows.scored_R[row] = 1 if request.prompt_logprobs else FAR
        else:
            state, kept = handle.paused
            rows.put_back(row, *state)
        scores = rows.scored_R[row] < rows.prompt_R[row]
        if scores:  # the prompt is predicted from its first token on, and all of it is run
            rows.scored_R[row] = 1
        prefill = int(rows.prefill_R[row])
        # a token that predicts the next one must run in any case
        reusable = 0 if scores else (prefill - int(rows.masked_RC[row, prefill])) // D
        matched = self.pool.match(rows.ids_RC[row], reusable, self._root(row))
        # every row that runs may need a page soon
        pages = self.pool.reserve(matched, prefill // D + 1, spare=running)
        if pages is None:
            rows.active_R[row] = False
            return False
        self.table_RP[row, : len(pages)] = pages
        rows.start_R[row], rows.room_R[row] = len(matched) * D, len(pages) * D
        if handle.paused is None:
            self.admitted += 1
            handle.cached_tokens = len(matched) * D
            handle.admitted = time.perf_counter() - handle.submitted
        if kept is not None:
            self.runner.kv.write(pages[-1], kept)
        self.handles[row], self.streaming_R[row] = handle, request.stream
        handle.paused, handle.status = None, "running"
        return True

    def grow(self) -> list[Handle]:
        """A page for every row that goes on to a new block; when none is left, the youngest rows give theirs back.

        Returns whose rows these were, the youngest first.
        """
        rows, paused = self.rows, []
        # the last position that may run: drafts want the next page early
        last_R = rows.start_R + rows.ahead_R
        last_R = np.where(rows.masks_R > 0, last_R, np.maximum(rows.start_R, np.minimum(last_R, rows.end_R - 2)))
        last_R = np.minimum(last_R, rows.ids_RC.shape[1] - 1)
        wanting = (rows.active_R & (rows.start_R >= rows.prefill_R) & (rows.room_R <= last_R)).nonzero()[0]
        for row in sorted(wanting, key=lambda row: rows.order_R[row]):
            while rows.active_R[row] and rows.room_R[row] <= last_R[row]:
                block = int(rows.room_R[row]) // self.block_size
                after = int(self.table_RP[row, block - 1])
                needed = rows.room_R[row] <= rows.start_R[row]
                # for drafts alone only where a page is left for every row
                if page := self.pool.reserve([], 1, spare=0 if needed else len(self.active), after=after):
                    self.table_RP[row, block] = page[0]
                    rows.room_R[row] += self.block_size
                elif needed:
                    paused.append(self._pause(int(self.active[rows.order_R[self.active].argmax()])))
                else:
                    break
        return paused

    def _pause(self, row: int) -> Handle:
        """A row gives its pages back; its known tokens will be run again.

        Of its active block the K/V are kept as they are, so that it goes on as if nothing had happened.
        """
        handle, rows = self.handles[row], self.rows
        assert handle is not None
        written, block = rows.written_R[row], rows.start_R[row] // self.block_size
        kept = self.runner.kv.read(int(self.table_RP[row, block])) if written else None
        paused = rows.take_out(row), kept
        self.leave(row)
        handle.paused, handle.status = paused, "waiting"
        return handle

    def leave(self, row: int, *, reuse: bool = True) -> None:
        """The row is free; its committed blocks may be reused (unless a step failed that wrote to them)."""
        handle = self.handles[row]
        if handle is not None:
            handle.forwards = int(self.rows.forwards_R[row])
            handle.drafted = by_drafter(self.rows.drafted_RS[row])
            handle.accepted = by_drafter(self.rows.accepted_RS[row])
            if not self.streaming_R[row]:
                handle.tokens = self.rows.tokens(row)
                handle.logprobs = handle._logprobs(0, len(handle.tokens))
            if reuse:
                self.register(row)
        pages = self.table_RP[row]
        self.pool.release(pages[pages > 0].tolist())
        self.table_RP[row] = 0
        self.rows.active_R[row] = self.streaming_R[row] = False
        self.handles[row] = None

    def register(self, row: int) -> None:
        """The row's committed blocks may be reused."""
        blocks = int(self.rows.start_R[row]) // self.block_size
        self.pool.register(self.rows.ids_RC[row], self.table_RP[row, :blocks].tolist(), self._root(row))

    def _root(self, row: int) -> int:
        """The K/V of a prompt depend on how its tokens attend."""
        return int(self.rows.grain_R[row])
