"""Attention as plain products, and by structure over the units of a training step, in transformers' interface.

Shapes: U units of D tokens, T = U D; H heads of width d, H_kv of them for K and V.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parablock.diffusion.masks import Units, near

BLOCK_ATTENTION = "parablock_block"  # the name under which transformers finds `block_attention`


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, softcap: float | None, dropout: float = 0.0
) -> Tensor:
    """`query [..., Q, d]` (scaled), `key [..., K, d]`, `value [..., K, e]` -> `[..., Q, e]`.

    `seen [..., Q, K]` (bool): which keys a query sees, by default all. `softcap`: the bound scores are squeezed under,
    which torch's attention does not know.
    """
    return attention_weights(query @ key.mT, seen, softcap, value.dtype, dropout) @ value


def attention_weights(
    scores: Tensor, seen: Tensor | None, softcap: float | None, dtype: torch.dtype, dropout: float = 0.0
) -> Tensor:
    """How much of each value a query takes, by its `scores [..., Q, K]`; arguments as of `plain_attention`."""
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(dtype)
    return nn.functional.dropout(weights, dropout) if dropout else weights


def made_again(attend: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`attend(*arguments)`; what its derivative needs is made again then.

    The attention weights of every layer would fill the memory, and making them again costs little.
    """
    if not torch.is_grad_enabled():
        return attend(*arguments)
    out: Tensor = checkpoint(attend, *arguments, use_reentrant=False)
    return out


def block_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    block_layout: Units | None = None,
    windows: Sequence[int] = (),
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention by structure: no mask, no wasted product. An attention function in transformers' interface.

    `query [1, H, T, d]`, `key [1, H_kv, T, d]`, `value [1, H_kv, T, e]` -> `[1, T, H, e]`. Units of one block number
    attend together to their clean prefixes and to themselves, as far as the layer's window reaches (`windows`: of all
    layers). Plain products, a softmax between: on CPUs the backward of `scaled_dot_product_attention` was the larger
    half of a small model's training step.
    """
    if block_layout is None:
        raise ValueError(f"{type(module).__name__} was not handed the block_layout; use attention='dense'")
    if kwargs.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__} attends with s_aux, which block diffusion does not support")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = windows[cast(int, module.layer_idx)]
    arguments = query * scale, key, value, block_layout, window, softcap, dropout if module.training else 0.0
    return made_again(_attend_units, *arguments), None


def _attend_units(
    query: Tensor, key: Tensor, value: Tensor, layout: Units, window: int, softcap: float | None, dropout: float
) -> Tensor:
    size, heads, kv_heads, width = layout.block_size, query.shape[1], key.shape[1], query.shape[-1]
    units, share = query.shape[2] // size, heads // kv_heads
    # units first: q [U, H_kv, share * D, d], k and v [U, H_kv, D, d]
    q = query.view(kv_heads, share, units, size, width).permute(2, 0, 1, 3, 4)
    q = q.reshape(units, kv_heads, share * size, width)
    k = key.view(kv_heads, units, size, width).transpose(0, 1).contiguous()
    v = value.view(kv_heads, units, size, value.shape[-1]).transpose(0, 1).contiguous()
    out = []
    for start, end, before in layout.groups:
        if window:  # blocks that are wholly out of reach are not looked at
            before = before[:, max(0, before.shape[1] * size - window + 1) // size :]
        own_k, own_v = k[start:end], v[start:end]
        count, blocks = before.shape
        if blocks:
            index = before.flatten()

            def prefix(x: Tensor, index: Tensor = index, count: int = count, blocks: int = blocks) -> Tensor:
                x = x.index_select(0, index).view(count, blocks, kv_heads, size, -1)
                return x.transpose(1, 2).reshape(count, kv_heads, blocks * size, -1)

            own_k, own_v = torch.cat([prefix(k), own_k], 2), torch.cat([prefix(v), own_v], 2)
        seen = None
        if window and window < own_k.shape[2]:
            place = torch.arange(own_k.shape[2], device=q.device)
            seen = near(place[-size:], place, window).repeat(share, 1)
        out.append(plain_attention(q[start:end], own_k, own_v, seen, softcap, dropout))
    result = torch.cat(out).view(units, kv_heads, share, size, -1).permute(0, 3, 1, 2, 4)
    return result.reshape(1, units * size, heads, -1)


def register_block_attention() -> str:
    """Make `block_attention` known to transformers; returns the name to select it by."""
    from transformers import AttentionInterface

    AttentionInterface.register(BLOCK_ATTENTION, cast(Any, block_attention))
    return BLOCK_ATTENTION
