"""uvicorn in a thread of its own: who starts it keeps the main thread and its signals, and hears when it ends."""

import ipaddress
import socket
import threading
import time
import warnings

import uvicorn
from fastapi import FastAPI

POLL = 0.01  # seconds between looks at a server that starts


class Listener:
    """A server over a socket that listens already.

    Raises:
        OSError: it did not start; the message says why.
    """

    def __init__(self, app: FastAPI, listening: socket.socket) -> None:
        self.error: BaseException | None = None  # what ended it
        self._server = uvicorn.Server(
            uvicorn.Config(
                app, log_level="warning", access_log=False, timeout_graceful_shutdown=5, lifespan="off",
                server_header=False,
            )
        )  # fmt: skip
        self._thread = threading.Thread(target=self._run, args=(listening,), name="parablock-http", daemon=True)
        self._thread.start()
        while not self._server.started and self.alive:
            time.sleep(POLL)
        if not self.alive:
            raise OSError(f"the HTTP server did not start ({self.error or 'it gave no reason'})")

    def _run(self, listening: socket.socket) -> None:
        try:
            self._server.run(sockets=[listening])
        except BaseException as error:
            self.error = error

    @property
    def alive(self) -> bool:
        """It has not ended."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Take no connections any more, end those there are, and return."""
        self._server.should_exit = True
        self._thread.join()


def warn_if_open(address: str, *, asks: bool) -> None:
    """A warning where other machines reach an address (of a bound socket) and it does not ask for a key."""
    if not asks and not ipaddress.ip_address(address).is_loopback:
        warnings.warn(
            f"{address} can be reached from other machines, and everybody there may ask: set PARABLOCK_API_KEY, "
            "or use --host 127.0.0.1",
            stacklevel=2,
        )
