"""One measured run: a number of requests in flight, until all have been answered."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

from parablock.decoding.config import DecodeConfig
from parablock.engine.engine import Engine
from parablock.engine.request import Handle, Request


@dataclass(frozen=True)
class Measured:
    """What a run came to.

    `tokens_per_second`: response tokens of all requests over the wall-clock time, prefill included (tps per system);
    `request_tokens_per_second`: of one request, from submission to end (median). `ttft`: seconds from submission to the
    first settled token; `tpot`: seconds per further token (medians; `ttft_95`: 95th percentile). `step`: seconds per
    engine step (median). `queries_per_token`: tokens that the forwards ran, prompts and masks included, for each
    response token: what the arithmetic is proportional to. `tokens_per_forward`: response tokens per decode forward of
    a request, ratio of sums. `drafted`, `accepted`: tokens of all requests. `equal`: the share of AR's tokens that
    speculative answers begin with. `kv_bytes`: the most K/V memory that requests held. `memory_bytes`: of the
    process at the end of the run; on CUDA the most that was allocated during it.
    """

    requests: int
    tokens: int
    seconds: float
    steps: int
    tokens_per_second: float
    request_tokens_per_second: float
    tokens_per_forward: float
    queries_per_token: float
    ttft: float
    ttft_95: float
    tpot: float
    step: float
    kv_bytes: int
    memory_bytes: int
    drafted: int
    accepted: int
    equal: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def run_load(
    engine: Engine, prompts: Sequence[list[int]], config: DecodeConfig, concurrency: int
) -> tuple[Measured, list[list[int]]]:
    """Answer all `prompts`, `concurrency` at a time: when one is done, the next is submitted. With the answers."""
    waiting = list(reversed(prompts))
    running: list[Handle] = []
    submitted: list[Handle] = []
    steps: list[float] = []
    if engine.runner.device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(engine.runner.device)
    pages, queries = 0, engine.runner.queries
    started = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < concurrency:
            running.append(engine.submit(Request(waiting.pop(), config)))
            submitted.append(running[-1])
        before = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - before)
        pages = max(pages, engine.batch.pool.held)
        running = [handle for handle in running if not handle.done]
    seconds = time.perf_counter() - started
    answers = [(handle, handle.result()) for handle in submitted]
    tokens = sum(len(answer) for _, answer in answers)
    first = sorted(handle.first_token or 0.0 for handle in submitted)
    further = [
        ((h.seconds or 0.0) - (h.first_token or 0.0)) / (len(answer) - 1) for h, answer in answers if len(answer) > 1
    ]
    measured = Measured(
        requests=len(submitted),
        tokens=tokens,
        seconds=seconds,
        steps=len(steps),
        tokens_per_second=tokens / seconds,
        request_tokens_per_second=statistics.median(len(answer) / (h.seconds or seconds) for h, answer in answers),
        queries_per_token=(engine.runner.queries - queries) / tokens,
        tokens_per_forward=tokens / max(1, sum(handle.forwards for handle in submitted)),
        ttft=statistics.median(first),
        ttft_95=first[min(len(first) - 1, int(0.95 * len(first)))],
        tpot=statistics.median(further) if further else 0.0,
        step=statistics.median(steps),
        kv_bytes=pages * engine.block_size * engine.runner.kv.bytes_per_token,
        memory_bytes=_memory(engine.runner.device),
        drafted=sum(sum(handle.drafted.values()) for handle in submitted),
        accepted=sum(sum(handle.accepted.values()) for handle in submitted),
    )
    return measured, [answer for _, answer in answers]


def share_equal(answers: Sequence[list[int]], reference: Sequence[list[int]]) -> float:
    """How many of the reference's tokens the answers begin with, of all."""
    equal = 0
    for answer, other in zip(answers, reference, strict=True):
        equal += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(answer, other, strict=False)))
    return equal / sum(len(other) for other in reference)


def _memory(device: Any) -> int:
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)
