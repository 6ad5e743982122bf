"""Answers being watched: one, or two that race; their events are kept so that the page can play them again."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from parablock.app.client import Client, ServerError

PAUSE = 0.06  # seconds between two views of a running answer, so that showing it takes little from decoding it


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

    def take(self, chunk: dict[str, Any], seconds: float) -> None:
        """A chunk of the stream, `seconds` after the question."""
        step = chunk.get("denoising")
        if step is not None:
            tokens = [[t["text"], t["masked"], t["revealed"], t["confidence"]] for t in step["tokens"]]
            self._events.append({"t": round(seconds, 5), "f": step["forward"], "s": step["start"], "tokens": tokens})
        for choice in chunk["choices"]:
            self.text += choice["delta"].get("content") or ""
        self.figures = chunk.get("parablock") or self.figures
        if chunk.get("usage"):
            self.tokens = chunk["usage"]["completion_tokens"]

    def view(self) -> dict[str, Any]:
        """What the stage shows; it stays as it is when more comes."""
        return {
            "title": self.title,
            "serial": self.body.get("mode") == "autoregressive",
            "events": list(self._events),
            "text": self.text,
            "tokens": self.tokens,
            "figures": self.figures,
            "error": self.error,
            "done": self.done,
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
    """Who won, and how many times faster; None unless two answers are whole."""
    if len(lanes) != 2 or not all(lane.done and lane.figures for lane in lanes):
        return None
    spent = [lane.figures["seconds"] if lane.figures else 0.0 for lane in lanes]
    first = spent.index(min(spent))
    return {
        "fast": lanes[first].title,
        "slow": lanes[1 - first].title,
        "times": max(spent) / max(min(spent), 1e-9),
        "seconds": spent,
    }
