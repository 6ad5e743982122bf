"""The K/V memory in pages of one block: who holds which, and which finished blocks a new prompt may reuse.

Page 0 belongs to nobody: padding reads and writes there. A page with the K/V of a known beginning (its tokens and all
before them) can be shared; once nobody holds it, it is kept until its memory is needed, the longest idle first.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Tokens = Sequence[int] | np.ndarray
Key = tuple[int, bytes]  # the node of everything before the block, and the block's own tokens


@dataclass
class _Node:
    """A known beginning: the K/V of its last block lie in `page`."""

    number: int
    key: Key
    page: int


class PagePool:
    """`pages` pages (page 0 aside) of `block_size` tokens, counted by holder."""

    def __init__(self, pages: int, block_size: int, *, prefix_cache: bool = True) -> None:
        self.block_size = block_size
        self.pages = pages
        self.prefix_cache = prefix_cache
        self.holders = np.zeros(pages + 1, dtype=np.int64)
        self.holders[0] = 1
        self._nodes: dict[Key, _Node] = {}
        self._node_of_page: dict[int, _Node] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # pages with a node that nobody holds, oldest first
        self._next_node = 1

    @property
    def held(self) -> int:
        """Pages that requests hold."""
        return int((self.holders > 0).sum()) - 1

    @property
    def cached(self) -> int:
        """Pages that nobody holds and that keep a beginning for reuse."""
        return len(self._idle)

    def match(self, tokens: Tokens, blocks: int, root: int) -> list[int]:
        """The pages of the longest known beginning of `tokens`, at most `blocks` blocks; `root` tells modes apart."""
        pages: list[int] = []
        node = -root
        for key_bytes in self._blocks(tokens, blocks):
            found = self._nodes.get((node, key_bytes))
            if found is None:
                break
            pages.append(found.page)
            node = found.number
        return pages

    def reserve(self, matched: Sequence[int], pages: int, spare: int = 0, after: int = 0) -> list[int] | None:
        """`pages` pages that begin with the `matched` ones; None if fewer than those and `spare` more are left.

        Best are pages that stand side by side, behind `after` or the matched ones.
        """
        fresh = pages - len(matched)
        idle_matched = sum(self.holders[page] == 0 for page in matched)
        if self.pages - self.held - idle_matched < fresh + spare:
            return None
        for page in matched:
            self.holders[page] += 1
            self._idle.pop(page, None)
        free = (self.holders == 0).nonzero()[0]
        if self._idle:
            free = free[~np.isin(free, np.fromiter(self._idle, dtype=np.int64))]
        while len(free) < fresh:
            oldest, _ = self._idle.popitem(last=False)
            self._forget(oldest)
            free = np.append(free, oldest)
        taken = self._neighbours(np.sort(free), fresh, after=matched[-1] if matched else after)
        self.holders[taken] += 1
        return [*matched, *taken.tolist()]

    def register(self, tokens: Tokens, pages: Sequence[int], root: int) -> None:
        """`pages` hold the clean K/V of the blocks of `tokens`: a later prompt may begin with them."""
        if not self.prefix_cache:
            return
        node = -root
        for page, key_bytes in zip(pages, self._blocks(tokens, len(pages)), strict=True):
            key = (node, key_bytes)
            known = self._nodes.get(key)
            if known is None:
                if page in self._node_of_page:  # it already keeps another beginning: a shared page is never written
                    return
                known = _Node(self._next_node, key, page)
                self._next_node += 1
                self._nodes[key] = self._node_of_page[page] = known
            node = known.number

    def release(self, pages: Sequence[int]) -> None:
        """A request gives its pages back; those with a known beginning are kept for reuse."""
        for page in reversed(pages):  # the deepest is given up first: it is useless without those before it
            self.holders[page] -= 1
            if not self.holders[page] and page in self._node_of_page:
                self._idle[page] = None

    def clear(self) -> None:
        """Forget every beginning that nobody holds."""
        while self._idle:
            self._forget(self._idle.popitem()[0])

    def _forget(self, page: int) -> None:
        del self._nodes[self._node_of_page.pop(page).key]

    def _blocks(self, tokens: Tokens, blocks: int) -> list[bytes]:
        size = self.block_size
        whole = np.asarray(tokens[: blocks * size], dtype=np.int64).reshape(-1, size)
        return [block.tobytes() for block in whole]

    @staticmethod
    def _neighbours(free: np.ndarray, count: int, after: int) -> np.ndarray:
        """`count` of the sorted `free` pages, side by side if possible: a row whose pages are needs no gathering."""
        if not count:
            return free[:0]
        starts = (free[count - 1 :] - free[: len(free) - count + 1] == count - 1).nonzero()[0]
        if not len(starts):
            return free[:count]
        following = starts[free[starts] == after + 1]
        first = int(following[0] if after and len(following) else starts[0])
        return free[first : first + count]
