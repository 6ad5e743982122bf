"""How much a key may ask for per minute: buckets that fill steadily, and what OpenAI's headers tell of them."""

import math
import time
from collections.abc import Callable
from typing import Any

from parablock.server.errors import ApiError
from parablock.server.keys import Key

Clock = Callable[[], float]


class Bucket:
    """Full with what a minute allows, and filled again within a minute; what was taken too much is a debt."""

    def __init__(self, most: int, clock: Clock) -> None:
        self.most = most
        self._clock = clock
        self._level, self._at = float(most), clock()

    @property
    def level(self) -> float:
        """What is there."""
        now = self._clock()
        self._level = min(self.most, self._level + (now - self._at) * self.most / 60)
        self._at = now
        return self._level

    def take(self, amount: int) -> None:
        """Take so much, whether it is there or not; a negative amount goes back."""
        self._level = self.level - amount

    def wait(self, amount: int) -> float:
        """Seconds until so much is there."""
        return max(0.0, (amount - self.level) * 60 / self.most)


class Limits:
    """What is left of a key's minute. `refused` is told which limit a request has met."""

    def __init__(self, key: Key, refused: Callable[[str], None], clock: Clock = time.monotonic) -> None:
        self.key = key
        self.refused = refused
        most = {"requests": key.requests_per_minute, "tokens": key.tokens_per_minute}
        self.buckets = {kind: Bucket(count, clock) for kind, count in most.items() if count is not None}

    def headers(self) -> dict[str, str]:
        """As OpenAI names and writes them."""
        told = {}
        for kind, bucket in self.buckets.items():
            told[f"x-ratelimit-limit-{kind}"] = str(bucket.most)
            told[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(bucket.level)))
            told[f"x-ratelimit-reset-{kind}"] = duration(bucket.wait(bucket.most))
        return told


class Spending:
    """What one request takes: itself when it comes, its prompt when that is known, its answer when it ends."""

    def __init__(self, limits: Limits, line: dict[str, Any]) -> None:
        self.limits = limits
        self._line = line
        self._reserved = 0

    def begin(self) -> None:
        """The request has come.

        Raises:
            ApiError: it is one too many, or the tokens of the minute are used up.
        """
        self._require("requests", 1)
        self._require("tokens", 1)
        self._take("requests", 1)

    def reserve(self, tokens: int) -> None:
        """Its prompt has so many tokens. ApiError if they are not there."""
        self._require("tokens", tokens)
        self._take("tokens", tokens)
        self._reserved = tokens

    def settle(self) -> None:
        """Take what was used so far, in place of what was reserved; the log's line knows it."""
        used = self._line.get("prompt_tokens", 0) + self._line.get("tokens", 0)
        self._take("tokens", used - self._reserved)
        self._reserved = used

    def _take(self, kind: str, amount: int) -> None:
        if bucket := self.limits.buckets.get(kind):
            bucket.take(amount)

    def _require(self, kind: str, amount: int) -> None:
        bucket = self.limits.buckets.get(kind)
        if bucket is None or not (seconds := math.ceil(bucket.wait(amount))):
            return
        self.limits.refused(kind)
        self._line["refused"] = f"{kind} per minute"
        limit = f"the key {self.limits.key.name!r} may use {bucket.most} {kind} per minute"
        if amount > bucket.most:  # OpenAI's clients do not try again when they are told not to
            text, headers = f"{limit}, and this prompt has {amount}; shorten it", {"x-should-retry": "false"}
        else:
            text, headers = f"{limit}; try again in {seconds} s", {"Retry-After": str(seconds)}
        raise ApiError(429, text, code="rate_limit_exceeded", headers=headers)


def duration(seconds: float) -> str:
    """As OpenAI's headers have it: `20ms`, `1.5s`, `6m0s`."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, milliseconds = divmod(milliseconds, 60_000)
    text = f"{milliseconds / 1000:g}s"
    return f"{minutes}m{text}" if minutes else text
