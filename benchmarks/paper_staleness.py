"""How stale the K/V are that the sub-block cache keeps, and what that changes.

The reference loop decodes as always, and is watched: before each of its forwards another one over the whole block, on a
copy of the cache, writes the K/V that the loop would have had without the sub-block cache. Nothing of it reaches the
loop.
A row's step is *narrow* when it runs its sub-block alone and reads the kept K/V of the block's other positions.
"""

import copy
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from paper_decoding import decode, load, over_models, prompts_of, questions
from parablock.decoding.forward import forward
from parablock.decoding.steps import draw
from torch import Tensor

import parablock as pb
from parablock.decoding import blocks
from parablock.decoding.cache import BlockCache
from parablock.decoding.unmasking import reveal

STALE_PROBLEMS = 100  # per model
STALE_THRESHOLDS = (0.9, 1.0)
BATCH = 20

Sums = dict[tuple[Any, ...], np.ndarray]  # count, sum of the cosines, sum of the relative distances


class Watch:
    """Stands in for three functions of the reference loop: looks, then calls them."""

    def __init__(self, config: pb.DecodeConfig) -> None:
        assert config.block_size is not None
        self.config, self._block = config, config.block_size
        self.kv: Sums = defaultdict(lambda: np.zeros(3))
        self.counts: dict[str, int] = defaultdict(int)
        self._plan, self._forward, self._draw = blocks._plan, blocks.forward, blocks.draw
        self._masked_R = np.zeros(0)  # masks in each row's block at its latest forward over the whole block
        self._fresh: tuple[BlockCache, Tensor] | None = None

    def decode(self, model: Any, prompts: list[list[int]]) -> None:
        """One batch, in the reference loop."""
        self._masked_R = np.zeros(len(prompts), dtype=int)
        self._fresh = None
        with mock.patch.multiple(blocks, _plan=self.plan, forward=self.forward, draw=self.draw):
            pb.generate(model, prompts, self.config)

    def plan(self, state: Any, config: pb.DecodeConfig, spare_slot: int) -> Any:
        self._state, self._now = state, self._plan(state, config, spare_slot)
        self.counts["denoising"] += int((self._now.active_R & ~self._now.commit_R).sum())
        return self._now

    def forward(self, model: Any, cache: BlockCache, ids_RQ: np.ndarray, **where: Any) -> Tensor:
        block_RD = self._state.start_R[:, None] + np.arange(self._block)
        masked_R = np.take_along_axis(self._state.masked_RC, block_RD, 1).sum(1)
        self._since_R = self._masked_R - masked_R  # revealed since then
        self._narrow_R = self._now.active_R & ~self._now.whole_R
        self._masked_R = np.where(self._now.whole_R, masked_R, self._masked_R)
        self._fresh = None
        if self._narrow_R.any():
            other = copy.copy(cache)
            other.buffers = [(k.clone(), v.clone()) for k, v in cache.buffers]
            rows = np.arange(len(block_RD))[:, None]
            logits = forward(
                model, other, self._state.ids_RC[rows, block_RD], start_R=self._state.start_R,
                visible_R=self._state.start_R + self._block,
            )  # fmt: skip
            self._fresh = other, logits
        logits = self._forward(model, cache, ids_RQ, **where)
        self._cache = cache
        return logits

    def draw(self, logits: Tensor, target_RS: np.ndarray, state: Any, config: Any, seed: int) -> tuple[Tensor, Tensor]:
        tokens, confidence = self._draw(logits, target_RS, state, config, seed)
        if self._fresh is not None:
            self._compare(tokens, confidence, target_RS, seed)
        return tokens, confidence

    def _compare(self, tokens: Tensor, confidence: Tensor, target_RS: np.ndarray, seed: int) -> None:
        """The loop's decisions, and the K/V that they rest on, with those of the forward over the whole block."""
        assert self._fresh is not None
        fresh, logits = self._fresh
        source_RS = torch.from_numpy(np.maximum(target_RS - 1 - self._state.start_R[:, None], 0))
        source_RS = source_RS.clamp(max=logits.shape[1] - 1)
        picked = logits.gather(1, source_RS[..., None].expand(-1, -1, logits.shape[-1]))
        other_tokens, other_confidence = draw(picked, target_RS, self._state, self.config, seed)
        candidate_RS = torch.from_numpy(self._now.candidate_RS & self._narrow_R[:, None])
        rule: dict[str, Any] = {"strategy": self.config.strategy, "threshold": self.config.threshold}
        chosen, other_chosen = (reveal(c, candidate_RS, **rule) for c in (confidence, other_confidence))
        self.counts["steps"] += int(self._narrow_R.sum())
        self.counts["sets_differ"] += int((chosen != other_chosen).any(1).sum())
        self.counts["tokens"] += int(candidate_RS.sum())
        self.counts["tokens_differ"] += int((candidate_RS & (tokens != other_tokens)).sum())
        self.counts["revealed"] += int(chosen.sum())
        self.counts["revealed_differ"] += int((chosen & (tokens != other_tokens)).sum())
        last_R = self._narrow_R & (chosen == candidate_RS).all(1).numpy()
        for row in last_R.nonzero()[0]:
            self._compare_kv(fresh, int(row), int(target_RS[row, 0]))

    def _compare_kv(self, fresh: BlockCache, row: int, begin: int) -> None:
        """K/V of the block's other sub-blocks, at the last step of the one that begins at `begin`."""
        S, start = self.config.sub_block_size, int(self._state.start_R[row])
        span = slice(start, start + self._block)
        far = (np.arange(start, span.stop) // S) - begin // S
        since = int(self._since_R[row])
        for layer, (kept, true) in enumerate(zip(self._cache.buffers, fresh.buffers, strict=True)):
            for kind, old, new in zip(("keys", "values"), kept, true, strict=True):
                a, b = (t[row, :, span].transpose(0, 1).flatten(1) for t in (old, new))
                cosine = torch.cosine_similarity(a, b, dim=1).numpy()
                distance = ((a - b).norm(dim=1) / b.norm(dim=1)).numpy()
                for away in set(far.tolist()) - {0}:
                    here = far == away
                    add = np.array([here.sum(), cosine[here].sum(), distance[here].sum()])
                    self.kv[kind, "layer", layer] += add
                    self.kv[kind, "distance", away] += add
                    self.kv[kind, "revealed", since] += add


def staleness(names: Sequence[str], count: int, repeats: int) -> dict[str, Any]:
    """By model and threshold: the means of every group of K/V, and how many decisions differ."""
    count = min(count, STALE_PROBLEMS)
    return {"staleness": over_models(partial(_staleness, count=count), names), "stale_problems": count}


def _staleness(name: str, count: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    model, tokenizer = load(name)
    prompts = prompts_of(tokenizer, questions(name, count))
    found = {}
    for threshold in STALE_THRESHOLDS:
        watch = Watch(decode(threshold=threshold, block_size=model.config.bd_size))
        for start in range(0, len(prompts), BATCH):
            watch.decode(model, prompts[start : start + BATCH])
        kv = [
            {"kind": kind, "by": by, "at": at, "count": int(n), "cosine": float(c / n), "relative_l2": float(d / n)}
            for (kind, by, at), (n, c, d) in sorted(watch.kv.items())
        ]
        found[str(threshold)] = {"counts": dict(watch.counts), "kv": kv}
        print(f"{name:8s} threshold {threshold}: {dict(watch.counts)}", flush=True)
    return found
