"""What the groups of a forward see of their pages, and the attention over it.

It is worked out on the host (`look`) and travels in the packed numbers of the forward; `inputs_of` makes of these what
the attention needs, on every device where layers run. Layers of one window see alike.

Shapes: a group has n rows of W queries that look at P pages of D tokens. G = H / H_kv heads share one K/V head.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from parablock.diffusion.attention import plain_attention
from parablock.engine.kv import Pages
from parablock.engine.paged import paged_attention
from parablock.engine.schedule import Group

ALIKE = 4  # queries from which on torch's attention on a CPU gives each the same, bit for bit, whatever their number


@dataclass(frozen=True)
class GroupShape:
    """A group, as far as it decides which operations run.

    `first_page`: the K/V of its single row lie in one piece from there.
    """

    rows: int
    width: int
    pages: int
    first_page: int | None
    limits: int  # how many limits a row has: 1, or one for every query
    lows: int  # the same for where sight begins: none if all see everything before their limit
    owns: int = 0  # of every query, if it sees more slots than those below its limit: from where and to where


@dataclass(frozen=True)
class GroupInputs:
    """The same with its numbers, on a device."""

    shape: GroupShape
    queries: slice  # of the T queries
    table_nP: Tensor
    limit_n: Tensor | None  # slots each row sees, where `paged_attention` is used
    mask: Tensor | None  # [n, 1, 1 or G W, P D] bool


def look(
    group: Group, table_RP: np.ndarray, block_size: int, window: int, *, in_place: bool
) -> tuple[GroupShape, list[np.ndarray]]:
    """The group's shape and numbers in the layers of a window: pages, limits, and where sight begins.

    `in_place`: pages that lie in one piece may be read so. Pages that no query sees are left out.
    """
    n, W, D = len(group.rows_n), group.width, block_size
    position_nW, grain_n1 = group.first_n[:, None] + np.arange(W), group.grain_n[:, None]
    limit_nW, low_nW = (position_nW // grain_n1 + 1) * grain_n1, position_nW[:, :0]
    own_n2W = position_nW[:, :0]
    if (placed := group.placed) is not None:
        position_nW, limit_nW = placed.position_q, placed.limit_q
        own_nW, end_nW = placed.own_q, placed.end_q
    pages, table_nP = group.pages, table_RP[group.rows_n, : group.pages]
    if 0 < window < int(group.first_n.max()) + W:  # it hides something
        pages = min(pages, (window + W - 2 + D - 1) // D + 1)
        skip_n1 = np.minimum(np.maximum(group.first_n - window + 1, 0) // D, group.pages - pages)[:, None]
        table_nP = np.take_along_axis(table_nP, skip_n1 + np.arange(pages), 1)
        limit_nW, low_nW = limit_nW - skip_n1 * D, position_nW - window + 1 - skip_n1 * D
        if placed is not None:  # the K/V of masks lie in order of their positions, so a window reaches as far there
            own_nW, end_nW = np.maximum(own_nW, end_nW - window) - skip_n1 * D, end_nW - skip_n1 * D
    if placed is not None:
        own_n2W = np.concatenate([own_nW, end_nW], 1)
    elif (limit_nW == limit_nW[:, :1]).all():
        limit_nW = limit_nW[:, :1]
    first_page = None
    if in_place:
        first = int(table_nP[0, 0])
        if n == 1 and (table_nP[0] == np.arange(first, first + pages)).all():
            first_page = first
    shape = GroupShape(n, W, pages, first_page, limit_nW.shape[1], low_nW.shape[1], own_n2W.shape[1])
    return shape, [table_nP, limit_nW, low_nW, own_n2W]


def inputs_of(
    shape: GroupShape,
    numbers: tuple[Tensor, Tensor, Tensor, Tensor],
    first_query: int,
    block_size: int,
    share: int,
    paged: bool,
) -> GroupInputs:
    """From the numbers of `look`, flat; `share`: G; `paged`: pages are read where they lie, where nothing hides any."""
    n, W = shape.rows, shape.width
    widths = shape.pages, shape.limits, shape.lows, shape.owns
    table_nP, limit_nW, low_nW, own_n2W = (x.view(n, width) for x, width in zip(numbers, widths, strict=True))
    paged = paged and shape.limits == 1 and not shape.lows
    mask = None
    if not paged:
        slots = torch.arange(shape.pages * block_size, device=table_nP.device)
        seen = slots < limit_nW[..., None]
        if shape.lows:
            seen = seen & (slots >= low_nW[..., None])
        if shape.owns:
            seen = seen | (slots >= own_n2W[:, :W, None]) & (slots < own_n2W[:, W:, None])
        mask = (seen.repeat(1, share, 1) if seen.shape[1] > 1 else seen)[:, None]
    queries, limit_n = slice(first_query, first_query + n * W), None
    if paged:  # as its kernels want them
        table_nP, limit_n = table_nP.int(), limit_nW[:, 0].int()
    return GroupInputs(shape, queries, table_nP, limit_n, mask)


def attend(
    query: Tensor, keys: Pages, values: Pages, group: GroupInputs, scale: float, softcap: float | None
) -> Tensor:
    """The attention of one group: `query [1, H, n W, d]` -> `[1, n W, H, e]`."""
    shape = group.shape
    n, W, heads, kv_heads = shape.rows, shape.width, query.shape[1], keys.pages.shape[2]
    if group.limit_n is not None:
        q = query[0].transpose(0, 1)
        return paged_attention(q, keys.pages, values.pages, group.table_nP, group.limit_n, W, scale)[None]
    if shape.first_page is not None:
        k, v = (pages.in_one_piece(shape.first_page, shape.pages) for pages in (keys, values))
    else:
        k, v = (pages.gathered(group.table_nP) for pages in (keys, values))
    k, v = k.to(query.dtype), v.to(query.dtype)
    # the G heads of a K/V head stand as more queries of it: no K/V is repeated
    if n == 1:
        q = query.reshape(1, kv_heads, -1, query.shape[3])  # [1, H_kv, G W, d]
        return _attention(q, k, v, group.mask, scale, softcap).reshape(1, heads, W, -1).transpose(1, 2)
    q = query.reshape(kv_heads, -1, n, W, query.shape[3])  # [H_kv, G, n, W, d]
    q = q.permute(2, 0, 1, 3, 4).flatten(2, 3)  # [n, H_kv, G W, d]
    got = _attention(q, k, v, group.mask, scale, softcap)
    got = got.reshape(n, kv_heads, -1, W, got.shape[3]).permute(0, 3, 1, 2, 4)  # [n, W, H_kv, G, e]
    return got.reshape(1, n * W, heads, -1)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    if softcap is not None:
        return plain_attention(query * scale, key, value, mask, softcap)
    queries = query.shape[2]
    if queries < ALIKE and query.device.type == "cpu":
        query = pad(query, (0, 0, 0, ALIKE - queries))
        if mask is not None and mask.shape[2] > 1:
            mask = pad(mask, (0, 0, 0, ALIKE - queries), value=True)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)[:, :, :queries]
