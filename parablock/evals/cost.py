"""What a task's answers cost: tokens, forwards, drafts and time, over all processes that answered."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from parablock.decoding.rows import DRAFTERS

COUNTS = ("requests", "tokens", "forwards", "prompt_tokens", "cached_tokens", "drafted", "accepted")
TIMES = ("seconds", "prefill_seconds")


@dataclass
class Cost:
    """What a task's requests took on this process.

    `tokens`: of the responses alone; `prompt_tokens`: that were run (those in `cached_tokens` had been before).
    `seconds`: wall-clock time of all, `prefill_seconds` the prompts' share of it. `forwards`: decode forwards, summed
    over the responses. `drafted`, `accepted`: tokens by drafter, in speculative decoding.
    """

    requests: int = 0
    tokens: int = 0
    forwards: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    drafted: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    prefill_seconds: float = 0.0


def summed(processes: Iterable[dict[str, Cost]]) -> dict[str, Cost]:
    """The costs of processes that ran at the same time, by task."""
    total: dict[str, Cost] = {}
    for costs in processes:
        for task, cost in costs.items():
            others = total.get(task, Cost())
            sums = {name: getattr(cost, name) + getattr(others, name) for name in COUNTS}
            longest = {name: max(getattr(cost, name), getattr(others, name)) for name in TIMES}
            total[task] = Cost(**sums, **longest)
    return total


def speed(cost: Cost) -> dict[str, Any]:
    """What a task's answers cost: response tokens alone are counted, the prompts' part stands apart."""
    writing = cost.seconds - cost.prefill_seconds
    return {
        "responses": cost.requests,
        "response_tokens": cost.tokens,
        "tokens_per_forward": cost.tokens / max(1, cost.forwards),
        "seconds": cost.seconds,
        "tokens_per_second": cost.tokens / cost.seconds if cost.seconds else None,
        "tokens_per_second_without_prefill": cost.tokens / writing if writing > 0 else None,
        "prompt_tokens": cost.prompt_tokens,
        "prompt_tokens_reused": cost.cached_tokens,
        "prefill_seconds": cost.prefill_seconds,
        "drafted": cost.drafted.total(),
        "accepted": cost.accepted.total(),
        "drafted_by": {drafter: cost.drafted[drafter] for drafter in DRAFTERS},
        "accepted_by": {drafter: cost.accepted[drafter] for drafter in DRAFTERS},
    }
