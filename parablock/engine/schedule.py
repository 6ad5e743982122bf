"""What the next forward runs: every row's next piece of work, in few groups of equal shape.

Shapes: n rows of a group, W its width (queries per row), M predictions of the whole forward, P pages, D block size.

Pieces of one width form a group, and all groups run in one forward, so rows in prefill, denoising and commit, of
whatever mode, share it.
"""

from dataclasses import dataclass

import numpy as np

from parablock.decoding.decoder import next_work
from parablock.decoding.rows import Rows
from parablock.decoding.scoring import also_score, score, scoring
from parablock.decoding.work import Placed, Work, join, prefill

MOST_SCORED = 256  # tokens of prompts that a forward predicts, each with logits over the vocabulary
FEW_PAGES = 16  # contexts up to so many pages share a group; longer ones go with their like, by powers of 4


@dataclass(frozen=True)
class Group:
    """Rows that run `width` tokens each, from position `first_n` on; `pages` of their K/V are looked at.

    `placed`: of all these tokens `[n, W]`, where they do not stand one behind the other.
    """

    rows_n: np.ndarray
    first_n: np.ndarray
    grain_n: np.ndarray
    width: int
    pages: int
    placed: Placed | None = None


@dataclass(frozen=True)
class Plan:
    """One forward: its works, laid out in groups; query `source_M` (of all groups' queries) makes prediction M."""

    works: list[Work]
    groups: list[Group]
    source_M: np.ndarray

    @property
    def tokens(self) -> int:
        """How many tokens the forward runs over."""
        return sum(len(group.rows_n) * group.width for group in self.groups)

    @property
    def rows(self) -> np.ndarray:
        """The rows that take part."""
        return join([work.rows_n for work in self.works])


def plan(rows: Rows, active: np.ndarray, prefill_chunk: int, powers_of_two: bool = False) -> Plan:
    """The next forward for the `active` rows (their numbers); `powers_of_two` rounds its shapes up."""
    scores = scoring(rows, active)
    prefilling = ~scores & (rows.start_R[active] < rows.prefill_R[active])
    left = int((rows.prefill_R - rows.start_R)[active[prefilling]].sum())
    works = next_work(rows, active[~prefilling & ~scores], beside=min(left, prefill_chunk))
    if prefilling.any():
        # where many rows decode, as many prompt tokens beside them: else new requests would wait while rows run empty
        decoding = sum(work.tokens for work in works)
        waiting, chunk = active[prefilling], max(prefill_chunk, decoding)
        if (rows.scored_R[waiting] < rows.prompt_R[waiting]).any():
            chunk = min(chunk, MOST_SCORED)
        chosen, width = _choose_prefills(rows, waiting, chunk)
        works.append(also_score(rows, prefill(rows, chosen, np.full_like(chosen, width))))
    if scores.any():
        works.append(score(rows, active[scores]))
    return _group(rows, works, powers_of_two)


def _choose_prefills(rows: Rows, waiting: np.ndarray, chunk: int) -> tuple[np.ndarray, int]:
    """Which rows prefill now, and how many tokens each: the earliest first, and others of which as much is left."""
    D = rows.block_size
    waiting = waiting[rows.order_R[waiting].argsort()]
    left = -(-(rows.prefill_R[waiting] - rows.start_R[waiting]) // D) * D
    budget = max(D, chunk // D * D)
    width = min(int(left[0]), budget)
    return waiting[left >= width][: budget // width], width


def _group(rows: Rows, works: list[Work], powers_of_two: bool) -> Plan:
    """Pieces of one width and similar context together; then where every prediction's query lies among all of them."""
    rows_n, first_n = join([work.rows_n for work in works]), join([work.first_n for work in works])
    width_n, grain_n = join([work.width_n for work in works]), join([work.grain_n for work in works])
    pages_n = (first_n + width_n - 1) // rows.block_size + 1
    key_n, placed, begin_n = width_n, None, None
    if any(work.placed for work in works):
        placed, begin_n = _placed(works)
        key_n = key_n << 1 | (begin_n >= 0)
    if pages_n.max() > FEW_PAGES:
        key_n = key_n << 32 | 4 ** np.ceil(np.log2(np.maximum(pages_n, FEW_PAGES)) / 2).astype(np.int64)
    alike = (key_n == key_n[0]).all()
    groups, base_n, base = [], np.zeros_like(rows_n), 0
    for key in key_n[:1] if alike else np.unique(key_n):
        these = (key_n == key).nonzero()[0]
        width, pages = int(width_n[these[0]]), int(pages_n[these].max())
        base_n[these] = base + width * np.arange(len(these))
        members_n, first, grain, own = rows_n[these], first_n[these], grain_n[these], None
        if placed is not None and begin_n is not None and begin_n[these[0]] >= 0:
            own = placed[begin_n[these, None] + np.arange(width)]
        if powers_of_two:
            pages = min(_power_of_two(pages), rows.ids_RC.shape[1] // rows.block_size)
            more = _power_of_two(len(these)) - len(these)
            spare = len(rows.active_R) - 1  # a row that no request has; all its K/V lie in page 0
            members_n, first, grain = (
                np.pad(members_n, (0, more), constant_values=spare),
                np.pad(first, (0, more)),
                np.pad(grain, (0, more), constant_values=rows.block_size),
            )
            if own is not None:  # padding sees one slot: nothing at all would be no number
                own = Placed(
                    *(np.pad(x, ((0, more), (0, 0)), constant_values=x is own.limit_q) for x in vars(own).values())
                )
        groups.append(Group(members_n, first, grain, width, pages, own))
        base += width * len(members_n)

    source, before = [], 0
    for work in works:
        source.append(base_n[before + work.piece_m] + work.query_m)
        before += len(work.rows_n)
    return Plan(works, groups, join(source))


def _placed(works: list[Work]) -> tuple[Placed, np.ndarray]:
    """The placed queries of all works, and where among them each piece's begin `[n]`; -1: it has none."""
    parts, begins, base = [], [], 0
    for work in works:
        if work.placed is None:
            begins.append(np.full_like(work.rows_n, -1))
        else:
            parts.append(work.placed)
            begins.append(base + work.width_n.cumsum() - work.width_n)
            base += work.tokens
    fields = zip(*(vars(part).values() for part in parts), strict=True)
    return Placed(*(join(list(field)) for field in fields)), join(begins)


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
