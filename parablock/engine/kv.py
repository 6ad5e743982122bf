"""The K/V memory of all layers, in pages of D tokens; each layer's on the device where the layer runs.

Shapes: D block size, H_kv heads, d and e widths of a key and a value.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Pages:
    """K or V of one layer: `[pages, D, H_kv, d]`, seen in the ways it is written and read."""

    def __init__(self, pages: int, block_size: int, like: Tensor) -> None:
        self.pages = like.new_zeros(pages, block_size, like.shape[1], like.shape[3])
        self.by_slot = self.pages.flatten(0, 1).transpose(0, 1)[None]  # [1, H_kv, slots, d]
        heads, width = like.shape[1], like.shape[3]
        self.strides = (0, width, heads * width, 1)

    def in_one_piece(self, first_page: int, pages: int) -> Tensor:
        """A view `[1, H_kv, P D, d]` of so many neighbouring pages."""
        _, D, heads, width = self.pages.shape
        return self.pages.as_strided((1, heads, pages * D, width), self.strides, first_page * D * heads * width)

    def gathered(self, table_nP: Tensor) -> Tensor:
        """The pages of some rows, behind one another: `[n, H_kv, P D, d]`."""
        rows, pages = table_nP.shape
        _, D, heads, width = self.pages.shape
        found = self.pages.index_select(0, table_nP.view(-1))
        return found.view(rows, pages * D, heads, width).transpose(1, 2)


class KV:
    """K and V of every layer, as `dtype` or as the model makes them.

    A forward without memory tells what it needs (`note`), then it is allocated.
    """

    def __init__(self, dtype: str | None = None) -> None:
        self.layers: list[tuple[Pages, Pages]] = []
        self.share = 1  # G: heads that share one K/V head
        self.plain = True  # no layer asks for more than the softmax of products with K and V as it made them
        self._dtype: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
        self._like: dict[int, tuple[Tensor, Tensor]] = {}

    def note(self, query: Tensor, key: Tensor, value: Tensor, layer: int, softcap: float | None) -> None:
        """What a layer's attention is called with: `[1, H, T, d]`, `[1, H_kv, T, d]`, `[1, H_kv, T, e]`."""
        share = query.shape[1] // key.shape[1]
        if self._like and share != self.share:
            raise ValueError(
                f"{self.share} heads share one K/V head in some layers and {share} in others, which the engine does "
                "not support; decode with pb.generate"
            )
        self.share = share
        dtype = self._dtype or key.dtype
        self.plain &= softcap is None and dtype == key.dtype
        self._like[layer] = key[:, :, :1].detach().to(dtype), value[:, :, :1].detach().to(dtype)

    @property
    def bytes_per_token(self) -> int:
        """Memory of one token, all layers."""
        return sum(self.bytes_on.values())

    @property
    def bytes_on(self) -> dict[torch.device, int]:
        """Memory of one token on every device where layers run."""
        total: dict[torch.device, int] = {}
        for x in (x for pair in self._like.values() for x in pair):
            total[x.device] = total.get(x.device, 0) + x.nbytes
        return total

    def allocate(self, pages: int, block_size: int) -> None:
        """Make the memory: `pages` pages and page 0, which belongs to nobody."""
        for layer in range(len(self._like)):
            key, value = (Pages(pages + 1, block_size, like) for like in self._like[layer])
            self.layers.append((key, value))

    @torch.inference_mode()
    def read(self, page: int) -> list[Tensor]:
        """A copy of one page of every layer, on the host."""
        return [pages.pages[page].to("cpu", copy=True) for layer in self.layers for pages in layer]

    @torch.inference_mode()
    def write(self, page: int, content: Sequence[Tensor]) -> None:
        """What `read` returned, to a page."""
        every = (pages for layer in self.layers for pages in layer)
        for pages, kept in zip(every, content, strict=True):
            pages.pages[page] = kept.to(pages.pages.device)
