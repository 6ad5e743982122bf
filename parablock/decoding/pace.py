"""How long a forward takes, learned while running, and how much is worth drafting then.

Shapes: n rows, k of them that could draft, W widths.
"""

import math
from collections import deque

import numpy as np

from parablock.diffusion.config import MOST_MASKS

WIDTHS_W1 = np.array([[2], [4], [8], [16], [32]])  # with the token before the drafts; few, so that pieces stay alike
SURE, MANY, SURER = 1.1, 16, 1.3  # so much faster must drafting seem, of many rows more: what is known is not exact
FLAT = 32  # until it is measured: a forward of so many tokens takes twice as long as one of a single token
RECENT = 15  # forwards of a kind that count: their median, so that a slow one changes nothing
HOPE = 0.6  # that a mask's draft is right, until it is measured
PAUSES = 4, 16  # forwards in which drafts are not thought of after one in which none paid: the more, the more rows
REGRET = 16  # times as many after one in which they did
LEAST, MOST = 0.01, 0.9  # what remains of a token that is still to be verified
LIFETIME = 4096  # forwards after which a kind that was not run meanwhile is as good as unknown


class Pace:
    """Seconds of a forward, by those that were run lately.

    Forwards are of one kind if as many rows may draft, some do or none does, and as many tokens run, to the nearest
    powers of two. What is kept is the ratio of their time to `tokens + FLAT`; between and beyond the sizes that were
    run it is taken from those.
    """

    def __init__(self) -> None:
        self.padded = 0  # so many rows run together, all as wide as the widest; 0: every row its own width
        self.chance = 0.5  # that what is looked up is right, as it was lately in all rows
        self.hope = HOPE ** np.arange(1, MOST_MASKS + 1)  # that the drafts of so many masks are right, the same
        self._pause = 0  # forwards until drafts are thought of again
        self._busy = 0  # rows when drafts did not pay
        self._drafted = False  # some drafted in the forward before
        self._forwards = 0
        self._recent: dict[tuple[int, bool, int], deque[float]] = {}
        self._latest: dict[tuple[int, bool, int], int] = {}
        self.plan(0)

    def plan(self, beside: int) -> None:
        """A forward is being planned that runs about so many tokens beside the rows that may draft."""
        self.beside = beside
        self.rows = 0  # that may draft
        self.drafts = False  # whether some do

    def rests(self, rows: int) -> bool:
        """Whether drafts of so many rows are not worth a thought now: they did not pay a few forwards ago."""
        if self._pause and 2 * rows > self._busy:
            self._pause -= 1
            return True
        return False

    def decided(self, rows: int, drafts: bool) -> None:
        """Some of so many rows draft in this forward, or none does."""
        self.drafts = drafts
        least, most = PAUSES
        # drafts that are not even verified were a mistake, where there are many rows: not soon again
        again = REGRET if self._drafted and rows >= most else 1
        self._pause, self._busy = 0 if drafts else again * min(max(least, rows), most), rows
        self._drafted = drafts

    def note(self, tokens: int, seconds: float) -> None:
        """What was planned has run so many tokens in so many seconds."""
        if self.rows:
            self._forwards += 1
            kind = round(math.log2(self.rows)), self.drafts, round(math.log2(tokens))
            if kind not in self._recent:
                self._recent[kind] = deque(maxlen=RECENT)
            self._recent[kind].append(seconds / (tokens + FLAT))
            self._latest[kind] = self._forwards

    def later(self) -> float:
        """What remains of a token that must still be verified: less, the more a forward takes for a token more.

        That is told by forwards of four tokens per row, beside those of one, in which a token is made for sure.
        """
        tokens = self.padded or self.rows
        alone, plain = self.seconds(np.array([tokens, tokens + self.beside]), drafts=False)
        (drafting,) = self.seconds(np.array([4 * tokens + self.beside]), drafts=True)
        return float(np.clip(1 - (drafting - plain) / (3 * alone), LEAST, MOST))

    def seconds(self, tokens: np.ndarray, drafts: bool) -> np.ndarray:
        """How long the planned forward takes with so many tokens in all."""
        seconds: np.ndarray = np.interp(np.log2(tokens), *self._ratios(drafts)) * (tokens + FLAT)
        return seconds

    def _ratios(self, drafts: bool) -> tuple[list[int], list[float]]:
        """Sizes and their ratios, of the likest kinds that were run lately."""
        lately = sorted(kind for kind, latest in self._latest.items() if latest > self._forwards - LIFETIME)
        alike = [kind for kind in lately if kind[0] == round(math.log2(self.rows))]
        same = [kind for kind in lately if kind[1] == drafts]
        kinds = [kind for kind in alike if kind[1] == drafts] or (same if drafts else alike) or alike or lately
        ratios: dict[int, list[float]] = {}
        for kind in kinds:
            ratios.setdefault(kind[2], []).extend(self._recent[kind])
        sizes = sorted(ratios)
        return (sizes, [sorted(ratios[size])[len(ratios[size]) // 2] for size in sizes]) if sizes else ([0], [1.0])


def choose_widths(
    pace: Pace, width_n: np.ndarray, value_kC: np.ndarray, most_k: np.ndarray, counted: float = 0.0
) -> np.ndarray:
    """How many tokens each of some rows runs, so that the forward makes the most tokens per second.

    `width_n`: how many every row runs if these draft nothing. `value_kC`: what one more token of a row makes in the
    mean, and one more ..., falling; `most_k`: how many it may run at most; `counted`: of all that, what earlier
    forwards were already credited with. All that draft have one width, if they can: the rows that gain the most by it,
    as many as pay. What runs beside is worth the time it takes.
    """
    width_k = np.ones_like(most_k)
    sure = SURE if len(width_n) < MANY else SURER
    if value_kC.sum() <= (sure - 1) * len(width_n):  # not even for nothing
        return width_k
    gain_kC = value_kC.cumsum(1)
    more_Wk = np.minimum(WIDTHS_W1 - 1, most_k)
    gain_Wk = gain_kC[np.arange(len(most_k)), more_Wk - 1]
    order_Wk = np.argsort(-gain_Wk, axis=1, kind="stable")
    tokens, rows_k = pace.padded or int(width_n.sum()), np.arange(1, len(most_k) + 1)
    plain, whole = pace.seconds(np.array([tokens, tokens + pace.beside]), drafts=False)
    worth = len(width_n) * whole / plain
    tokens_Wk = tokens + pace.beside + (WIDTHS_W1 - 1) * (pace.padded or rows_k)
    made_Wk = worth - counted + np.take_along_axis(gain_Wk, order_Wk, 1).cumsum(1)
    seconds_Wk = np.maximum(pace.seconds(tokens_Wk, drafts=True), whole)  # drafts make no forward shorter
    rate_Wk = made_Wk / np.maximum.accumulate(seconds_Wk, axis=1)
    best, last = np.unravel_index(rate_Wk.argmax(), rate_Wk.shape)
    if rate_Wk[best, last] > sure * worth / whole:
        drafting = order_Wk[best, : last + 1]
        width_k[drafting] = 1 + more_Wk[best, drafting]
    return width_k
