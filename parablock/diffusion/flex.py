"""Flex attention, for training on CUDA: transformers' own, and its block mask without all pairs of tokens at once."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

TILE = 128  # tokens; flex attention skips tiles without a pair, and asks the rule only in tiles that are not full
MAX_PAIRS = 2**25  # how many pairs of tokens the rule is asked about at a time
FLEX_ATTENTION = "parablock_flex"  # the name under which transformers finds `flex_attention`


def flex_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """In transformers' interface; `attention_mask` is a `BlockMask`.

    Under autocast the rotary embedding leaves queries and keys in float32, beside values in half precision. What torch
    makes of that depends on its version; everything in float32 is the slowest.
    """
    from transformers.integrations.flex_attention import flex_attention_forward

    query, key = query.to(value.dtype), key.to(value.dtype)
    return flex_attention_forward(module, query, key, value, attention_mask, **kwargs)


def register_flex_attention() -> str:
    """Make `flex_attention` known to transformers; returns the name to select it by."""
    from transformers import AttentionInterface

    AttentionInterface.register(FLEX_ATTENTION, cast(Any, flex_attention))
    return FLEX_ATTENTION


def block_mask(attends: Callable[..., Tensor], tokens: int, device: torch.device) -> Any:
    """The `BlockMask` of a rule over token indices `(batch, head, query, key)`, which must broadcast.

    It is torch's `create_block_mask`, which asks about all pairs in one piece: 10 bytes for each, gigabytes for the
    rows of a training step.
    """
    from torch.nn.attention.flex_attention import BlockMask

    tiles = -(-tokens // TILE)
    index = torch.arange(tiles * TILE, device=device)
    key = index.clamp(max=tokens - 1)
    some, whole = [], []
    for query in torch.split(index, max(1, MAX_PAIRS // (TILE * len(index))) * TILE):
        query = query[:, None]
        pairs = attends(0, 0, query.clamp(max=tokens - 1), key) & (query < tokens) & (index < tokens)
        by_tile = pairs.view(-1, TILE, tiles, TILE)
        some.append(by_tile.any(3).any(1))
        whole.append(by_tile.all(3).all(1))
    some_QK, whole_QK = torch.cat(some)[None, None], torch.cat(whole)[None, None]  # tiles of queries and keys
    return BlockMask.from_kv_blocks(
        *_ordered(some_QK & ~whole_QK), *_ordered(whole_QK), BLOCK_SIZE=TILE, mask_mod=attends,
        seq_lengths=(tokens, tokens),
    )  # fmt: skip


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many key tiles of every row of tiles are chosen, and the key tiles with these first."""
    return chosen.sum(-1, dtype=torch.int32), chosen.int().argsort(dim=-1, descending=True, stable=True).int()
