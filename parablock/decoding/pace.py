"""How long a forward takes, learned while running: what decides how much is drafted."""

import math
from collections import deque

import numpy as np

FLAT = 32  # until it is measured: a forward of so many tokens takes twice as long as one of a single token
RECENT = 15  # forwards of a kind that count: their median, so that a slow one changes nothing
LIFETIME = 512  # forwards after which a kind that was not run meanwhile is as good as unknown


class Pace:
    """Seconds of a forward, by those that were run lately.

    Forwards are of one kind if as many rows may draft, some do or none does, and as many tokens run, to the nearest
    powers of two. What is kept is the ratio of their time to `tokens + FLAT`; between and beyond the sizes that were
    run it is taken from those.
    """

    def __init__(self) -> None:
        self.padded = 0  # so many rows run together, all as wide as the widest; 0: every row its own width
        self.chance = 0.5  # that a guess is right, as it was lately in all rows
        self.pause = 0  # forwards until guesses are looked for again
        self._forwards = 0
        self._recent: dict[tuple[int, bool, int], deque[float]] = {}
        self._latest: dict[tuple[int, bool, int], int] = {}
        self.plan(0)

    def plan(self, beside: int) -> None:
        """A forward is being planned that runs about so many tokens beside the rows that may draft."""
        self.beside = beside
        self.rows = 0  # that may draft
        self.drafts = False  # whether some do

    def note(self, tokens: int, seconds: float) -> None:
        """What was planned has run so many tokens in so many seconds."""
        if self.rows:
            self._forwards += 1
            kind = round(math.log2(self.rows)), self.drafts, round(math.log2(tokens))
            if kind not in self._recent:
                self._recent[kind] = deque(maxlen=RECENT)
            self._recent[kind].append(seconds / (tokens + FLAT))
            self._latest[kind] = self._forwards

    def seconds(self, tokens: np.ndarray, drafts: bool) -> np.ndarray:
        """How long the planned forward takes with so many tokens in all."""
        seconds: np.ndarray = np.interp(np.log2(tokens), *self._ratios(drafts)) * (tokens + FLAT)
        return seconds

    def _ratios(self, drafts: bool) -> tuple[list[int], list[float]]:
        """Sizes and their ratios, of the likest kinds that were run lately."""
        lately = sorted(kind for kind, latest in self._latest.items() if latest > self._forwards - LIFETIME)
        alike = [kind for kind in lately if kind[0] == round(math.log2(self.rows))]
        kinds = [kind for kind in alike if kind[1] == drafts] or alike or lately
        ratios: dict[int, list[float]] = {}
        for kind in kinds:
            ratios.setdefault(kind[2], []).extend(self._recent[kind])
        sizes = sorted(ratios)
        return (sizes, [sorted(ratios[size])[len(ratios[size]) // 2] for size in sizes]) if sizes else ([0], [1.0])
