"""How likely a model finds a text: the chain rule from left to right, for block diffusion and for AR.

Shapes: D block size, U units of D tokens, T = U D tokens of a forward, P predictions.

A block-diffusion model gives no probability to a text as such. What is measured is the probability of writing it one
token at a time from left to right: token i is predicted from all tokens before it, with the rest of its block masked
(token shift: from position i - 1; a block's first token from the clean block before it, as in decoding), and the
logarithms are summed. The mask token is never written, so it gets no probability. Threshold, strategy and sub-blocks
play no part. The blocks begin with the context, as they do in decoding.

Every prediction needs its block as it stood then: a *unit* of D tokens that attends to the clean blocks before it. All
units of many texts form one tree in which equal beginnings are one path, so the answers to one question share its
context, and answers of one token differ only in which logit is read: one forward over the context serves all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parablock.decoding.config import DecodeConfig
from parablock.diffusion.masks import dense_mask_of_units, flex_mask_of_tokens
from parablock.diffusion.objective import MAX_LOGITS, head_logits, hidden_states
from parablock.settings import Model

MAX_TOKENS = 8192  # tokens of a forward, where the texts allow it

Pair = tuple[Sequence[int], Sequence[int]]  # context, continuation


@dataclass(frozen=True)
class UnitTree:
    """Units in order of their block number; a unit attends to itself and to the clean units on its path.

    `ids [1, T]`; `number [U]`: how many blocks come before each; `path [U, U]` (bool): which units those are.
    """

    block_size: int
    ids: Tensor
    number: Tensor
    path: Tensor
    groups: tuple[tuple[int, int, Tensor], ...]

    def positions(self) -> Tensor:
        """See `masks.Units`."""
        start = self.number * self.block_size
        return (start[:, None] + torch.arange(self.block_size, device=start.device)).view(1, -1)

    def dense_mask(self, window: int = 0) -> Tensor:
        """See `masks.Units`."""
        own = torch.eye(len(self.number), dtype=torch.bool, device=self.path.device)
        return dense_mask_of_units(self.path | own, self.positions(), window)

    def flex_mask(self, window: int = 0) -> Any:
        """See `masks.Units`."""
        size, path = self.block_size, self.path

        def attends(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q // size == k // size) | path[q // size, k // size]

        return flex_mask_of_tokens(attends, self.positions(), window)


class _Blocks:
    """The units that some predictions need, as a tree: a unit is its parent and the tokens that are known in it."""

    def __init__(self, config: DecodeConfig) -> None:
        assert config.block_size is not None
        assert config.mask_token_id is not None
        self.block_size, self.mask_token_id = config.block_size, config.mask_token_id
        self.units: dict[tuple[int, tuple[int, ...]], int] = {}

    @property
    def tokens(self) -> int:
        return len(self.units) * self.block_size

    def source(self, text: Sequence[int], position: int) -> tuple[int, int]:
        """The unit, and the place in it, that predict `text[position]` from what comes before."""
        size, parent = self.block_size, -1
        active = position // size * size
        for start in range(0, active, size):
            parent = self._unit(parent, text[start : start + size])
        if position == active:
            return parent, size - 1
        return self._unit(parent, text[active:position]), position - active - 1

    def _unit(self, parent: int, known: Sequence[int]) -> int:
        return self.units.setdefault((parent, tuple(known)), len(self.units))

    def states(self, model: Model, sources: Sequence[tuple[int, int]]) -> Tensor:
        """The hidden states `[P, hidden]` at `sources`."""
        tree, place = self._tree(model.device)
        index = [int(place[unit]) * self.block_size + offset for unit, offset in sources]
        return hidden_states(model, tree.ids, tree)[torch.tensor(index, device=model.device)]

    def _tree(self, device: torch.device) -> tuple[UnitTree, Tensor]:
        """The tree, and where in its order each unit stands."""
        paths: list[list[int]] = []
        for parent, _ in self.units:  # parents come first
            paths.append([] if parent < 0 else [*paths[parent], parent])
        order = sorted(range(len(paths)), key=lambda unit: len(paths[unit]))
        place = torch.empty(len(order), dtype=torch.long)
        place[order] = torch.arange(len(order))
        known = [tokens for _, tokens in self.units]
        ids = torch.tensor([[*known[u], *[self.mask_token_id] * (self.block_size - len(known[u]))] for u in order])
        number = torch.tensor([len(paths[unit]) for unit in order])
        groups, path = [], torch.zeros(len(order), len(order), dtype=torch.bool)
        begin = 0
        for blocks, count in enumerate(torch.bincount(number).tolist()):
            end = begin + count
            before = place[torch.tensor([paths[u] for u in order[begin:end]], dtype=torch.long).view(count, blocks)]
            path[torch.arange(begin, end)[:, None], before] = True
            groups.append((begin, end, before.to(device)))
            begin = end
        tree = UnitTree(self.block_size, ids.view(1, -1).to(device), number.to(device), path.to(device), tuple(groups))
        return tree, place


class _Rows:
    """The texts that some predictions of an AR model need, one row each."""

    def __init__(self, config: DecodeConfig) -> None:
        self.rows: dict[tuple[int, ...], int] = {}
        self.longest = 0

    @property
    def tokens(self) -> int:
        return len(self.rows) * self.longest

    def source(self, text: Sequence[int], position: int) -> tuple[int, int]:
        """The row, and the place in it, that predict `text[position]`."""
        self.longest = max(self.longest, len(text) - 1)
        return self.rows.setdefault(tuple(text[:-1]), len(self.rows)), position - 1

    def states(self, model: Model, sources: Sequence[tuple[int, int]]) -> Tensor:
        """The hidden states `[P, hidden]` at `sources`; what pads a row comes after everything that is read."""
        ids = torch.tensor([[*row, *[0] * (self.longest - len(row))] for row in self.rows], device=model.device)
        hidden: Tensor = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        row, place = torch.tensor(sources, device=hidden.device).T
        return hidden[row, place]


@torch.inference_mode()
def log_likelihood(
    model: Model,
    pairs: Sequence[Pair],
    config: DecodeConfig,
    *,
    max_tokens: int = MAX_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[float, bool]]:
    """For each (context, continuation): log p(continuation | context) in nats, and whether greedy decoding writes it.

    `config` as `generate.resolve` returns it; its mode says how the model reads. A forward runs over about `max_tokens`
    tokens, over more only if one prediction needs them. `progress(done)`: pairs.

    Raises:
        ValueError: an empty context (nothing predicts the first token) or an empty continuation.
    """
    for context, continuation in pairs:
        if not context or not continuation:
            raise ValueError("a context and its continuation need at least one token each")
    texts = [[*context, *continuation] for context, continuation in pairs]
    total, greedy = [0.0] * len(pairs), [True] * len(pairs)
    kind = _Blocks if config.mode == "diffusion" else _Rows
    batch: _Blocks | _Rows = kind(config)
    wanted: list[tuple[int, tuple[int, int], int]] = []  # pair, source, target

    def run() -> None:
        sources = {source: number for number, source in enumerate(dict.fromkeys(s for _, s, _ in wanted))}
        states = batch.states(model, list(sources))
        owners, targets = [pair for pair, _, _ in wanted], torch.tensor([target for _, _, target in wanted])
        rows = torch.tensor([sources[source] for _, source, _ in wanted])
        for pair, (value, best) in zip(owners, _read(model, states, rows, targets, config.mask_token_id), strict=True):
            total[pair] += value
            greedy[pair] &= best

    for done, pair in enumerate(sorted(range(len(pairs)), key=lambda i: texts[i]), start=1):  # equal beginnings meet
        for position in range(len(pairs[pair][0]), len(texts[pair])):
            wanted.append((pair, batch.source(texts[pair], position), texts[pair][position]))
            if batch.tokens >= max_tokens:
                run()
                batch, wanted = kind(config), []
        if progress:
            progress(done)
    if wanted:
        run()
    return list(zip(total, greedy, strict=True))


def _read(
    model: Model, states: Tensor, rows: Tensor, targets: Tensor, mask_token_id: int | None
) -> list[tuple[float, bool]]:
    """Of each target `[P]`, predicted by `states[rows]`: its log-probability, and whether it is the most probable."""
    size = max(1, MAX_LOGITS // model.get_output_embeddings().weight.shape[0])
    read: dict[int, tuple[float, bool]] = {}
    for start in range(0, len(states), size):
        logits = head_logits(model, states[start : start + size])
        if mask_token_id is not None:
            logits[:, mask_token_id] = -torch.inf
        log_p, best = torch.log_softmax(logits, -1), logits.argmax(-1)
        here = ((rows >= start) & (rows < start + size)).nonzero()[:, 0]
        row, target = (rows[here] - start).to(logits.device), targets[here].to(logits.device)
        values, hits = log_p[row, target].tolist(), (best[row] == target).tolist()
        read.update(zip(here.tolist(), zip(values, hits, strict=True), strict=True))
    return [read[i] for i in range(len(targets))]
