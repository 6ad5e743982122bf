"""Attention that reads the pages where they lie (torch's `varlen_attn` with a block table), on GPUs that can.

Everywhere else a group's pages are gathered first. Whether a device can is not asked but tried, once per engine,
against the gathered form.
"""

import logging

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

log = logging.getLogger(__name__)


def paged_attention(
    query: Tensor, keys: Tensor, values: Tensor, table_nP: Tensor, limit_n: Tensor, width: int, scale: float
) -> Tensor:
    """`query [n W, H, d]` attends to the first `limit_n` slots of the pages `table_nP` of its row; `[n W, H, e]`.

    `keys`, `values`: all pages, `[pages, D, H_kv, d]`. No query of a row sees less than another.
    """
    from torch.nn.attention.varlen import varlen_attn

    rows, pages = table_nP.shape
    starts = torch.arange(rows + 1, device=query.device, dtype=torch.int32) * width
    out = varlen_attn(
        query.contiguous(), keys, values, starts, None, width, pages * keys.shape[1], scale=scale,
        enable_gqa=query.shape[1] != keys.shape[2], seqused_k=limit_n.int(), block_table=table_nP.int(),
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def paged_attention_works(keys: Tensor, values: Tensor, heads: int) -> bool:
    """Whether `paged_attention` runs on the device of these pages, and computes what the gathered form does."""
    if keys.device.type != "cuda" or keys.shape != values.shape:
        return False
    generator = torch.Generator(keys.device).manual_seed(0)
    pages, D, kv_heads, d = 4, *keys.shape[1:]
    k, v = (
        torch.randn(pages, D, kv_heads, d, device=keys.device, generator=generator).to(keys.dtype) for _ in range(2)
    )
    query = torch.randn(2 * D, heads, d, device=keys.device, generator=generator).to(keys.dtype)
    table = torch.tensor([[2, 0], [1, 3]], device=keys.device)
    limit = torch.tensor([D, 2 * D], device=keys.device)
    try:
        got = paged_attention(query, k, v, table, limit, D, d**-0.5)
    except (RuntimeError, TypeError, ImportError) as reason:
        log.info("pages are gathered before attention: %s", reason)
        return False
    k, v = (x[table].flatten(1, 2).transpose(1, 2).repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    mask = (torch.arange(2 * D, device=keys.device) < limit[:, None])[:, None, None]
    expected = scaled_dot_product_attention(query.view(2, D, heads, d).transpose(1, 2), k, v, attn_mask=mask)
    return torch.allclose(got, expected.transpose(1, 2).reshape(got.shape), atol=2e-2, rtol=2e-2)
