"""Attention over the paged K/V: an operator that a stock model calls in place of its own attention.

The operator's arguments are tensors and numbers alone, so that a compiler or a graph capture of the model can pass over
it; the number `runner` (a tensor on the host, so that what was compiled for one engine is known to the next) leads to
the runner whose K/V memory and current step it works on.
"""

from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from parablock.diffusion.attention import plain_attention

ENGINE_ATTENTION = "parablock_engine"


class Attends(Protocol):
    """A runner, as the operator sees it."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, layer: int
    ) -> Tensor:
        """See `Runner.attend`."""


_runners: WeakValueDictionary[int, Attends] = WeakValueDictionary()  # an operator cannot be handed an object
# how many engines a model serves, and the attention it had before
_lent: "WeakKeyDictionary[Any, tuple[int, str]]" = WeakKeyDictionary()
_library: Any = torch.library.Library("parablock", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "attend(Tensor query, Tensor key, Tensor value, float scale, float? softcap, int layer, Tensor runner) -> Tensor"
)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, layer: int, runner: Tensor
) -> Tensor:
    """`query [1, H, T, d]`, `key [1, H_kv, T, d]`, `value [1, H_kv, T, e]` -> `[1, T, H, e]`."""
    return _runners[int(runner)].attend(query, key, value, scale, softcap, layer)


def _shape_alone(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, layer: int, runner: Tensor
) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


_library.impl("attend", _attend, "CompositeExplicitAutograd")
_library.impl("attend", _shape_alone, "Meta")


def engine_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    runner: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """In transformers' interface. A call that does not come from an engine gets torch's attention, as by "sdpa"."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if runner is not None:
        if kwargs.get("s_aux") is not None:
            raise ValueError(f"{type(module).__name__} attends with s_aux, which the engine does not support")
        return torch.ops.parablock.attend(query, key, value, scale, softcap, module.layer_idx, runner), None
    if softcap is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return out, None
    seen = attention_mask
    if seen is None and query.shape[2] > 1 and kwargs.get("is_causal", module.is_causal):
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    elif seen is not None and seen.dtype != torch.bool:
        seen = seen == 0
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    return plain_attention(query * scale, key, value, seen, softcap).transpose(1, 2).contiguous(), None


def _register_engine_attention() -> str:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ENGINE_ATTENTION, cast(Any, engine_attention))
    AttentionMaskInterface.register(ENGINE_ATTENTION, sdpa_mask)
    return ENGINE_ATTENTION


def lend_attention(model: Any) -> None:
    """Let the model's attention serve engines; `return_attention` undoes it when the last engine has closed."""
    engines, before = _lent.get(model, (0, model.config._attn_implementation))
    _lent[model] = (engines + 1, before)
    if not engines:
        model.set_attn_implementation(_register_engine_attention())


def return_attention(model: Any) -> None:
    """The model's own attention is back once no engine uses it any more."""
    engines, before = _lent.pop(model)
    if engines > 1:
        _lent[model] = (engines - 1, before)
    else:
        model.set_attn_implementation(before)


def register_runner(number: int, runner: Attends) -> None:
    """Let the operator find `runner` by its number as long as it lives."""
    _runners[number] = runner
