"""Which pages of the K/V memory every row holds: taken as the row grows, given back when it ends or must wait.

Shapes: R rows, P pages of a row.
"""

import numpy as np

from parablock.engine.pages import PagePool, Tokens


class Memory:
    """The pages of all rows: `table_RP`, the page of every block; 0 where a row has none (yet)."""

    def __init__(self, pool: PagePool, rows: int, pages_per_row: int) -> None:
        self.pool = pool
        self.table_RP = np.zeros((rows, pages_per_row), dtype=np.int64)

    def admit(self, row: int, tokens: Tokens, reusable: int, root: int, spare: int) -> int | None:
        """Pages for `tokens` and the block behind them; None when there are not so many and `spare` more.

        Returns how many blocks of `tokens`, at most `reusable`, have their K/V already; `root` tells contexts apart.
        """
        matched = self.pool.match(tokens, reusable, root)
        pages = self.pool.reserve(matched, len(tokens) // self.pool.block_size + 1, spare)
        if pages is None:
            return None
        self.table_RP[row] = 0
        self.table_RP[row, : len(pages)] = pages
        return len(matched)

    def wanting(self, rows_n: np.ndarray, start_n: np.ndarray) -> np.ndarray:
        """Which of the rows have no page for the block that they write next, which holds position `start_n`."""
        lacking: np.ndarray = rows_n[self.table_RP[rows_n, start_n // self.pool.block_size] == 0]
        return lacking

    def grow(self, row: int) -> bool:
        """One more page for the row; False if there is none left."""
        held = int((self.table_RP[row] > 0).sum())
        page = self.pool.reserve([], 1, after=int(self.table_RP[row, held - 1]))
        if page is None:
            return False
        self.table_RP[row, held] = page[0]
        return True

    def register(self, row: int, ids: np.ndarray, blocks: int, root: int) -> None:
        """The first `blocks` blocks of the row hold the final K/V of `ids`: another request may begin with them."""
        self.pool.register(ids, self.table_RP[row, :blocks].tolist(), root)

    def release(self, row: int) -> None:
        """The row gives its pages back."""
        pages = self.table_RP[row]
        self.pool.release(pages[pages > 0].tolist())
        self.table_RP[row] = 0
