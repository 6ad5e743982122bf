"""What the next forward runs: every row's next piece of work, in few groups of equal shape.

Shapes: n rows of a group, W its width (queries per row), T queries of the whole forward, M predictions wanted from it,
K rows that get any, P pages, D block size.

A piece of work is a few query tokens of one row that attend to the row's K/V up to a limit: a chunk of its prompt, a
block being denoised or committed, one sub-block, or (autoregressive) one token. Pieces of one width form a group, and
all groups run in one forward, so rows in prefill, denoising and commit share it. Block diffusion and autoregressive
rows differ in the limit alone: the end of the query's block, or the query itself.
"""

from dataclasses import dataclass, fields

import numpy as np

from parablock.engine.rows import EngineRows

FEW_PAGES = 16  # contexts up to so many pages share a group; longer ones go with their like, by powers of 4


@dataclass(frozen=True)
class Group:
    """Rows that run `width` tokens each, from position `first_n` on; `pages` of their K/V are looked at."""

    rows_n: np.ndarray
    first_n: np.ndarray
    width: int
    pages: int


@dataclass(frozen=True)
class Plan:
    """One forward. Predictions: query `source_M` predicts position `target_M` of row `rows_K[owner_M]`."""

    groups: list[Group]
    rows_K: np.ndarray
    owner_M: np.ndarray
    column_M: np.ndarray  # the target's place in its sub-block
    target_M: np.ndarray
    source_M: np.ndarray
    # what this forward does to its rows (arrays of row numbers)
    prefill: np.ndarray
    prefill_end: np.ndarray  # where each of them then stands
    commit: np.ndarray
    whole: np.ndarray  # rows that run all of their block and do not commit it
    part: np.ndarray  # rows that run one sub-block of it
    autoregressive: np.ndarray

    @property
    def tokens(self) -> int:
        """T: how many tokens the forward runs over."""
        return sum(len(group.rows_n) * group.width for group in self.groups)

    @property
    def decoding(self) -> np.ndarray:
        """The rows for which this is a decode forward."""
        return np.concatenate([self.commit, self.whole, self.part, self.autoregressive])

    @property
    def rows(self) -> np.ndarray:
        """All rows that take part."""
        return np.concatenate([self.prefill, self.decoding])


@dataclass
class _Work:
    """Pieces of work of one kind, before they are grouped."""

    rows_n: np.ndarray
    first_n: np.ndarray
    width_n: np.ndarray
    # predictions: of which piece, from which of its queries, for which position
    piece_m: np.ndarray
    query_m: np.ndarray
    target_m: np.ndarray
    column_m: np.ndarray


def plan(rows: EngineRows, active: np.ndarray, prefill_chunk: int, powers_of_two: bool = False) -> Plan:
    """The next forward for the `active` rows (their numbers); `powers_of_two` rounds its shapes up."""
    prefilling = rows.start_R[active] < rows.prefill_R[active]
    autoregressive = rows.autoregressive_R[active]
    denoise = active[~(prefilling | autoregressive)]
    single = active[autoregressive & ~prefilling]
    prefill = prefill_end = commit = whole = part = active[:0]
    work = []
    if len(denoise):
        blocks, commit_n, whole_n = _denoise(rows, denoise)
        commit, whole, part = denoise[commit_n], denoise[whole_n & ~commit_n], denoise[~whole_n]
        work.append(blocks)
    if len(single):
        work.append(_one_token(rows, single))
    if prefilling.any():
        # where many rows decode, as many prompt tokens beside them: else new requests would wait while rows run empty
        decoding = sum(int(kind.width_n.sum()) for kind in work)
        prefill, width = _choose_prefills(rows, active[prefilling], max(prefill_chunk, decoding))
        prefill_end = np.minimum(rows.start_R[prefill] + width, rows.prefill_R[prefill])
        work.append(_prefill(rows, prefill, width))
    grouped = _group(rows, work, powers_of_two)
    return Plan(*grouped, prefill, prefill_end, commit, whole, part, single)


def _choose_prefills(rows: EngineRows, waiting: np.ndarray, chunk: int) -> tuple[np.ndarray, int]:
    """Which rows prefill now, and how many tokens each: the earliest first, and others of which as much is left."""
    D = rows.block_size
    waiting = waiting[rows.order_R[waiting].argsort()]
    left = -(-(rows.prefill_R[waiting] - rows.start_R[waiting]) // D) * D
    budget = max(D, chunk // D * D)
    width = min(int(left[0]), budget)
    return waiting[left >= width][: budget // width], width


def _prefill(rows: EngineRows, chosen: np.ndarray, width: int) -> _Work:
    """A chunk of the prompt of each chosen row; the last one gives an answer's first token, if it begins a block."""
    first_n = rows.start_R[chosen]
    last = rows.prompt_R[chosen] - 1  # predicts the first token of the answer
    asks = (last < first_n + width) & (rows.prefill_R[chosen] == rows.prompt_R[chosen])
    piece_m = asks.nonzero()[0]
    target_m = rows.prompt_R[chosen][asks]
    query_m = (last - first_n)[asks]
    return _Work(chosen, first_n, np.full_like(chosen, width), piece_m, query_m, target_m, np.zeros_like(piece_m))


def _denoise(rows: EngineRows, chosen: np.ndarray) -> tuple[_Work, np.ndarray, np.ndarray]:
    """Every row's current sub-block, alone or in its whole block, or a commit; which `[n]` commit, which run whole."""
    D = rows.block_size
    start_n, sub_size_n = rows.start_R[chosen], rows.sub_block_R[chosen]
    masked_nD = rows.masked_window(chosen)
    commit_n = np.logical_not(masked_nD.any(1))
    first_n = masked_nD.argmax(1)  # the first masked position; sub-blocks are revealed left to right
    sub_n = first_n // sub_size_n * sub_size_n  # where its sub-block begins
    # the token shift takes the prediction of a sub-block's first position from outside it
    whole_n: np.ndarray = commit_n | ~rows.written_R[chosen] | (sub_n == first_n) | ~rows.sub_block_cache_R[chosen]

    offset_n = np.where(whole_n, 0, sub_n)
    place_D = np.arange(D)
    wanted_nD = masked_nD & (place_D < (sub_n + sub_size_n)[:, None])
    wanted_nD[commit_n, 0] = True  # a committing row asks its last position for the next block's first token
    piece_m, place_m = wanted_nD.nonzero()
    commit_m = commit_n[piece_m]
    query_m = np.where(commit_m, D - 1, np.maximum(place_m - 1 - offset_n[piece_m], 0))
    target_m = start_n[piece_m] + np.where(commit_m, D, place_m)
    column_m = np.where(commit_m, 0, place_m - sub_n[piece_m])
    work = _Work(
        chosen, start_n + offset_n, np.where(whole_n, D, sub_size_n), piece_m, query_m, target_m, column_m
    )  # fmt: skip
    return work, commit_n, whole_n


def _one_token(rows: EngineRows, chosen: np.ndarray) -> _Work:
    """The latest token of every row, which predicts the next."""
    position_n, number_n = rows.start_R[chosen], np.arange(len(chosen))
    nothing = np.zeros_like(chosen)
    return _Work(chosen, position_n, nothing + 1, number_n, nothing, position_n + 1, nothing)


def _group(
    rows: EngineRows, kinds: list[_Work], powers_of_two: bool
) -> tuple[list[Group], np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pieces of one width and similar context together; then where every prediction's query lies among all T."""
    work = _join(kinds)
    rows_n, first_n, width_n = work.rows_n, work.first_n, work.width_n
    pages_n = (first_n + width_n - 1) // rows.block_size + 1
    key_n = width_n
    if pages_n.max() > FEW_PAGES:
        key_n = width_n << 32 | 4 ** np.ceil(np.log2(np.maximum(pages_n, FEW_PAGES)) / 2).astype(np.int64)
    alike = (key_n == key_n[0]).all()
    groups, base_n, base = [], np.zeros_like(rows_n), 0
    for key in key_n[:1] if alike else np.unique(key_n):
        these = (key_n == key).nonzero()[0]
        width, pages = int(width_n[these[0]]), int(pages_n[these].max())
        base_n[these] = base + width * np.arange(len(these))
        members, first = rows_n[these], first_n[these]
        if powers_of_two:
            pages = min(_power_of_two(pages), rows.table_RP.shape[1])
            spare = _power_of_two(len(these)) - len(these)
            members = np.append(members, np.full(spare, rows.spare))
            first = np.append(first, np.zeros(spare, dtype=np.int64))
        groups.append(Group(members, first, width, pages))
        base += width * len(members)

    piece_m = work.piece_m
    begins_m = np.ones(len(piece_m), dtype=bool)  # a piece's predictions stand together
    begins_m[1:] = piece_m[1:] != piece_m[:-1]
    owner_m = begins_m.cumsum() - 1
    return groups, rows_n[piece_m[begins_m]], owner_m, work.column_m, work.target_m, base_n[piece_m] + work.query_m


def _join(kinds: list[_Work]) -> _Work:
    """The pieces of all kinds, numbered through."""
    if len(kinds) == 1:
        return kinds[0]
    before = 0
    for kind in kinds:
        kind.piece_m = kind.piece_m + before
        before += len(kind.rows_n)
    return _Work(*(np.concatenate([getattr(kind, f.name) for kind in kinds]) for f in fields(_Work)))


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
