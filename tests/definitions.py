"""What each mode computes, straight from its definition: one row at a time, no cache, everything recomputed per token.

Every executor must give exactly these tokens (float32). The sub-block cache of block diffusion is an approximation of
its own (K/V of the other sub-blocks stay as they were): it is defined by the golden vectors, and off here. What a mode
shows to a layer with a sliding window, `masks_of` cuts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from official_layout import masks_of

import parablock as pb
from parablock.decoding.unmasking import propose, uniform
from parablock.diffusion.gate import gate_of
from parablock.diffusion.masks import block_causal_mask


def block_diffusion(model: Any, ids: list[int], config: pb.DecodeConfig) -> list[int]:
    """Denoise block by block, sub-block by sub-block; whole blocks before it are clean (Fast-dLLM v2, section 3.3)."""
    assert config.max_new_tokens is not None
    D, S, mask_token = model.config.bd_size, config.sub_block_size, model.config.mask_token_id
    end = len(ids) + config.max_new_tokens
    known: list[int | None] = list(ids)
    forwards = 0

    def predict(tokens: list[int | None], positions: list[int]) -> dict[int, tuple[float, int]]:
        """Confidence and token at `positions`, each predicted by the one before it (token shift)."""
        filled = [mask_token if t is None else t for t in tokens]
        logits = _logits(model, filled, block_causal_mask(len(filled), D))
        text = tokens[len(ids) : tokens.index(None) if None in tokens else None]
        return {
            p: _propose(adjusted(logits[p - 1], config, ids, text, p), config, mask_token, p, forwards)
            for p in positions
        }

    while True:
        start = (len(known) - 1) // D * D
        if len(known) % D == 0 and _whole(known, len(ids), end, config) is None:
            known.append(predict(known, [len(known)])[len(known)][1])  # of a prompt's end, or of a commit
            forwards += len(known) - 1 > len(ids)
            start = len(known) - 1
        known += [None] * (start + D - len(known))
        for sub in range(start, start + D, S):
            while None in known[sub : sub + S] and _whole(known, len(ids), end, config) is None:
                masked = [p for p in range(sub, sub + S) if known[p] is None]
                for p, token in _reveal(predict(known, masked), config).items():
                    known[p] = token
                forwards += 1
        whole = _whole(known, len(ids), end, config)
        if whole is not None:
            return whole


def autoregressive(model: Any, ids: list[int], config: pb.DecodeConfig) -> list[int]:
    """One token at a time, each from a causal forward over all before it."""
    assert config.max_new_tokens is not None
    known: list[int | None] = list(ids)
    end = len(ids) + config.max_new_tokens
    while (whole := _whole(known, len(ids), end, config)) is None:
        tokens = [t for t in known if t is not None]
        logits = _logits(model, tokens, torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril())
        mask_token = getattr(model.config, "mask_token_id", None)
        last = adjusted(logits[-1], config, ids, tokens[len(ids) :], len(tokens))
        known.append(_propose(last, config, mask_token, len(known), 0)[1])
    return whole


def verified(model: Any, ids: list[int], config: pb.DecodeConfig) -> list[int]:
    """One token at a time: causal inside the active block, whole blocks before it as of block diffusion (S2D2)."""
    assert config.max_new_tokens is not None
    D, mask_token = model.config.bd_size, model.config.mask_token_id
    known: list[int | None] = list(ids)
    end = len(ids) + config.max_new_tokens
    while (whole := _whole(known, len(ids), end, config)) is None:
        tokens = [t for t in known if t is not None]
        attends = block_causal_mask(len(tokens), D)
        active = len(tokens) // D * D  # a full block is committed: it sees itself in both directions
        attends[active:] &= torch.ones_like(attends).tril()[active:]
        last = adjusted(_logits(model, tokens, attends)[-1], config, ids, tokens[len(ids) :], len(tokens))
        known.append(_propose(last, config, mask_token, len(tokens), 0)[1])
    return whole


def speculative(model: Any, ids: list[int], config: pb.DecodeConfig) -> tuple[list[int], int]:
    """A gate's masks make `config.draft_tokens` drafts, which the AR model verifies: answer and forwards.

    Drafts are what masks in place of the last known token and those behind it predict.
    """
    answer, gate, k = autoregressive(model, ids, config), gate_of(model), config.draft_tokens
    assert gate is not None
    assert k is not None
    done, forwards, drafts = 1, 0, list[int]()  # the first token comes with the prompt
    while done < len(answer):
        behind, right = answer[done:], 0
        while right < min(len(drafts), len(behind)) and drafts[right] == behind[right]:
            right += 1
        ends = right == len(behind)  # what ends an answer is a prediction, not a draft
        done, forwards = done + right + (not ends), forwards + 1
        tokens = [*ids, *answer[: done - 1], *gate.mask_ids(k)]
        logits = _logits(model, tokens, torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril())
        first = len(ids) + done  # the position of the first draft
        drafts = [
            _propose(logits[first - 1 + n], config, model.config.mask_token_id, first + n, 0)[1] for n in range(k)
        ]
    return answer, forwards


DEFINITIONS = {"diffusion": block_diffusion, "autoregressive": autoregressive, "speculative": autoregressive}


def adjusted(
    logits: torch.Tensor, config: pb.DecodeConfig, ids: list[int], text: Sequence[int | None], position: int
) -> torch.Tensor:
    """The logits of `position`, behind the answer's `text`: biases, then penalties as vLLM has them, then stops."""
    for token, bias in config.logit_bias:
        logits[token] += bias
    for token in {*ids, *text} - {None}:
        if config.repetition_penalty != 1:
            logits[token] *= 1 / config.repetition_penalty if logits[token] > 0 else config.repetition_penalty
    for token in {*text}:
        logits[token] -= config.frequency_penalty * text.count(token) + config.presence_penalty
    if position - len(ids) < config.min_tokens:
        logits[[*(config.stop_token_ids or ())]] = -torch.inf
    return logits


def _whole(known: list[int | None], prompt: int, end: int, config: pb.DecodeConfig) -> list[int] | None:
    """The response if it is whole: up to a stop token without a mask before it, or of full length."""
    response = known[prompt:end]
    tokens = [t for t in response[: response.index(None) if None in response else None] if t is not None]
    for i, token in enumerate(tokens):
        if token in (config.stop_token_ids or ()):
            return tokens[: i + 1]
    return tokens if len(tokens) == end - prompt else None


def _logits(model: Any, tokens: list[int], attends: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(len(tokens))
    mask = masks_of(model, attends, positions)
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens]), attention_mask=mask, position_ids=positions[None]).logits[
            0
        ]
    return logits


def _propose(
    logits: torch.Tensor, config: pb.DecodeConfig, mask_token: int | None, position: int, draw: int
) -> tuple[float, int]:
    """Confidence and token; sampled with the random number of (seed, sample 0, position, draw)."""
    if mask_token is not None:
        logits[mask_token] = -torch.inf
    number = None
    if config.temperature > 0:
        assert config.seed is not None
        number = uniform(config.seed, *(torch.tensor([[i]]) for i in (0, position, draw)))
    token, confidence = propose(
        logits[None, None], number, temperature=config.temperature or 1.0, top_p=config.top_p, top_k=config.top_k,
        min_p=config.min_p or None,
    )  # fmt: skip
    return confidence.item(), int(token)


def _reveal(proposed: dict[int, tuple[float, int]], config: pb.DecodeConfig) -> dict[int, int]:
    """Which of the proposed tokens are revealed, by position."""
    ordered = sorted(proposed, key=lambda p: -proposed[p][0])
    enough = {
        "threshold": lambda n, confidence: confidence > config.threshold,
        "factor": lambda n, confidence: (n + 1) * (1 - confidence) < config.factor,
        "fixed": lambda n, confidence: n <= config.tokens_per_step,
    }[config.strategy]
    counts = [n for n, p in enumerate(ordered, start=1) if enough(n, proposed[p][0])]
    return {p: proposed[p][1] for p in ordered[: max(counts, default=1)]}
