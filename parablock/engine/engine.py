"""The engine: many requests share one model, and one forward serves all of them.

A step is: take in what has been submitted, admit what fits, give growing rows memory, plan a forward, run it, and tell
every caller what became known. Rows join and leave at any step. Callers drive the steps themselves (`step`, `generate`,
or waiting for a handle), or let a thread do it (`start`).
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import torch

from parablock.decoding.config import DecodeConfig
from parablock.decoding.decoder import Before, before
from parablock.decoding.generate import (
    DEFAULT_BLOCK_SIZE,
    Asked,
    GenerateOutput,
    Prompts,
    as_rows,
    each_grammar,
    resolve,
)
from parablock.decoding.rows import DRAFTERS
from parablock.decoding.work import Settled, settle
from parablock.engine.admission import kv_pages, resolve_request
from parablock.engine.batch import Batch
from parablock.engine.config import EngineConfig
from parablock.engine.request import Handle, QueueFullError, Request, Status
from parablock.engine.runner import Runner
from parablock.engine.schedule import Plan, plan
from parablock.engine.telling import note, tell
from parablock.settings import Model

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
        own = getattr(model.config, "bd_size", None)
        self.block_size = int(self.config.block_size or own or DEFAULT_BLOCK_SIZE)
        context = model.config.max_position_embeddings
        if self.config.max_context is not None and self.config.max_context > context:
            raise ValueError(f"max_context={self.config.max_context} exceeds the model's context of {context} tokens")
        devices = {p.device for p in model.parameters()}
        if self.config.cuda_graphs and {device.type for device in devices} != {"cuda"}:
            raise ValueError(f"cuda_graphs=True needs a CUDA device, and the model is on {model.device}")
        if self.config.cuda_graphs and len(devices) > 1:
            raise ValueError(f"cuda_graphs=True needs a model on one device, and it is spread over {len(devices)}")
        resolve(model, [[0]], DecodeConfig(mode="autoregressive", max_new_tokens=1))  # can it be run at all?
        self.model = model
        self.max_context = self.config.max_context or context
        self.runner = Runner(model, self.block_size, self.config)
        try:
            pages_per_row = -(-self.max_context // self.block_size)
            pages = kv_pages(self.config, pages_per_row, self.block_size, self.runner.kv.bytes_on)
            self.runner.allocate(pages)
            self.batch = Batch(self.runner, self.config, pages, pages_per_row)
        except BaseException:
            self.runner.close()
            raise
        self.steps = 0
        self.step_seconds = 0.0  # in all steps together
        self.prefill_tokens = 0  # prompt tokens that were run
        self.prefill_seconds = 0.0  # their share of the steps' time, by tokens
        self.preemptions = 0  # how often a row gave its pages to others
        # tokens, in the requests that have ended, by drafter
        self.drafted, self.accepted = dict.fromkeys(DRAFTERS, 0), dict.fromkeys(DRAFTERS, 0)
        self.error: Exception | None = None  # why it stopped by itself
        self._waiting: deque[Handle] = deque()
        self._open = 0  # requests that have not ended
        self._inbox: deque[Handle] = deque()  # submitted or to be cancelled; appended to by any thread
        self._changed = threading.Condition()  # something came in, or a handle moved on
        self._stepping = threading.RLock()
        self._thread: threading.Thread | None = None
        self._closed = False

    # --- for callers -------------------------------------------------------------------------------------------------

    def submit(self, request: Request, listener: Callable[[], None] | None = None) -> Handle:
        """Queue a request; first come, first served. Safe from any thread.

        `listener` is called after each of the request's updates and after its end, by the thread that runs the steps:
        it must return at once.

        Raises:
            ValueError: a request that can never run (an empty prompt, more tokens than the context or the K/V memory
                holds, another block size than the engine's, settings the model cannot serve), or the engine is closed.
            QueueFullError: `max_rows` and `max_queue` requests have not ended yet.
        """
        config = resolve_request(self.model, request, self.block_size, self.max_context, self.batch.pool.pages)
        handle = Handle(self, request, config, listener)
        most = math.inf if self.config.max_queue is None else self.config.max_rows + self.config.max_queue
        with self._changed:
            if self._closed:
                raise ValueError(f"the engine is closed{f' ({self.error})' if self.error else ''}; make a new one")
            if self._open >= most:
                raise QueueFullError(f"{self._open} requests run or wait; submit again when some of them have ended")
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

    def generate(
        self, input_ids: Prompts, config: DecodeConfig | None = None, *, grammar: Asked = None
    ) -> GenerateOutput:
        """Decode one or many prompts to the end, as `pb.generate` does; `forwards` counts the engine's own steps."""
        started, steps = time.perf_counter(), self.steps
        config = config or DecodeConfig()
        if config.seed is None:
            config = replace(config, seed=int(torch.randint(2**31, ()).item()))
        handles: list[Handle] = []
        try:
            prompts = as_rows(input_ids)
            for row, each in enumerate(zip(prompts, each_grammar(self.model, prompts, grammar), strict=True)):
                handles.append(self.submit(Request(each[0], config, sample=row, grammar=each[1])))
            tokens = [handle.result() for handle in handles]
        except BaseException:
            for handle in handles:
                self.cancel(handle)
            raise
        return GenerateOutput(
            tokens, self.steps - steps, [handle.forwards for handle in handles], time.perf_counter() - started,
            [sum(handle.drafted.values()) for handle in handles], [sum(handle.accepted.values()) for handle in handles],
            {name: sum(handle.drafted[name] for handle in handles) for name in DRAFTERS},
            {name: sum(handle.accepted[name] for handle in handles) for name in DRAFTERS},
        )  # fmt: skip

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
            self._closed = True  # nothing comes in any more
            self._changed.notify_all()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._stepping:
            self._thread = None
            self._take_in()
            for handle in [*self._waiting, *(h for h in self.batch.handles if h)]:
                self._end(handle, "failed", self.error or RuntimeError("the engine was closed"), self._row_of(handle))
            self._waiting.clear()
            self.batch.pool.clear()
            self.runner.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """It takes no requests any more: closed by its owner, or (`error`) because nothing could be run."""
        return self._closed

    @property
    def stats(self) -> dict[str, int]:
        """Requests waiting and running, pages held by them, pages kept for reuse, pages in all, steps so far.

        `drafted`, `accepted`: tokens, in the requests that have ended.
        """
        pool, waiting = self.batch.pool, len(self._waiting) + len(self._inbox)
        return {
            "waiting": waiting, "running": len(self.batch.active), "pages_held": pool.held, "pages_cached": pool.cached,
            "pages": pool.pages, "steps": self.steps, "preemptions": self.preemptions,
            "drafted": sum(self.drafted.values()), "accepted": sum(self.accepted.values()),
        }  # fmt: skip

    # --- one step ----------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One forward for everything that runs; False if there was nothing to run."""
        with self._stepping:
            if self._closed:
                return False
            self._take_in()
            self._admit()
            paused = self.batch.grow()
            self._waiting.extendleft(paused)  # the oldest of them is the first again
            self.preemptions += len(paused)
            taking_part = self.batch.active
            if not len(taking_part):
                return False
            started = time.perf_counter()
            try:
                step = plan(self.batch.rows, taking_part, self.config.prefill_chunk, self.config.cuda_graphs)
                taking_part = step.rows
                self._forward(step)
                self.batch.rows.pace.note(step.tokens, time.perf_counter() - started)
            except Exception as error:
                log.exception("a step failed; its requests fail with it")
                self._stop_if_broken(error)
                for row in taking_part:
                    if (handle := self.batch.handles[row]) is not None:
                        self._end(handle, "failed", error, row)
            self.step_seconds += time.perf_counter() - started
            return True

    def _take_in(self) -> None:
        """Requests from other threads to the queue, cancelled ones out of it or out of their rows."""
        while self._inbox:
            handle = self._inbox.popleft()
            if handle._cancelled:
                if handle in self._waiting:
                    self._waiting.remove(handle)
                if not handle.done:
                    self._end(handle, "cancelled", row=self._row_of(handle))
            else:
                self._waiting.append(handle)

    def _row_of(self, handle: Handle) -> int | None:
        return next((row for row, other in enumerate(self.batch.handles) if other is handle), None)

    def _admit(self) -> None:
        """The first in the queue gets a row and memory for what is known of it, or waits, and all others behind it."""
        while self._waiting and (row := self.batch.free_row()) is not None:
            handle = self._waiting[0]
            try:
                if not self.batch.admit(handle, row):
                    return
            except Exception as error:  # its own fault, and its alone
                self.batch.leave(row)
                self._end(handle, "failed", error)
            self._waiting.popleft()

    def _forward(self, step: Plan) -> None:
        rows, started = self.batch.rows, time.perf_counter()
        stood = before(rows) if self.batch.streaming_R.any() else None
        tokens_M, confidence_M, told = self.runner.run(rows, self.batch.table_RP, step)
        self.steps += 1
        settled = settle(rows, step.works, tokens_M, confidence_M)
        note(self.batch, settled, told)
        prefills = [work for work in step.works if not work.decoding]
        for row in (row for work in prefills for row in work.rows_n):
            if rows.start_R[row] == rows.prefill_R[row]:
                self.batch.register(row)
        self._tell(settled, stood)
        prefill = sum(int(work.final_n.sum()) for work in prefills)
        self.prefill_tokens += prefill
        self.prefill_seconds += (time.perf_counter() - started) * prefill / step.tokens

    def _tell(self, settled: Settled, stood: Before | None) -> None:
        """Tell the handles what the step did, and end the requests whose response is whole."""
        streaming = self.batch.streaming_R.any()
        for row, handle, error in tell(self.batch, settled, stood):
            self._end(handle, "failed" if error else "finished", error, row)
        if streaming:
            with self._changed:
                self._changed.notify_all()

    def _end(self, handle: Handle, status: Status, error: Exception | None = None, row: int | None = None) -> None:
        """A request ends: its row, if it has one, and its pages are free; whoever waits is woken."""
        if row is not None:
            self.batch.leave(row, reuse=error is None)
        handle.paused = None
        handle.seconds = time.perf_counter() - handle.submitted
        handle.error = error
        for drafter in DRAFTERS:
            self.drafted[drafter] += handle.drafted[drafter]
            self.accepted[drafter] += handle.accepted[drafter]
        with self._changed:
            self._open -= 1
            handle.status = status
            self._changed.notify_all()
        handle._notify()

    def _stop_if_broken(self, error: Exception) -> None:
        """After a failed step: if not even one token can be run any more, the engine stops for good, all fail."""
        try:
            self.runner.check(self.batch.rows, self.batch.table_RP)
        except Exception:
            log.exception("nothing can be run any more; the engine stops")
            self.error = error
            self.close()

    def _run(self) -> None:
        while not self._closed:
            try:
                worked = self.step()
            except Exception as error:
                log.exception("the engine stops")
                self.error = error
                self.close()
                return
            if not worked:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._inbox)
