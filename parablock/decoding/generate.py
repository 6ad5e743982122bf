"""`generate` and `stream`: check the request against the model, decode all rows together, gather the tokens."""

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parablock.decoding.config import DecodeConfig
from parablock.decoding.decoder import Before, Window, before, begin, next_work, window
from parablock.decoding.dense import Dense
from parablock.decoding.grammar import CompiledGrammar, check_grammar
from parablock.decoding.proposals import propose_tokens
from parablock.decoding.rows import Rows, by_drafter
from parablock.decoding.threads import Threads
from parablock.decoding.work import Settled, prefill, settle
from parablock.diffusion.gate import gate_of
from parablock.diffusion.support import require_open_attention, require_supported_layers
from parablock.settings import Model

DEFAULT_NEW_TOKENS = 512
DEFAULT_BLOCK_SIZE = 32  # of what is shown, where neither the model nor the caller names one

Prompts = Tensor | Sequence[int] | Sequence[Sequence[int]]
Asked = CompiledGrammar | Sequence[CompiledGrammar | None] | None


@dataclass(frozen=True)
class GenerateOutput:
    """What `generate` returns.

    `tokens`: the new token ids of each row, prompt excluded, stop token included. `forwards`: model calls made (NFE),
    prefill and commits included. `decode_forwards`: the decode forwards each row took part in, prefill excluded.
    `seconds`: wall-clock time, prefill included. `drafted`, `accepted`: how many tokens of each row were drafted, and
    how many of these became tokens of the answer (0 unless they are verified); `drafted_by`, `accepted_by`: the same of
    all rows, by drafter.
    """

    tokens: list[list[int]]
    forwards: int
    decode_forwards: list[int]
    seconds: float
    drafted: list[int]
    accepted: list[int]
    drafted_by: dict[str, int]
    accepted_by: dict[str, int]

    @property
    def new_tokens(self) -> int:
        """Response tokens of all rows together."""
        return sum(len(row) for row in self.tokens)

    @property
    def tokens_per_forward(self) -> float:
        """Response tokens per decode forward of a row: the ratio of the sums over all rows."""
        return self.new_tokens / max(1, sum(self.decode_forwards))

    @property
    def tokens_per_second(self) -> float:
        """Response tokens per second, all rows together, prefill time included."""
        return self.new_tokens / self.seconds


@dataclass(frozen=True)
class Step(Window):
    """One forward, as a caller sees it.

    `start [R]`: where the shown window begins (absolute position), with a block or with a token that this step revealed
    in the block before. `ids [R, D]` and `masked [R, D]`: its tokens, and which are still unknown. `revealed [R, D]`:
    what this step revealed; `confidence [R, D]`: with which confidence (nan elsewhere). `new_tokens [R]`: how many
    response tokens each row has so far without a gap; `decode_forwards [R]`: in how many forwards it took part, prefill
    excluded; `done [R]`: finished rows. In speculative decoding, -1 where there is none: `drafts [R, K]`, what masks
    have drafted behind the last known token, to be verified by a later forward; `refused [R, K]`, which drafts (of any
    drafter) this step has verified and not accepted; `drafted [R]` and `accepted [R]` count tokens so far.
    """

    new_tokens: np.ndarray
    decode_forwards: np.ndarray
    drafted: np.ndarray
    accepted: np.ndarray
    done: np.ndarray
    _rows: Rows = field(repr=False)

    def tokens(self, row: int = 0) -> list[int]:
        """The response of a row so far, up to its first masked position."""
        return self._rows.tokens(row)[: int(self.new_tokens[row])]

    def draft(self, row: int = 0) -> np.ndarray:
        """What stands provisionally behind the response so far.

        In block diffusion the rest of the window, masks and revealed tokens; in speculative decoding the drafts that
        wait to be verified; nothing where a token at a time is decoded.
        """
        behind = int(self._rows.prompt_R[row] + self.new_tokens[row] - self.start[row])
        drafts_K = self.drafts[row]
        draft: np.ndarray = self.ids[row, behind:] if self._rows.grain_R[row] > 1 else drafts_K[drafts_K >= 0]
        return draft


def generate(
    model: Model, input_ids: Prompts, config: DecodeConfig | None = None, *, grammar: Asked = None
) -> GenerateOutput:
    """Decode one or many prompts to the end.

    Args:
        model: a stock transformers decoder. For `mode="diffusion"` its config holds `bd_size` and `mask_token_id`, or
            `config` names `block_size` and `mask_token_id`.
        input_ids: `[B, L]` or `[L]` ids, or a list of rows of any lengths.
        config: how to decode; see `DecodeConfig`.
        grammar: what the answers may say (`pb.Grammars`): one grammar for all prompts, or a list with one (or None) for
            each.

    Raises:
        ValueError: an empty prompt, one that does not fit the model's context, or settings the model cannot serve.
    """
    started = time.perf_counter()
    prompts = as_rows(input_ids)
    rows, steps = _decode(model, prompts, resolve(model, prompts, config or DecodeConfig()), grammar)
    forwards = sum(1 for _ in steps)
    return GenerateOutput(
        tokens=[rows.tokens(row) for row in range(len(prompts))],
        forwards=forwards,
        decode_forwards=rows.forwards_R.tolist(),
        seconds=time.perf_counter() - started,
        drafted=rows.drafted_RS.sum(1).tolist(),
        accepted=rows.accepted_RS.sum(1).tolist(),
        drafted_by=by_drafter(rows.drafted_RS.sum(0)),
        accepted_by=by_drafter(rows.accepted_RS.sum(0)),
    )


def stream(
    model: Model, input_ids: Prompts, config: DecodeConfig | None = None, *, grammar: Asked = None
) -> Iterator[Step]:
    """Decode like `generate`, but yield every forward as a `Step` (for live display). Errors are raised at once."""
    prompts = as_rows(input_ids)
    rows, steps = _decode(model, prompts, resolve(model, prompts, config or DecodeConfig()), grammar, watched=True)
    return (_step(rows, settled, stood) for settled, stood in steps if stood)


def _step(rows: Rows, settled: Settled, stood: Before) -> Step:
    shown = window(rows, settled, np.arange(len(rows.active_R)), stood)
    return Step(
        **vars(shown), new_tokens=rows.length_R.copy(), decode_forwards=rows.forwards_R.copy(),
        drafted=rows.drafted_RS.sum(1), accepted=rows.accepted_RS.sum(1), done=~rows.active_R, _rows=rows,
    )  # fmt: skip


def _decode(
    model: Model, prompts: list[list[int]], config: DecodeConfig, grammar: Asked, *, watched: bool = False
) -> tuple[Rows, Iterator[tuple[Settled, Before | None]]]:
    """All prompts in one batch, `config` with nothing left open: their rows, and what every forward settles.

    `watched`: with it, how the rows stood before.
    """
    assert config.max_new_tokens is not None
    D = config.block_size or DEFAULT_BLOCK_SIZE
    capacity = -(-(max(map(len, prompts)) + config.max_new_tokens) // D) * D
    gate = gate_of(model)
    if config.verified or (gate is not None and config.mode == "speculative"):
        capacity += D  # for the K/V of masks
    rows = Rows(len(prompts), capacity, D, gate)
    rows.pace.padded = len(prompts)
    for row, (prompt, its_grammar) in enumerate(zip(prompts, each_grammar(model, prompts, grammar), strict=True)):
        begin(rows, row, prompt, config, row, its_grammar)
    return rows, _forwards(Dense(model, len(prompts), capacity), rows, watched)


@torch.inference_mode()
def _forwards(executor: Dense, rows: Rows, watched: bool) -> Iterator[tuple[Settled, Before | None]]:
    threads = Threads(executor.model)
    prefilled = (rows.prefill_R > 0).nonzero()[0]
    works = [prefill(rows, prefilled, rows.prefill_R[prefilled])] if len(prefilled) else []
    while rows.active_R.any():
        started = time.perf_counter()
        works = works or next_work(rows, rows.active_R.nonzero()[0])
        stood = before(rows) if watched else None
        with threads.for_tokens(works[0].tokens):
            logits_mV = executor.run(rows, works[0])  # one config, so one mode
            settled = settle(rows, works, *propose_tokens(logits_mV, rows, works))
        rows.active_R[settled.rows_K[settled.done_K]] = False
        rows.pace.note(rows.pace.padded * int(works[0].width_n.max()), time.perf_counter() - started)
        works = []
        yield settled, stood


def as_rows(input_ids: Prompts) -> list[list[int]]:
    """One or many prompts as lists of ids; ValueError for an empty one."""
    rows: list[Any] = input_ids.tolist() if isinstance(input_ids, Tensor) else list(input_ids)
    if rows and not isinstance(rows[0], (list, tuple, Tensor)):
        rows = [rows]
    prompts = [[int(i) for i in row] for row in rows]
    if not prompts:
        raise ValueError("there is no prompt; pass at least one row of token ids")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} is empty; it needs at least one token")
    return prompts


def each_grammar(model: Model, prompts: Sequence[Sequence[int]], grammar: Asked) -> Sequence[CompiledGrammar | None]:
    """One for each prompt; ValueError if there are not as many, or one is not for the model."""
    each = [*grammar] if isinstance(grammar, Sequence) else [grammar] * len(prompts)
    if len(each) != len(prompts):
        raise ValueError(
            f"there are {len(each)} grammars for {len(prompts)} prompts; pass one for all, or one for each"
        )
    for one in each:
        check_grammar(one, model.get_input_embeddings().weight.shape[0])
    return each


def resolve(model: Model, prompts: list[list[int]], config: DecodeConfig) -> DecodeConfig:
    """Fill in what the checkpoint decides, and refuse what it cannot do."""
    require_supported_layers(model.config)
    require_open_attention(model)
    own = model.config
    vocabulary = model.get_input_embeddings().weight.shape[0]
    block_size = config.block_size or getattr(own, "bd_size", None)
    mask_token_id = config.mask_token_id
    if mask_token_id is None:
        mask_token_id = getattr(own, "mask_token_id", None)
    adapted = getattr(own, "bd_size", None) is not None and mask_token_id is not None
    gate = gate_of(model)
    mode = config.mode or ("speculative" if gate else "diffusion" if adapted else "autoregressive")
    config.check_drafts(mode)
    if mode == "diffusion" and gate is not None:
        raise ValueError(
            "mode='diffusion': the model has a causal adapter, its masks make drafts that the AR model verifies; use "
            "mode='speculative' (or None), or load its base"
        )
    if mode == "diffusion":
        if block_size is None or mask_token_id is None:
            lacking = "mask token" if mask_token_id is None else "block size"
            raise ValueError(
                f"mode='diffusion': the checkpoint names no {lacking}, it was never adapted to block diffusion; adapt "
                "it with parablock adapt, or decode with mode='autoregressive'"
            )
        config.check_sub_block(block_size)
        if getattr(own, "bd_size", None) not in (None, block_size):
            warn_of_block_size(own.bd_size, block_size)
    if mode == "speculative" and adapted:
        raise ValueError(
            "mode='speculative': the checkpoint was adapted to block diffusion: its tokens see their whole block, and "
            "drafts are verified by an AR model; use strategy='verified', which verifies drafts in block "
            "diffusion, mode='diffusion' (or None), or the AR checkpoint it was made from"
        )
    drafter = config.drafter
    if mode == "speculative":
        drafter = drafter or ("both" if gate else "lookup")
        if gate is None and drafter != "lookup":
            raise ValueError(
                f"drafter={drafter!r}: the checkpoint has no causal adapter whose masks make drafts; make one with "
                "parablock adapt --context causal, or use drafter='lookup'"
            )
    if mask_token_id is not None and not 0 <= mask_token_id < vocabulary:
        raise ValueError(f"mask_token_id={mask_token_id} is outside the vocabulary of {vocabulary} tokens")
    for number, prompt in enumerate(prompts):
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise ValueError(f"prompt {number} holds an id outside the vocabulary of {vocabulary} tokens")
    context = own.max_position_embeddings
    longest = max(len(prompt) for prompt in prompts)
    max_new_tokens = config.max_new_tokens or max(1, min(DEFAULT_NEW_TOKENS, context - longest))
    if longest + max_new_tokens > context:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the model's context of "
            f"{context} tokens; shorten the prompt or lower max_new_tokens"
        )
    stops = config.stop_token_ids
    if stops is None:
        stops = () if config.ignore_eos else own_stop_tokens(model)
    seed = int(torch.randint(2**31, ()).item()) if config.seed is None else config.seed
    resolved = replace(
        config, mode=mode, max_new_tokens=max_new_tokens, block_size=block_size, mask_token_id=mask_token_id,
        stop_token_ids=stops, drafter=drafter, seed=seed,
    )  # fmt: skip
    resolved.check_tokens(vocabulary)
    return resolved


def own_stop_tokens(model: Model) -> tuple[int, ...]:
    """The ids that end an answer unless the caller names others."""
    eos = model.generation_config.eos_token_id if model.generation_config else None
    eos = model.config.eos_token_id if eos is None else eos
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def warn_of_block_size(own: int, asked: int | None) -> None:
    """A model decodes best in the blocks it was trained with."""
    warnings.warn(
        f"block_size={asked}, but the checkpoint was trained with {own}: a mismatch costs accuracy "
        "(Fast-dLLM v2, table 4); keep its own, and change sub_block_size instead",
        stacklevel=4,
    )
