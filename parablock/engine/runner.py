"""Runs one planned forward: the stock model over the paged K/V, and what its logits propose.

Shapes: T queries of the forward, M predictions wanted from it, V vocabulary; D tokens a page, H and H_kv heads.
"""

import itertools
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parablock.decoding.dense import last_device
from parablock.decoding.logprobs import TokenLogprob, distributions
from parablock.decoding.proposals import propose_tokens
from parablock.decoding.rows import Rows
from parablock.decoding.threads import Threads
from parablock.diffusion.gate import closed, gate_of
from parablock.diffusion.support import layer_windows
from parablock.engine.attention import lend_attention, register_runner, return_attention
from parablock.engine.config import EngineConfig
from parablock.engine.graphs import Graphs
from parablock.engine.groups import GroupInputs, GroupShape, attend, inputs_of, look
from parablock.engine.kv import KV
from parablock.engine.paged import paged_attention_works
from parablock.engine.schedule import Group, Plan
from parablock.settings import Model

_numbers = itertools.count()


Views = tuple[tuple[int, tuple[GroupShape, ...]], ...]  # for every window of the layers: the groups as they see them


class Runner:
    """The model, its K/V memory, and the current step. `close` gives the model back as it was."""

    def __init__(self, model: Model, block_size: int, config: EngineConfig) -> None:
        self.model = model
        self.block_size = block_size
        self.device = torch.device(model.device)
        self.last_device = last_device(model)
        number = next(_numbers)
        self.number = torch.tensor(number, device="cpu")
        self.threads = Threads(model, config.threads)  # here, where no step of another engine has changed their number
        self.queries = 0  # tokens that all forwards ran so far, prompts included
        self.gate = gate_of(model)
        self.kv = KV(config.kv_dtype)
        self.windows = layer_windows(model.config)
        self.closed = False
        self._paged = False  # attention reads the pages where they lie
        self._step: tuple[Tensor, list[int], Views] | None = None  # its numbers, packed
        # what the attention of a step needs, on every device where layers run: slots `[T]` to write to, and the groups
        # as the layers of a window see them (0: without one, or where it hides nothing yet)
        self._inputs: dict[torch.device, tuple[Tensor, dict[int, list[GroupInputs]]]] = {}
        self._mask = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=self.device)  # keeps the model from making one
        self._forward: Any = self._call_model
        self._forward_with_masks: Any = self._call_model  # compiled apart: what a gate does then
        self._graphs = Graphs(self.device) if config.cuda_graphs else None
        register_runner(number, self)
        lend_attention(model)
        try:
            with torch.inference_mode():
                probe = torch.zeros(1, 1, dtype=torch.long, device=self.device)
                self._call_model(probe, probe, probe[0].to(self.last_device))  # `attend` notes the shapes of K and V
        except BaseException:
            self.close()
            raise
        if config.compile:
            self._forward, self._forward_with_masks = self._compiled(), self._compiled()

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
        kinds = {(k.pages.shape, v.pages.shape): (k.pages, v.pages) for k, v in self.kv.layers}.values()
        self._paged = self.kv.plain and all(paged_attention_works(k, v, k.shape[2] * self.kv.share) for k, v in kinds)

    def close(self) -> None:
        """Give the model its own attention back and free the K/V memory."""
        if not self.closed:
            self.closed = True
            return_attention(self.model)
            self.kv.layers.clear()
            self._step, self._inputs = None, {}
            if self._graphs is not None:
                self._graphs.clear()

    def run(
        self, rows: Rows, table_RP: np.ndarray, plan: Plan
    ) -> tuple[np.ndarray, np.ndarray, dict[int, TokenLogprob]]:
        """One forward: a token and its confidence `[M]` for every wanted prediction. Waits for the device once.

        Of those whose rows ask for log-probabilities, these (by their number), for which it waits once more.
        """
        self.queries += plan.tokens
        with torch.inference_mode(), self.threads.for_tokens(plan.tokens):
            packed, sizes, views = self._pack(rows, table_RP, plan)
            if self._graphs is None:
                logits = self._compute(packed.to(self.device, non_blocking=True), sizes, views)
            else:
                logits = self._graphs.run((tuple(sizes), views), packed, lambda x: self._compute(x, sizes, views))
            logits = logits[: len(plan.source_M)]
            own = distributions(logits, rows, plan.works)
            tokens_M, confidence_M = propose_tokens(logits, rows, plan.works)
            return tokens_M, confidence_M, own.read(rows, tokens_M) if own else {}

    def check(self, rows: Rows, table_RP: np.ndarray) -> None:
        """Run one token over page 0; raises what the device raises."""
        spare = np.array([len(rows.active_R) - 1])
        plan = Plan([], [Group(spare, spare * 0, spare * 0 + 1, 1, 1)], spare[:0])
        with torch.inference_mode():
            packed, sizes, views = self._pack(rows, table_RP, plan)
            self._compute(packed.to(self.device), sizes, views).sum().item()

    def _pack(self, rows: Rows, table_RP: np.ndarray, plan: Plan) -> tuple[Tensor, list[int], Views]:
        """All numbers of a forward in one array, so that they travel to the device in one piece."""
        D = self.block_size
        ids, positions, slots, views, parts = [], [], [], [], []
        for group in plan.groups:
            slot_nW = group.first_n[:, None] + np.arange(group.width)
            slots.append(table_RP[group.rows_n[:, None], slot_nW // D] * D + slot_nW % D)
            if group.placed is not None:
                ids.append(group.placed.ids_q)
                positions.append(group.placed.position_q)
            else:
                ids.append(rows.ids_RC[group.rows_n[:, None], slot_nW])
                positions.append(slot_nW)
        end = max(int(group.first_n.max()) + group.width for group in plan.groups)
        in_place = self._graphs is None and not self._paged
        for window in sorted({window if window < end else 0 for window in self.windows}):
            looks = [look(group, table_RP, D, window, in_place=in_place) for group in plan.groups]
            views.append((window, tuple(shape for shape, _ in looks)))
            parts += [x for _, numbers in looks for x in numbers]
        wanted = plan.source_M
        if self._graphs is not None:
            wanted = np.pad(wanted, (0, (1 << (len(wanted) - 1).bit_length()) - len(wanted) if len(wanted) else 1))
        arrays = [*ids, *positions, *slots, wanted, *parts]
        queries = sum(x.size for x in ids)
        sizes = [queries, queries, queries, len(wanted), *(x.size for x in parts)]
        return torch.from_numpy(np.concatenate([x.ravel() for x in arrays])), sizes, tuple(views)

    def _compute(self, packed: Tensor, sizes: list[int], views: Views) -> Tensor:
        """Logits `[M, V]`, from the packed numbers alone."""
        self._step, self._inputs = (packed, sizes, views), {}
        ids_T, positions_T, _, wanted_M, *_ = torch.split(packed, sizes)
        self._inputs_on(packed.device)
        if not len(wanted_M):  # the head needs something to run on
            wanted_M = positions_T[:1] * 0
        masks = any(shape.owns for _, shapes in views for shape in shapes)
        with closed(self.gate, unless=masks):
            forward = self._forward_with_masks if masks else self._forward
            logits: Tensor = forward(ids_T[None], positions_T[None], wanted_M.to(self.last_device))[0]
        return logits

    def _inputs_on(self, device: torch.device) -> tuple[Tensor, dict[int, list[GroupInputs]]]:
        """This step's inputs where a layer runs: made once for every device."""
        if device not in self._inputs:
            assert self._step is not None
            packed, sizes, views = self._step
            _, _, slots_T, _, *parts = torch.split(packed.to(device), sizes)
            seen, rest = {}, iter(parts)
            for window, shapes in views:
                groups, base = [], 0
                for shape in shapes:
                    numbers = next(rest), next(rest), next(rest), next(rest)
                    groups.append(inputs_of(shape, numbers, base, self.block_size, self.kv.share, self._paged))
                    base = groups[-1].queries.stop
                seen[window] = groups
            self._inputs[device] = slots_T, seen
        return self._inputs[device]

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

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, layer: int
    ) -> Tensor:
        """Write K and V `[1, H_kv, T, d]` to their pages; every group attends to its rows' pages. `[1, T, H, e]`."""
        if self.closed:
            raise RuntimeError("the engine is closed; its K/V memory is gone")
        if not self.kv.layers:  # not allocated yet: what it must hold is being asked
            self.kv.note(query, key, value, layer, softcap)
            return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
        keys, values = self.kv.layers[layer]
        slots_T, views = self._inputs_on(query.device)
        groups = views[self.windows[layer] if self.windows[layer] in views else 0]
        for pages, new in ((keys, key), (values, value)):
            pages.by_slot.index_copy_(2, slots_T, new.to(pages.by_slot.dtype))
        outputs = [
            attend(query if len(groups) == 1 else query[:, :, group.queries], keys, values, group, scale, softcap)
            for group in groups
        ]
        return outputs[0].contiguous() if len(outputs) == 1 else torch.cat(outputs, 1)
