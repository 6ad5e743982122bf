"""What the tests of decoding and engine share: a small model's ids, prompts of many lengths, settings."""

from dataclasses import replace
from typing import Any

import torch

import parablock as pb

D, S, MASK, STOP = 8, 4, 63, 62  # of conftest.small_model
BASE = pb.DecodeConfig(sub_block_size=S, max_new_tokens=24, threshold=0.5, stop_token_ids=(7, 21), seed=5)
ENDLESS = replace(BASE, stop_token_ids=())
SMALL = pb.EngineConfig(max_rows=3, max_context=64, prefill_chunk=16)
MODES = ("diffusion", "autoregressive")


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(0, 60, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


ROWS = [prompt(40 + n, n) for n in (5, 8, 16, 1, 23, 12, 40, 24, 9)]
# prompts of schedules; some begin alike
ALIKE = [prompt(1, 24) + prompt(i, n) for i, n in ((3, 0), (4, 3), (5, 8))]
ALIKE += [prompt(i, n) for i, n in enumerate((2, 8, 9, 17, 31))]


def empty(engine: pb.Engine) -> bool:
    """No row, page or request is left behind."""
    left = engine.stats
    assert not engine.batch.rows.active_R.any()
    assert not engine.batch.table_RP.any()
    assert not any(engine.batch.handles)
    return left["waiting"] == left["running"] == left["pages_held"] == 0


def queries(engine: pb.Engine, monkeypatch: Any) -> list[int]:
    """How many tokens each step's forward runs, as the steps happen."""
    ran: list[int] = []
    inner = engine.runner._forward
    monkeypatch.setattr(engine.runner, "_forward", lambda *a: (ran.append(a[0].shape[1]), inner(*a))[1])
    return ran
