"""The engine: many requests share one model, and one forward serves all of them.

A step is: take in what has been submitted, admit what fits, plan a forward, run it, and give every row what it
revealed. Rows join and leave at any step. Callers drive the steps themselves (`step`, `generate`, or waiting for a
handle), or let a thread do it (`start`).
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from parablock.config import DecodeConfig, EngineConfig, Model
from parablock.decoding.generate import GenerateOutput, Prompts, as_rows, resolve
from parablock.engine.admission import kv_pages, pages_needed, resolve_request, reusable_blocks
from parablock.engine.outcome import Outcome, apply, make_update
from parablock.engine.pages import PagePool
from parablock.engine.request import Handle, QueueFullError, Request, Status
from parablock.engine.rows import EngineRows
from parablock.engine.runner import Runner
from parablock.engine.schedule import Plan, plan

log = logging.getLogger(__name__)


class Engine:
    """Decodes many requests at once on a stock model (see `EngineConfig`).

    While an engine is open the model's attention serves it; `close` (or a `with` block) gives it back. A request's
    tokens are those of `pb.generate`, whatever runs beside it.

    Args:
        model: a stock transformers decoder; for block diffusion its config holds `bd_size` and `mask_token_id`.
        config: see `EngineConfig`.

    Raises:
        ValueError: a model that block diffusion cannot run, or settings that do not fit it.
    """

    def __init__(self, model: Model, config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig()
        block_size = self.config.block_size or getattr(model.config, "bd_size", None)
        if block_size is None:
            raise ValueError("the checkpoint names no block size; set EngineConfig(block_size=...)")
        context = model.config.max_position_embeddings
        if self.config.max_context is not None and self.config.max_context > context:
            raise ValueError(f"max_context={self.config.max_context} exceeds the model's context of {context} tokens")
        if self.config.cuda_graphs and torch.device(model.device).type != "cuda":
            raise ValueError(f"cuda_graphs=True needs a CUDA device, and the model is on {model.device}")
        resolve(model, [[0]], DecodeConfig(mode="autoregressive", max_new_tokens=1))  # can it be run at all?
        self.model = model
        self.block_size = int(block_size)
        self.max_context = self.config.max_context or context
        self.runner = Runner(model, self.block_size, self.config)
        try:
            pages_per_row = -(-self.max_context // self.block_size)
            pages = kv_pages(self.config, pages_per_row, self.block_size, self.runner)
            self.runner.allocate(pages)
        except BaseException:
            self.runner.close()
            raise
        self.pool = PagePool(pages, self.block_size, prefix_cache=self.config.prefix_cache)
        self.rows = EngineRows(self.config.max_rows, pages_per_row, self.block_size)
        self.steps = 0
        self.step_seconds = 0.0  # in all steps together
        self.prefill_tokens = 0  # prompt tokens that were run
        self.prefill_seconds = 0.0  # their share of the steps' time, by tokens
        self._handles: list[Handle | None] = [None] * self.config.max_rows
        self._pages_of: list[list[int]] = [[] for _ in range(self.config.max_rows)]
        self._waiting: deque[Handle] = deque()
        self._admitted = 0
        self._inbox: deque[Handle] = deque()  # submitted or to be cancelled; appended to by any thread
        self._changed = threading.Condition()  # something came in, or a handle moved on
        self._stepping = threading.Lock()
        self._thread: threading.Thread | None = None
        self._open = 0  # requests that have not ended
        self._closed = False
        self.error: Exception | None = None  # why it stopped by itself

    # --- for callers -------------------------------------------------------------------------------------------------

    def submit(self, request: Request, listener: Callable[[], None] | None = None) -> Handle:
        """Queue a request; first come, first served. Safe from any thread.

        `listener` is called after each of the request's updates and after its end, by the thread that runs the steps:
        it must return at once.

        Raises:
            ValueError: a request that can never run: an empty prompt, more tokens than the context or the K/V memory
                holds, another block size than the engine's, settings the model cannot serve.
            QueueFullError: `max_rows` + `max_queue` requests have not ended.
        """
        config = resolve_request(self.model, request, self.block_size, self.max_context, self.pool.pages)
        handle = Handle(self, request, config, listener)
        with self._changed:
            if self._closed:
                raise ValueError("the engine is closed; make a new one")
            queue = self.config.max_queue
            if queue is not None and self._open >= self.config.max_rows + queue:
                raise QueueFullError(f"{self._open} requests run or wait; try again when one has ended")
            self._open += 1
            self._inbox.append(handle)
            self._changed.notify_all()
        return handle

    def cancel(self, handle: Handle) -> None:
        """Give a request up; its row and memory are free within one step. One that has ended stays as it is."""
        if handle._engine is not self:
            raise ValueError("the handle belongs to another engine")
        with self._changed:
            if handle.done:
                return
            self._inbox.append(handle)
            handle._cancelled = True
            self._changed.notify_all()

    def generate(self, input_ids: Prompts, config: DecodeConfig | None = None) -> GenerateOutput:
        """Decode one or many prompts to the end, as `pb.generate` does; `forwards` counts the engine's own steps."""
        started, steps = time.perf_counter(), self.steps
        config = config or DecodeConfig()
        if config.seed is None:
            config = replace(config, seed=int(torch.randint(2**31, ()).item()))
        handles: list[Handle] = []
        try:
            for row, prompt in enumerate(as_rows(input_ids)):
                handles.append(self.submit(Request(prompt, config, sample=row)))
            tokens = [handle.result() for handle in handles]
        except BaseException:
            for handle in handles:
                self.cancel(handle)
            raise
        decode_forwards = [handle.forwards for handle in handles]
        return GenerateOutput(tokens, self.steps - steps, decode_forwards, time.perf_counter() - started)

    def wait(self, handle: Handle, *, timeout: float | None = None, for_update: bool = False) -> None:
        """Until the handle is done (or, `for_update`, has a new update); without a thread, by running steps."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout

        def arrived() -> bool:
            return handle.done or (for_update and bool(handle._updates))

        while not arrived():
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"the request is still {handle.status} after {timeout} seconds")
            if self._thread is None:
                if not self.step() and not arrived():
                    raise RuntimeError(f"the engine has nothing to run, but the request is {handle.status}")
            else:
                with self._changed:
                    self._changed.wait_for(lambda: arrived() or self._thread is None, min(left, 3600))

    def start(self) -> None:
        """Let a thread run the steps from now on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="parablock-engine", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop: requests that have not ended fail, the memory is freed, the model gets its own attention back."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._stepping:
            self._fail_all(RuntimeError("the engine was closed"))

    def _fail_all(self, error: Exception) -> None:
        """The end: nobody is left waiting, the memory is free, the model has its own attention."""
        self._take_in()
        unfinished = [*self._waiting, *(h for h in self._handles if h)]
        self._waiting.clear()
        for handle in unfinished:
            self._end(handle, "failed", error)
        self.pool.clear()
        self.runner.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """It takes no requests any more."""
        return self._closed

    @property
    def stats(self) -> dict[str, int]:
        """Requests waiting and running, pages held by them, pages kept for reuse, pages in all, steps so far."""
        return {
            "waiting": len(self._waiting) + len(self._inbox),
            "running": int(self.rows.active_R.sum()),
            "pages_held": self.pool.held,
            "pages_cached": self.pool.cached,
            "pages": self.pool.pages,
            "steps": self.steps,
        }

    # --- one step ----------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One forward for everything that runs; False if there was nothing to run."""
        with self._stepping:
            self._take_in()
            self._admit()
            taking_part = self.rows.active_R.nonzero()[0]
            if not len(taking_part):
                return False
            started = time.perf_counter()
            try:
                work = plan(self.rows, taking_part, self.config.prefill_chunk, self.config.cuda_graphs)
                taking_part = work.rows
                prefill = int((work.prefill_end - self.rows.start_R[work.prefill]).sum())
                tokens_M, confidence_M = self.runner.run(self.rows, work)
                self.steps += 1
                self._tell(work, apply(self.rows, work, tokens_M, confidence_M))
                self.prefill_tokens += prefill
                self.prefill_seconds += (time.perf_counter() - started) * prefill / work.tokens
            except Exception as error:
                log.exception("a step failed; its requests fail with it")
                if self._is_broken():
                    self._fail_all(error)
                    return True
                for row in taking_part:
                    if (handle := self._handles[row]) is not None:
                        self._end(handle, "failed", error, int(row))
            self.step_seconds += time.perf_counter() - started
            return True

    def _is_broken(self) -> bool:
        """After a failed step: does a tiny forward fail, too? Then the engine is closed, and `error` says why."""
        try:
            self.runner.probe()
        except Exception as error:
            with self._changed:
                self._closed, self.error = True, error
                self._changed.notify_all()
        return self.error is not None

    def _take_in(self) -> None:
        """Requests from other threads to the queue, cancelled ones out of it or out of their rows."""
        while self._inbox:
            handle = self._inbox.popleft()
            if handle._cancelled:
                if not handle.done:
                    if handle in self._waiting:
                        self._waiting.remove(handle)
                    self._end(handle, "cancelled")
            else:
                self._waiting.append(handle)

    def _admit(self) -> None:
        """The first in the queue gets a row and all the memory it can need, or waits, and all others behind it."""
        while self._waiting:
            row, handle = self.rows.free(), self._waiting[0]
            if row is None:
                return
            prompt, config = np.asarray(handle.request.prompt, dtype=np.int64), handle.config
            matched: list[int] = []
            if self.config.prefix_cache:
                matched = self.pool.match(prompt, reusable_blocks(len(prompt), self.block_size, config), _root(config))
            pages = self.pool.reserve(matched, pages_needed(len(prompt), self.block_size, config))
            if pages is None:
                return
            self._waiting.popleft()
            self._admitted += 1
            handle.cached_tokens = len(matched) * self.block_size
            handle.status = "running"
            self._handles[row], self._pages_of[row] = handle, pages
            request = handle.request
            self.rows.occupy(
                row, self._admitted, prompt, pages, handle.cached_tokens, config, request.sample, request.stream
            )

    def _tell(self, work: Plan, outcome: Outcome) -> None:
        """Tell the handles what the step did, and end the requests whose response is whole."""
        rows = self.rows
        for row in work.prefill[rows.start_R[work.prefill] == rows.prefill_R[work.prefill]]:
            self._register(row)
        streaming_K = rows.streaming_R[work.rows_K]
        for k in (outcome.first_K | outcome.done_K | streaming_K).nonzero()[0]:
            row = int(work.rows_K[k])
            handle = self._handles[row]
            assert handle is not None
            if outcome.first_K[k]:
                handle.first_token = time.perf_counter() - handle.submitted
            if streaming_K[k]:
                handle.tokens = rows.tokens(row)
                handle._updates.append(make_update(rows, work, outcome, int(k)))
                handle._notify()
            if outcome.done_K[k]:
                last = rows.prompt_R[row] + rows.length_R[row] - 1
                handle.finish_reason = "stop" if rows.stop_R[row] == last else "length"
                self._end(handle, "finished", row=row)
        if streaming_K.any():
            with self._changed:
                self._changed.notify_all()

    def _end(self, handle: Handle, status: Status, error: Exception | None = None, row: int | None = None) -> None:
        """A request ends: its row and pages are free, whoever waits is woken."""
        if row is None:
            row = next((r for r, h in enumerate(self._handles) if h is handle), None)
        if row is not None:
            handle.tokens = self.rows.tokens(row)
            handle.forwards = int(self.rows.forwards_R[row])
            if status != "failed":
                self._register(row)
            self.pool.release(self._pages_of[row])
            self._handles[row], self._pages_of[row] = None, []
            self.rows.active_R[row] = False
        handle.seconds = time.perf_counter() - handle.submitted
        handle.error = error
        with self._changed:
            handle.status = status
            self._open -= 1
            self._changed.notify_all()
        handle._notify()

    def _register(self, row: int) -> None:
        """The row's committed blocks may be reused."""
        blocks = int(self.rows.start_R[row]) // self.block_size
        handle = self._handles[row]
        assert handle is not None
        self.pool.register(self.rows.ids_RC[row], self._pages_of[row][:blocks], _root(handle.config))

    def _run(self) -> None:
        while not self._closed:
            try:
                worked = self.step()
            except Exception as error:
                log.exception("the engine stops")
                self.error = error
                threading.Thread(target=self.close).start()  # it waits for this thread
                return
            if not worked:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._inbox)


def _root(config: DecodeConfig) -> int:
    """The K/V of a prompt differ between the modes."""
    return int(config.mode == "autoregressive")
