"""Requests that come while others run, and are cancelled now and then: for tests, and for `lossless.py`."""

from collections.abc import Iterable

import parablock as pb

Arrival = tuple[pb.Request, int, int | None]  # steps until the next one comes; steps until it is cancelled


def run_arriving(engine: pb.Engine, arrivals: Iterable[Arrival]) -> list[pb.Handle]:
    """Submit the requests as they come and run the engine until nothing is left; their handles, in order."""
    running: list[tuple[pb.Handle, int | None, int]] = []
    for request, pause, patience in arrivals:
        running.append((engine.submit(request), patience, engine.steps))
        for _ in range(pause):
            engine.step()
            for handle, steps, began in running:
                if steps is not None and engine.steps - began >= steps:
                    handle.cancel()
    while engine.step():
        pass
    return [handle for handle, _, _ in running]
