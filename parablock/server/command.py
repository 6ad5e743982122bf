"""`parablock serve`: load, listen, and stop in good order."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from types import FrameType

import uvicorn
from fastapi import FastAPI

from parablock.engine.config import EngineConfig
from parablock.server.app import State, create_app
from parablock.server.config import ServeConfig
from parablock.server.served import load_models

POLL = 0.1  # seconds between looks at what still runs


class _Server(uvicorn.Server):
    """uvicorn, but the first signal only stops taking requests; the socket closes when the running ones have ended."""

    def __init__(self, config: uvicorn.Config, state: State) -> None:
        super().__init__(config)
        self._state = state

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handlers as long as the server runs; what ended it is no error."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def main_loop(self) -> None:
        """Serve until told to stop, then until the running requests have ended or their time is over."""
        while not self._state.draining:
            await asyncio.sleep(POLL)
            await self.on_tick(0)
        ends_at = time.monotonic() + self._state.config.drain
        while self._state.running and time.monotonic() < ends_at and not self.should_exit:
            await asyncio.sleep(POLL)
        if self._state.running:  # closing the engines ends them with an error of their own
            for served in self._state.served.values():
                await asyncio.to_thread(served.engine.close)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        assert sockets is not None
        port, names = sockets[0].getsockname()[1], ", ".join(self._state.served)
        with contextlib.suppress(OSError):  # nowhere to say it
            os.write(2, f"parablock serves {names} at http://{self._state.config.host}:{port}/v1\n".encode())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._state.draining:
            self.should_exit = True
        self._state.draining = True


def run_server(names: Sequence[str], config: ServeConfig, key: str | None) -> None:
    """Load the models, serve them until SIGTERM or Ctrl-C, and return when what ran has ended.

    Raises:
        ValueError: a model that cannot be loaded.
        OSError: the address is taken.
    """
    with _listen(config) as listener:
        served = load_models(names, EngineConfig(max_rows=config.max_rows, compile=config.compile))
        app: FastAPI = create_app(served, config, key)
        options = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=5, lifespan="off", server_header=False
        )
        try:
            _Server(options, app.state.server).run(sockets=[listener])
        finally:
            for model in served:
                model.engine.close()


def _listen(config: ServeConfig) -> socket.socket:
    """The address is taken before the models are loaded, so that a wrong one is told at once."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # asyncio turns off Nagle's delay only where the protocol is named
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise OSError(f"{config.host}:{config.port} cannot be used ({error.strerror}); choose another --port") from None
    return listener
