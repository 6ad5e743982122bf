"""Which replicas have the K/V of a request's beginning, as far as one can tell from what they were sent."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

PIECE = 128  # characters that are known or unknown together
LEAST = 64  # characters; K/V are reused in whole blocks of 32 tokens, so less than that is not worth a way
LONGEST = 100_000  # characters of a beginning that are looked at
KEPT = 100_000  # pieces that are remembered


def beginning(body: bytes) -> tuple[str, ...]:
    """The texts that a request's prompt begins with, in their order; nothing where the body is not understood."""
    try:
        asked = json.loads(body)
    except ValueError:
        return ()
    if not isinstance(asked, dict):
        return ()
    model = str(asked.get("model", ""))
    if isinstance(messages := asked.get("messages"), list):
        return (model, *(json.dumps(message, sort_keys=True, ensure_ascii=False) for message in messages))
    if "input" in asked:
        given = asked["input"]
        items = given if isinstance(given, list) else [given]
        first = [asked["instructions"]] if asked.get("instructions") else []
        return (model, *(json.dumps(item, sort_keys=True, ensure_ascii=False) for item in [*first, *items]))
    prompt = asked.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, list):
        prompt = " ".join(map(str, prompt))
    return (model, prompt) if isinstance(prompt, str) else ()


def pieces(texts: Sequence[str]) -> Iterator[tuple[bytes, int]]:
    """A hash of everything up to the end of each piece, and how many characters that are.

    A text ends a piece, so that the turns of a chat share all pieces of the earlier turns.
    """
    digest, length = hashlib.blake2b(digest_size=16), 0
    for text in texts:
        for start in range(0, len(text), PIECE):
            piece = text[start : start + PIECE]
            length += len(piece)
            if length > LONGEST:
                return
            digest.update(piece.encode("utf-8", "surrogatepass"))
            yield digest.digest(), length
        digest.update(b"\0")


class Prefixes:
    """Remembers which replicas have seen which beginnings; the ones not asked for longest are forgotten first.

    Args:
        slack: how many more requests than the least busy one a replica may have before its K/V are passed over.
    """

    def __init__(self, slack: int, kept: int = KEPT) -> None:
        self._slack = slack
        self._kept = kept
        self._seen: OrderedDict[bytes, set[str]] = OrderedDict()
        self._given: dict[str, int] = {}  # requests so far, which settles a draw

    def choose(self, texts: Sequence[str], loads: Mapping[str, int]) -> str:
        """A replica for a request that begins so; `loads`: the requests that each replica has in flight."""
        least = min(loads.values())
        near = [name for name, load in loads.items() if load - least <= self._slack]
        known = self._longest(texts, near)
        return min(known or near, key=lambda name: (loads[name], self._given.get(name, 0), name))

    def _longest(self, texts: Sequence[str], names: Sequence[str]) -> set[str]:
        """Those that have the longest part of the beginning."""
        best: set[str] = set()
        for piece, length in pieces(texts):
            have = self._seen.get(piece, set()).intersection(names)
            if not have:
                break
            best = have if length >= LEAST else best
        return best

    def sent(self, texts: Sequence[str], name: str) -> None:
        """This replica got a request that begins so."""
        self._given[name] = self._given.get(name, 0) + 1
        for piece, _ in pieces(texts):
            self._seen.setdefault(piece, set()).add(name)
            self._seen.move_to_end(piece)
        while len(self._seen) > self._kept:
            self._seen.popitem(last=False)

    def keep(self, names: Sequence[str]) -> None:
        """Only these replicas are left; a new one starts where the others are, so that it is not flooded."""
        least = min((count for name, count in self._given.items() if name in names), default=0)
        self._given = {name: self._given.get(name, least) for name in names}
        for piece in list(self._seen):
            self._seen[piece].intersection_update(names)
            if not self._seen[piece]:
                del self._seen[piece]
