"""Attention that reads the pages where they lie (torch's `varlen_attn` with a block table), on GPUs that can.

Everywhere else a group's pages are gathered first. Whether a device can is not asked but tried, once per engine,
against the gathered form. FlashAttention 2, which torch brings, takes half precision and pages of 256 tokens only;
FlashAttention 3 and 4 take any once `torch.nn.attention.activate_flash_attention_impl` has activated them.
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

    `keys`, `values`: all pages, `[pages, D, H_kv, d]`; `table_nP`, `limit_n`: int32. No query of a row sees less than
    another.
    """
    from torch.nn.attention.varlen import varlen_attn

    rows, pages = table_nP.shape
    starts = torch.arange(0, (rows + 1) * width, width, device=query.device, dtype=torch.int32)
    # num_splits=1: split by the longest row of the call, a row's sums would depend on its neighbours; and
    # FlashAttention 2 then forgets rows (pytorch issue 194167)
    out = varlen_attn(
        query.contiguous(), keys, values, starts, None, width, pages * keys.shape[1], scale=scale,
        enable_gqa=query.shape[1] != keys.shape[2], seqused_k=limit_n, block_table=table_nP, num_splits=1,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def paged_attention_works(keys: Tensor, values: Tensor, heads: int) -> bool:
    """Whether `paged_attention` runs on the device of these pages, and computes what the gathered form does."""
    if keys.device.type != "cuda" or keys.shape != values.shape:
        return False
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(keys.device, keys.dtype)

    pages, D, kv_heads, d = 6, *keys.shape[1:]
    k, v = random(pages, D, kv_heads, d), random(pages, D, kv_heads, d)
    table = torch.tensor([[2, 0], [1, 3], [5, 4]], dtype=torch.int32).to(keys.device)
    limit = torch.tensor([D, 2 * D, D + 1], dtype=torch.int32).to(keys.device)
    gathered_k, gathered_v = (
        x[table].flatten(1, 2).transpose(1, 2).repeat_interleave(heads // kv_heads, 1) for x in (k, v)
    )
    mask = (torch.arange(2 * D, device=keys.device) < limit[:, None])[:, None, None]
    for width in (1, D):
        query = random(3 * width, heads, d)
        try:
            got = paged_attention(query, k, v, table, limit, width, d**-0.5)
        except (RuntimeError, TypeError, ImportError, AssertionError) as reason:
            log.info("pages are gathered before attention: %s", reason)
            return False
        q = query.view(3, width, heads, d).transpose(1, 2)
        expected = scaled_dot_product_attention(q, gathered_k, gathered_v, attn_mask=mask)
        if not torch.allclose(got, expected.transpose(1, 2).reshape(got.shape), atol=2e-2, rtol=2e-2):
            log.warning("pages are gathered before attention: attention over the pages computes something else here")
            return False
    return True
