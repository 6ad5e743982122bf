"""Runs one planned forward: the stock model over the paged K/V, and what its logits propose.

Shapes: T queries of the forward, M predictions wanted from it, V vocabulary; a group has n rows of W queries that look
at P pages of D tokens. G = H / H_kv heads share one K/V head.
"""

import itertools
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from parablock.decoding.proposals import propose_tokens
from parablock.decoding.rows import Rows
from parablock.engine.attention import lend_attention, register_runner, return_attention
from parablock.engine.config import EngineConfig
from parablock.engine.graphs import Graphs
from parablock.engine.kv import KV, Pages
from parablock.engine.paged import paged_attention, paged_attention_works
from parablock.engine.schedule import Group, Plan
from parablock.settings import Model

_numbers = itertools.count()
ONE_THREAD = 5e7  # multiplications of a forward up to which one thread is the fastest


@dataclass(frozen=True)
class _GroupShape:
    """A group, as far as it decides which operations run.

    `first_page`: the K/V of its single row lie in one piece from there, and it looks at `slots` of them.
    """

    rows: int
    width: int
    pages: int
    slots: int
    first_page: int | None
    limits: int  # how many limits a row has: none if all see everything, 1, or one for every query


@dataclass(frozen=True)
class _GroupInputs:
    shape: _GroupShape
    queries: slice  # of the T queries
    table_nP: Tensor
    limit_n: Tensor | None  # slots each row sees, where `paged_attention` is used
    mask: Tensor | None  # [n, 1, 1 or G W, P D] bool


class Runner:
    """The model, its K/V memory, and the current step. `close` gives the model back as it was."""

    def __init__(self, model: Model, block_size: int, config: EngineConfig) -> None:
        self.model = model
        self.block_size = block_size
        self.device = torch.device(model.device)
        number = next(_numbers)
        self.number = torch.tensor(number, device="cpu")
        self.threads = config.threads
        self.all_threads = torch.get_num_threads()  # here, where no step of another engine has changed it
        self.queries = 0  # tokens that all forwards ran so far, prompts included
        self.weights = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
        self.kv = KV()
        self.closed = False
        self._paged = False  # attention reads the pages where they lie
        self._step: tuple[Tensor, list[int], tuple[_GroupShape, ...]] | None = None  # its numbers, packed
        # what the attention of a step needs, on every device where layers run: slots `[T]` to write to, and the groups
        self._inputs: dict[torch.device, tuple[Tensor, list[_GroupInputs]]] = {}
        self._mask = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=self.device)  # keeps the model from making one
        self._forward: Any = self._call_model
        self._graphs = Graphs(self.device) if config.cuda_graphs else None
        register_runner(number, self)
        lend_attention(model)
        try:
            with torch.inference_mode():
                probe = torch.zeros(1, 1, dtype=torch.long, device=self.device)
                self._call_model(probe, probe, probe[0])  # `attend` notes the shapes of K and V
        except BaseException:
            self.close()
            raise
        if config.compile:
            self._forward = self._compiled()

    def _compiled(self) -> Any:
        """The model's forward in one compiled graph.

        Between the calls of one runner nothing but the tensors changes, so nothing else is looked at before each call
        (a fifth of a small model's step). What is compiled is remembered by code object: this runner gets its own.
        """
        own = FunctionType(Runner._call_model.__code__.replace(), globals())
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
        return torch.compile(MethodType(own, self), dynamic=True, fullgraph=True, options=options)

    def allocate(self, pages: int) -> None:
        """Make the K/V memory of so many pages."""
        with torch.inference_mode():
            self.kv.allocate(pages, self.block_size)
        keys, values = self.kv.layers[0]
        self._paged = paged_attention_works(keys.pages, values.pages, keys.pages.shape[2] * self.kv.share)

    def close(self) -> None:
        """Give the model its own attention back and free the K/V memory."""
        if not self.closed:
            self.closed = True
            return_attention(self.model)
            self.kv.layers.clear()
            self._step, self._inputs = None, {}
            if self._graphs is not None:
                self._graphs.clear()

    def run(self, rows: Rows, table_RP: np.ndarray, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """One forward: a token and its confidence `[M]` for every wanted prediction. Waits for the device once."""
        self.queries += plan.tokens
        few = self.weights * plan.tokens < ONE_THREAD
        # every thread of the process has a number of its own: engines in other threads do the same meanwhile
        before = torch.get_num_threads()
        if self.device.type == "cpu":
            torch.set_num_threads(self.threads or (1 if few else self.all_threads))
        try:
            with torch.inference_mode():
                packed, sizes, shapes = self._pack(rows, table_RP, plan)
                if self._graphs is None:
                    logits = self._compute(packed.to(self.device), sizes, shapes)
                else:
                    logits = self._graphs.run((tuple(sizes), shapes), packed, lambda x: self._compute(x, sizes, shapes))
                return propose_tokens(logits[: len(plan.source_M)], rows, plan.works)
        finally:
            torch.set_num_threads(before)

    def check(self, rows: Rows, table_RP: np.ndarray) -> None:
        """Run one token over page 0; raises what the device raises."""
        spare = np.array([len(rows.active_R) - 1])
        plan = Plan([], [Group(spare, spare * 0, spare * 0 + 1, 1, 1)], spare[:0])
        with torch.inference_mode():
            packed, sizes, shapes = self._pack(rows, table_RP, plan)
            self._compute(packed.to(self.device), sizes, shapes).sum().item()

    def _pack(self, rows: Rows, table_RP: np.ndarray, plan: Plan) -> tuple[Tensor, list[int], tuple[_GroupShape, ...]]:
        """All numbers of a forward in one array, so that they travel to the device in one piece."""
        D = self.block_size
        ids, positions, slots, shapes, parts = [], [], [], [], []
        for group in plan.groups:
            position_nW = group.first_n[:, None] + np.arange(group.width)
            table_nP = table_RP[group.rows_n]
            ids.append(rows.ids_RC[group.rows_n[:, None], position_nW])
            positions.append(position_nW)
            page_nW = np.take_along_axis(table_nP, position_nW // D, 1)
            slots.append(page_nW * D + position_nW % D)
            table_nP = table_nP[:, : group.pages]
            grain_n1 = group.grain_n[:, None]
            limit_nW = (position_nW // grain_n1 + 1) * grain_n1
            if (limit_nW == limit_nW[:, :1]).all():
                limit_nW = limit_nW[:, :1]
            shape = self._shape(group, table_nP, limit_nW)
            shapes.append(shape)
            parts += [table_nP, limit_nW[:, : shape.limits]]
        wanted = plan.source_M
        if self._graphs is not None:
            wanted = np.pad(wanted, (0, (1 << (len(wanted) - 1).bit_length()) - len(wanted) if len(wanted) else 1))
        arrays = [*ids, *positions, *slots, wanted, *parts]
        queries = sum(x.size for x in ids)
        sizes = [queries, queries, queries, len(wanted), *(x.size for x in parts)]
        return torch.from_numpy(np.concatenate([x.ravel() for x in arrays])), sizes, tuple(shapes)

    def _shape(self, group: Group, table_nP: np.ndarray, limit_nW: np.ndarray) -> _GroupShape:
        n, limits, slots, first_page = len(group.rows_n), limit_nW.shape[1], group.pages * self.block_size, None
        if self._graphs is None and not self._paged:
            first = int(table_nP[0, 0])
            if n == 1 and (table_nP[0] == np.arange(first, first + group.pages)).all():
                first_page = first
                if limits == 1:
                    slots = int(limit_nW[0, 0])
            if limits == 1 and (limit_nW == slots).all():
                limits = 0  # everything that is looked at is seen
        return _GroupShape(n, group.width, group.pages, slots, first_page, limits)

    def _compute(self, packed: Tensor, sizes: list[int], shapes: tuple[_GroupShape, ...]) -> Tensor:
        """Logits `[M, V]`, from the packed numbers alone."""
        self._step, self._inputs = (packed, sizes, shapes), {}
        ids_T, positions_T, _, wanted_M, *_ = torch.split(packed, sizes)
        self._inputs_on(packed.device)
        if not len(wanted_M):  # the head needs something to run on
            wanted_M = positions_T[:1] * 0
        logits: Tensor = self._forward(ids_T[None], positions_T[None], wanted_M)[0]
        return logits

    def _inputs_on(self, device: torch.device) -> tuple[Tensor, list[_GroupInputs]]:
        """This step's inputs where a layer runs: made once for every device."""
        if device not in self._inputs:
            assert self._step is not None
            packed, sizes, shapes = self._step
            _, _, slots_T, _, *parts = torch.split(packed.to(device), sizes)
            groups, base, rest = [], 0, iter(parts)
            for shape in shapes:
                n, W = shape.rows, shape.width
                table_nP, limit_n1 = next(rest).view(n, shape.pages), next(rest).view(n, shape.limits)
                limit_n = limit_n1[:, 0] if self._paged and shape.limits == 1 else None
                mask = self._visible(limit_n1, shape.pages) if shape.limits and limit_n is None else None
                groups.append(_GroupInputs(shape, slice(base, base + n * W), table_nP, limit_n, mask))
                base += n * W
            self._inputs[device] = slots_T, groups
        return self._inputs[device]

    def _visible(self, limit_nW: Tensor, pages: int) -> Tensor:
        """Which slots are seen: `[n, 1, 1, P D]` by a row, or `[n, 1, G W, P D]` by each of its queries."""
        slots = torch.arange(pages * self.block_size, device=limit_nW.device)
        share = self.kv.share if limit_nW.shape[1] > 1 else 1
        return (slots < limit_nW.repeat(1, share)[..., None])[:, None]

    def _call_model(self, ids: Tensor, positions: Tensor, wanted_M: Tensor) -> Tensor:
        logits: Tensor = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self._mask,
            use_cache=False,
            is_causal=False,
            logits_to_keep=wanted_M,
            runner=self.number,
        ).logits
        return logits

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, layer: int) -> Tensor:
        """Write K and V `[1, H_kv, T, d]` to their pages; every group attends to its rows' pages. `[1, T, H, e]`."""
        if self.closed:
            raise RuntimeError("the engine is closed; its K/V memory is gone")
        if not self.kv.layers:  # not allocated yet: what it must hold is being asked
            self.kv.note(query, key, value, layer)
            return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
        keys, values = self.kv.layers[layer]
        slots_T, groups = self._inputs_on(query.device)
        for pages, new in ((keys, key), (values, value)):
            pages.by_slot.index_copy_(2, slots_T, new)
        outputs = [
            _attend(query if len(groups) == 1 else query[:, :, group.queries], keys, values, group, scale)
            for group in groups
        ]
        return outputs[0].contiguous() if len(outputs) == 1 else torch.cat(outputs, 1)


def _attend(query: Tensor, keys: Pages, values: Pages, group: _GroupInputs, scale: float) -> Tensor:
    """The attention of one group: `query [1, H, n W, d]` -> `[1, n W, H, e]`."""
    shape = group.shape
    n, W, heads, kv_heads = shape.rows, shape.width, query.shape[1], keys.pages.shape[2]
    if group.limit_n is not None:
        q = query[0].transpose(0, 1)
        return paged_attention(q, keys.pages, values.pages, group.table_nP, group.limit_n, W, scale)[None]
    if shape.first_page is not None:
        k, v = (pages.in_one_piece(shape.first_page, shape.slots) for pages in (keys, values))
    else:
        k, v = (pages.gathered(group.table_nP) for pages in (keys, values))
    # the G heads of a K/V head stand as more queries of it: no K/V is repeated
    if n == 1:
        q = query.reshape(1, kv_heads, -1, query.shape[3])  # [1, H_kv, G W, d]
        got = scaled_dot_product_attention(q, k, v, attn_mask=group.mask, scale=scale)
        return got.view(1, heads, W, -1).transpose(1, 2)
    q = query.reshape(kv_heads, -1, n, W, query.shape[3])  # [H_kv, G, n, W, d]
    q = q.permute(2, 0, 1, 3, 4).flatten(2, 3)  # [n, H_kv, G W, d]
    got = scaled_dot_product_attention(q, k, v, attn_mask=group.mask, scale=scale)
    got = got.view(n, kv_heads, -1, W, got.shape[3]).permute(0, 3, 1, 2, 4)  # [n, W, H_kv, G, e]
    return got.reshape(1, n * W, heads, -1)
