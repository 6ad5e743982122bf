"""How stale the K/V are that the sub-block cache keeps, and what that changes.

`pb.stream` shows what every step of an answer knew and revealed, and so which of them were *narrow*: their block has
K/V already and the first position of their sub-block is known, so they run the sub-block alone and read the kept K/V of
the block's other positions. The stock model makes these forwards again: as the step was, and over the whole block.
"""

from collections import defaultdict
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import questions
from paper_decoding import BLOCK, decode, load, of_models, problems_of
from torch import Tensor
from transformers import DynamicCache

import parablock as pb
from parablock.decoding.unmasking import reveal
from parablock.diffusion.masks import block_causal_mask

PROBLEMS = 100  # per model
THRESHOLDS = (0.9, 1.0)
FIGURES = ["cosine", "relative_l2"]

Forward = tuple[Tensor, Tensor, Tensor]  # logits [positions, V], keys and values [layers, heads, positions, size]


class Watch:
    """Answers one prompt at a time and looks at the narrow steps."""

    def __init__(self, model: Any, config: pb.DecodeConfig) -> None:
        self.model, self.config = model, config
        self.counts: dict[str, int] = defaultdict(int)
        self.kv: list[pd.DataFrame] = []  # a line per kind, layer and position

    @torch.inference_mode()
    def answer(self, prompt: list[int]) -> None:
        D, S, mask = self.config.block_size, self.config.sub_block_size, self.model.config.mask_token_id
        start = len(prompt) // D * D
        text, ids = prompt[:start], np.array([*prompt[start:], *[mask] * (start + D - len(prompt))])
        masked = np.arange(start, start + D) >= len(prompt)  # of the active block, as before every step
        kept = None  # the latest forward over the whole block
        for step in pb.stream(self.model, prompt, self.config):
            if step.decode_forwards[0] and masked.any():  # neither the prefill nor a commit
                self.counts["denoising"] += 1
                fresh, sub = self.whole([*text, *ids]), int(masked.argmax()) // S * S
                if kept is None or masked[sub] or not self.config.sub_block_cache:
                    kept, unknown = fresh, masked.sum()
                else:
                    chosen = self.decide(kept, fresh, ids, masked, sub)
                    self.counts["as_decoded"] += int((chosen == step.revealed[0, sub + 1 : sub + S]).all())
                    if (chosen == masked[sub + 1 : sub + S]).all():  # its last step, when the K/V around it are oldest
                        self.compare(kept, fresh, len(text), sub, unknown - masked.sum())
            else:
                kept = None
            ids, masked = step.ids[0], step.masked[0]
            text = [*prompt, *step.tokens()][: step.start[0]]

    def whole(self, ids: list[int]) -> Forward:
        """A forward over the committed blocks and all of the active one."""
        visible = block_causal_mask(len(ids), self.config.block_size)[None, None]
        out = self.model(input_ids=torch.tensor([ids]), attention_mask=visible, use_cache=True)
        layers = out.past_key_values.layers
        return out.logits[0], torch.cat([at.keys for at in layers]), torch.cat([at.values for at in layers])

    def narrow(self, kept: Forward, ids: np.ndarray, place: np.ndarray) -> Tensor:
        """Logits of the tokens at `place` alone, which see themselves and what is kept of all others."""
        rest = np.delete(np.arange(len(kept[0])), place)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(*kept[1:], strict=True)):
            cache.update(keys[None, :, rest], values[None, :, rest], layer)
        seen = torch.ones(1, 1, len(place), len(kept[0]), dtype=torch.bool)
        where = {"position_ids": torch.from_numpy(place)[None], "attention_mask": seen, "past_key_values": cache}
        return self.model(input_ids=torch.from_numpy(ids)[None], **where).logits[0]

    def decide(self, kept: Forward, fresh: Forward, ids: np.ndarray, masked: np.ndarray, sub: int) -> np.ndarray:
        """What a narrow step reveals behind its first position, counted beside what fresh K/V would have it reveal."""
        span = slice(sub, sub + self.config.sub_block_size)
        place = len(kept[0]) - len(ids) + np.arange(span.start, span.stop)
        candidates = masked[None, span][:, 1:]
        found = []
        for logits in (self.narrow(kept, ids[span], place), fresh[0][place]):
            logits[:, self.model.config.mask_token_id] = -torch.inf
            confidence, tokens = logits[None, :-1].softmax(-1).max(-1)  # a position is predicted by the one before it
            chosen = reveal(confidence.numpy(), candidates, "threshold", threshold=self.config.threshold)
            found.append((tokens.numpy(), chosen))
        (tokens, chosen), (other, other_chosen) = found
        self.counts["steps"] += 1
        self.counts["sets_differ"] += int((chosen != other_chosen).any())
        for name, which in (("tokens", candidates), ("revealed", chosen)):
            self.counts[name] += int(which.sum())
            self.counts[f"{name}_differ"] += int((which & (tokens != other)).sum())
        return chosen[0]

    def compare(self, kept: Forward, fresh: Forward, start: int, sub: int, since: int) -> None:
        """The K/V of the block that begins at `start`, `since` revealed positions after they were made."""
        for kind, old, new in zip(("keys", "values"), kept[1:], fresh[1:], strict=True):
            a, b = (t[:, :, start:].transpose(1, 2).flatten(2) for t in (old, new))  # [layers, block, heads * size]
            layer, position = np.indices(a.shape[:2]).reshape(2, -1)
            away = (position - sub) // self.config.sub_block_size
            cosine, distance = torch.cosine_similarity(a, b, dim=-1), (a - b).norm(dim=-1) / b.norm(dim=-1)
            figures = dict(zip(FIGURES, (cosine.ravel(), distance.ravel()), strict=True))
            self.kv.append(pd.DataFrame({"kind": kind, "layer": layer, "distance": away, "revealed": since, **figures}))


def staleness(problems: int, repeats: int) -> dict[str, Any]:
    """By model and threshold: the means of every group of K/V, and how many decisions differ."""
    count = min(problems, PROBLEMS)
    return {"staleness": of_models(_staleness, count), "stale_problems": count}


def _staleness(name: str, count: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    (model, tokenizer), found = load(name), {}
    for threshold in THRESHOLDS:
        watch = Watch(model, decode(threshold=threshold, block_size=BLOCK))
        for prompt in questions(tokenizer, problems_of(name, count)):
            watch.answer(prompt)
        found[str(threshold)] = {"counts": dict(watch.counts), "kv": means(watch.kv) if watch.kv else []}
        print(f"{name:8s} threshold {threshold}: {dict(watch.counts)}", flush=True)
    return found


def means(kv: list[pd.DataFrame]) -> list[dict[str, Any]]:
    """Of the K/V outside the sub-block, by layer, by sub-blocks away, and by what was revealed since."""
    lines = pd.concat(kv).query("distance != 0")
    return [
        {"kind": kind, "by": by, "at": int(at), "count": len(group), **group[FIGURES].astype(float).mean()}
        for by in ("distance", "layer", "revealed") for (kind, at), group in lines.groupby(["kind", by])
    ]  # fmt: skip
