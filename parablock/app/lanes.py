"""Answers being watched: one, or two that race; their events are kept so that the page can play them again."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from parablock.app.client import Client, ServerError

PAUSE = 0.06  # seconds between two views of a running answer, so that showing it takes little from decoding it
OVERLAP = 20  # views that carry an event, in case the browser skips some of them


class Lane:
    """One answer: what was asked for and all that came so far."""

    def __init__(self, title: str, body: dict[str, Any]) -> None:
        self.title = title
        self.body = body
        self.text = ""
        self.tokens: int | None = None  # of the whole answer, once it is known
        self.figures: dict[str, Any] | None = None
        self.error: str | None = None
        self.done = False
        self._events: list[dict[str, Any]] = []
        self._shown: dict[int, list[Any]] = {}  # position -> what stands there
        self._counts = deque([0], maxlen=OVERLAP)  # events there were at the last views
        self._accepted = 0  # drafts so far

    def take(self, chunk: dict[str, Any], seconds: float) -> None:
        """A chunk of the stream, `seconds` after the question."""
        step = chunk.get("denoising")
        if step is not None:
            drafts = self._drafts(step) if "drafts" in step else {}
            tokens, left = [], drafts.pop("right", 0)
            for at, token in enumerate(step["tokens"], step["start"]):
                new = [token["text"], token["masked"], token["confidence"]]
                if at not in self._shown or token["revealed"] or self._shown[at][:2] != new[:2]:
                    self._shown[at] = new
                    right = token["revealed"] and left > 0  # the first tokens of a step are drafts that were right
                    left -= right
                    tokens.append([at, *new, *([right] if drafts else [])])
            self._events.append({"t": round(seconds, 5), "f": step["forward"], "tokens": tokens, **drafts})
        for choice in chunk["choices"]:
            self.text += choice["delta"].get("content") or ""
        self.figures = chunk.get("parablock") or self.figures
        if chunk.get("usage"):
            self.tokens = chunk["usage"]["completion_tokens"]

    def advise(self, *, system: bool, earlier: bool) -> None:
        """Say with an error what may help: whether a system message and earlier turns went along."""
        if self.error and system and "chat template refuses" in self.error:
            self.error += " The model may know no system messages: empty the field 'System message'."
        if self.error and earlier:
            self.error += " Earlier turns went along; 'New chat' forgets them."

    def _drafts(self, step: dict[str, Any]) -> dict[str, Any]:
        """Of a step that verified drafts: those that wait, those it refused, both counts, how many it found right."""
        counts = [sum(step[name].values()) for name in ("drafted", "accepted")]
        right, self._accepted = counts[1] - self._accepted, counts[1]
        return {"drafts": step["drafts"], "refused": step["refused"], "counts": counts, "right": right}

    def view(self, *, whole: bool) -> dict[str, Any]:
        """What the stage shows. While an answer grows, only its latest events, the first of them number `since`."""
        since = 0 if whole else self._counts[0]
        self._counts.append(len(self._events))
        return {
            "title": self.title,
            "serial": self.body["mode"] != "diffusion",  # tokens come one behind the other
            "speculative": self.body["mode"] == "speculative",
            "since": since,
            "events": self._events[since:],
            "tokens": self.tokens,
            "figures": self.figures,
            "error": self.error,
            "done": self.done,
            "text": self.text if whole else "",
        }


async def run(client: Client, lanes: Sequence[Lane], stopped: Callable[[], bool]) -> AsyncIterator[None]:
    """Fill all lanes at once; yields when there is something new to show, until all are done or `stopped()`."""
    changed = asyncio.Event()
    started = time.perf_counter()

    async def fill(lane: Lane) -> None:
        try:
            async for chunk in client.chat(lane.body):
                lane.take(chunk, time.perf_counter() - started)
                changed.set()
            lane.done = True
        except ServerError as error:
            lane.error = str(error)
        finally:
            changed.set()

    tasks = [asyncio.create_task(fill(lane)) for lane in lanes]
    try:
        while not all(task.done() for task in tasks) and not stopped():
            try:
                async with asyncio.timeout(PAUSE):
                    await changed.wait()
            except TimeoutError:
                continue
            changed.clear()
            yield
            await asyncio.sleep(PAUSE)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def verdict(lanes: Sequence[Lane]) -> dict[str, Any] | None:
    """Who won, and how many times faster; None unless two answers are whole.

    Of a speculative and an autoregressive answer, which have to be equal, whether they are.
    """
    if len(lanes) != 2 or not all(lane.done and lane.figures for lane in lanes):
        return None
    spent = [lane.figures["seconds"] if lane.figures else 0.0 for lane in lanes]
    first = spent.index(min(spent))
    return {
        "fast": lanes[first].title,
        "slow": lanes[1 - first].title,
        "times": max(spent) / max(min(spent), 1e-9),
        "seconds": spent,
        "texts": compared(lanes[0].text, lanes[1].text) if lanes[0].body["mode"] == "speculative" else None,
    }


def compared(one: str, other: str) -> dict[str, Any]:
    """Whether two texts are equal, in words."""
    if one == other:
        return {"equal": True, "words": "The two answers are identical, character for character."}
    at = next(
        (i for i, pair in enumerate(zip(one, other, strict=False)) if len({*pair}) > 1), min(len(one), len(other))
    )
    shown = [repr(text[at : at + 12]) if text[at:] else "the end" for text in (one, other)]
    return {"equal": False, "words": f"The answers differ from character {at + 1} on: {shown[0]} against {shown[1]}."}
