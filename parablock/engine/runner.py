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

from parablock.config import EngineConfig, Model
from parablock.engine.attention import lend_attention, register_runner, return_attention
from parablock.engine.paged import paged_attention, paged_attention_works
from parablock.engine.proposals import propose_tokens
from parablock.engine.rows import EngineRows
from parablock.engine.schedule import Group, Plan

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


class _Pool:
    """K or V of one layer: `[pages, D, H_kv, d]`, seen in the ways it is written and read."""

    def __init__(
        self, pages: int, block_size: int, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.pages = torch.zeros(pages, block_size, *shape, dtype=dtype, device=device)
        self.by_slot = self.pages.flatten(0, 1).transpose(0, 1)[None]  # [1, H_kv, slots, d]
        self.strides = (0, shape[1], shape[0] * shape[1], 1)

    def pages_of(self, group: _GroupInputs) -> Tensor:
        """The K or V `[n, H_kv, P D, d]` of a group's rows; a view where they lie in one piece."""
        shape, (_, D, kv_heads, width) = group.shape, self.pages.shape
        if shape.first_page is not None:
            size = (1, kv_heads, shape.slots, width)
            return self.pages.as_strided(size, self.strides, shape.first_page * D * kv_heads * width)
        gathered = self.pages.index_select(0, group.table_nP.view(-1))
        return gathered.view(shape.rows, shape.pages * D, kv_heads, width).transpose(1, 2)


class Runner:
    """The model, its K/V memory, and the current step. `close` gives the model back as it was."""

    def __init__(self, model: Model, block_size: int, config: EngineConfig) -> None:
        self.model = model
        self.block_size = block_size
        self.device = torch.device(model.device)
        self.number = next(_numbers)
        self.threads = config.threads
        self.queries = 0  # tokens that all forwards ran so far, prompts included
        self.weights = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
        self._pool: list[tuple[_Pool, _Pool]] = []  # K and V of every layer
        self._kv_shapes: dict[int, tuple[torch.Size, torch.Size, torch.dtype]] = {}
        self._share = 1  # G
        self._paged = False  # attention reads the pages where they lie
        self._groups: list[_GroupInputs] = []
        self._slots_T = torch.zeros(0, dtype=torch.long)  # where the T queries' K/V are written
        self._mask = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=self.device)  # keeps the model from making one
        self._forward: Any = self._call_model
        self._graphs: dict[Any, tuple[Any, Tensor, Tensor]] | None = {} if config.cuda_graphs else None
        register_runner(self.number, self)
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

    @property
    def bytes_per_token(self) -> int:
        """K/V memory of one token, all layers."""
        shapes = self._kv_shapes.values()
        return sum((k.numel() + v.numel()) * dtype.itemsize for k, v, dtype in shapes)

    def allocate(self, pages: int) -> None:
        """Make the K/V memory: `pages` pages and page 0, which belongs to nobody."""
        with torch.inference_mode():
            for layer in range(len(self._kv_shapes)):
                *shapes, dtype = self._kv_shapes[layer]
                key, value = (_Pool(pages + 1, self.block_size, shape, dtype, self.device) for shape in shapes)
                self._pool.append((key, value))
        key, value = self._pool[0]
        self._paged = paged_attention_works(key.pages, value.pages, key.pages.shape[2] * self._share)

    def close(self) -> None:
        """Give the model its own attention back and free the K/V memory."""
        return_attention(self.model)
        self._pool.clear()
        self._groups.clear()

    def probe(self) -> None:
        """A forward of one token over page 0, which belongs to nobody: raises what the device raises."""
        shape = _GroupShape(rows=1, width=1, pages=1, slots=self.block_size, first_page=None, limits=1)
        with torch.inference_mode():
            packed = torch.tensor([0, 0, 0, 0, 0, 1], device=self.device)  # id, position, slot, wanted, page, limit
            self._compute(packed, [1] * 6, (shape,)).cpu()

    def run(self, rows: EngineRows, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """One forward: a token and its confidence `[M]` for every wanted prediction. Waits for the device once."""
        threads = torch.get_num_threads()
        self.queries += plan.tokens
        if self.device.type == "cpu":
            few = self.weights * plan.tokens < ONE_THREAD
            torch.set_num_threads(self.threads or (1 if few else threads))
        try:
            with torch.inference_mode():
                packed, sizes, shapes = self._pack(rows, plan)
                if self._graphs is None:
                    logits = self._compute(packed.to(self.device), sizes, shapes)
                else:
                    logits = self._replay(packed, sizes, shapes)
                return propose_tokens(logits[: len(plan.owner_M)], rows, plan)
        finally:
            torch.set_num_threads(threads)

    def _pack(self, rows: EngineRows, plan: Plan) -> tuple[Tensor, list[int], tuple[_GroupShape, ...]]:
        """All numbers of a forward in one array, so that they travel to the device in one piece."""
        D = self.block_size
        ids, positions, slots, shapes, parts = [], [], [], [], []
        for group in plan.groups:
            position_nW = group.first_n[:, None] + np.arange(group.width)
            table_nP = rows.table_RP[group.rows_n]
            ids.append(rows.ids_RC[group.rows_n[:, None], position_nW])
            positions.append(position_nW)
            page_nW = np.take_along_axis(table_nP, position_nW // D, 1)
            slots.append(page_nW * D + position_nW % D)
            table_nP = table_nP[:, : group.pages]
            end_nW = (position_nW // D + 1) * D
            limit_nW = np.where(rows.autoregressive_R[group.rows_n, None], position_nW + 1, end_nW)
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
        ids_T, positions_T, self._slots_T, wanted_M, *parts = torch.split(packed, sizes)
        self._groups, base, rest = [], 0, iter(parts)
        for shape in shapes:
            n, W = shape.rows, shape.width
            table_nP, limit_n1 = next(rest).view(n, shape.pages), next(rest).view(n, shape.limits)
            limit_n = limit_n1[:, 0] if self._paged and shape.limits == 1 else None
            mask = self._visible(limit_n1, shape.pages) if shape.limits and limit_n is None else None
            self._groups.append(_GroupInputs(shape, slice(base, base + n * W), table_nP, limit_n, mask))
            base += n * W
        if not len(wanted_M):  # the head needs something to run on
            wanted_M = positions_T[:1] * 0
        logits: Tensor = self._forward(ids_T[None], positions_T[None], wanted_M)[0]
        return logits

    def _visible(self, limit_nW: Tensor, pages: int) -> Tensor:
        """Which slots are seen: `[n, 1, 1, P D]` by a row, or `[n, 1, G W, P D]` by each of its queries."""
        slots = torch.arange(pages * self.block_size, device=limit_nW.device)
        share = self._share if limit_nW.shape[1] > 1 else 1
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
        if not self._pool:
            self._note_shapes(query, key, value, layer)
            return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
        pools = self._pool[layer]
        for pool, new in zip(pools, (key, value), strict=True):
            pool.by_slot.index_copy_(2, self._slots_T, new)
        outputs = []
        for group in self._groups:
            n, W = group.shape.rows, group.shape.width
            q = query if len(self._groups) == 1 else query[:, :, group.queries]
            if group.limit_n is not None:
                q, k, v = q[0].transpose(0, 1), pools[0].pages, pools[1].pages
                outputs.append(paged_attention(q, k, v, group.table_nP, group.limit_n, W, scale)[None])
                continue
            # the G heads of a K/V head stand as more queries of it: no K/V is repeated
            if n == 1:
                q = q.reshape(1, key.shape[1], -1, q.shape[3])  # [1, H_kv, G W, d]
            else:
                q = q.reshape(key.shape[1], -1, n, W, q.shape[3])  # [H_kv, G, n, W, d]
                q = q.permute(2, 0, 1, 3, 4).flatten(2, 3)  # [n, H_kv, G W, d]
            k, v = (pool.pages_of(group) for pool in pools)
            got = scaled_dot_product_attention(q, k, v, attn_mask=group.mask, scale=scale)
            if n == 1:
                outputs.append(got.view(1, query.shape[1], W, -1).transpose(1, 2))
            else:
                got = got.view(n, key.shape[1], -1, W, got.shape[3]).permute(0, 3, 1, 2, 4)  # [n, W, H_kv, G, e]
                outputs.append(got.reshape(1, n * W, query.shape[1], -1))
        return outputs[0].contiguous() if len(outputs) == 1 else torch.cat(outputs, 1)

    def _note_shapes(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> None:
        self._share = query.shape[1] // key.shape[1]
        self._kv_shapes[layer] = (key[0, :, 0].shape, value[0, :, 0].shape, key.dtype)

    def _replay(self, packed: Tensor, sizes: list[int], shapes: tuple[_GroupShape, ...]) -> Tensor:
        """The same forward from a captured CUDA graph; the first time a shape is met, it is captured."""
        assert self._graphs is not None
        key = (tuple(sizes), shapes)
        if key not in self._graphs:
            static = packed.to(self.device)
            self._compute(static, sizes, shapes)  # what is made once must not be captured
            torch.cuda.synchronize(self.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._compute(static, sizes, shapes)
            self._graphs[key] = (graph, static, logits)
        graph, static, logits = self._graphs[key]
        static.copy_(packed)
        graph.replay()
        return logits
