"""`parablock serve`: load, listen, and stop in good order."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from parablock.server.app import State, create_app
from parablock.server.config import ServeConfig
from parablock.server.keys import given_keys
from parablock.server.listener import Listener, warn_if_open
from parablock.server.served import load_models

POLL = 0.1  # seconds between looks at what still runs


def run_server(names: Sequence[str], config: ServeConfig, key: str | None, dtype: str | None = None) -> None:
    """Load the models, serve them until SIGTERM or Ctrl-C, and return when what ran has ended.

    Raises:
        ValueError: a model that cannot be loaded, or a wrong file of keys.
        OSError: the address is taken.
        SystemExit: an engine has stopped by itself, or the HTTP server has; the message says why.
    """
    keys = given_keys(config.api_keys, key)
    with listen(config) as listening:
        address, port = listening.getsockname()[:2]
        warn_if_open(address, asks=bool(keys))
        served = load_models(names, config.engine(), dtype)
        try:
            app = create_app(served, config, keys)
            state: State = app.state.server
            with noted_signals() as came:
                listener = Listener(app, listening)
                say(f"parablock serves {', '.join(state.served)} at http://{config.host}:{port}/v1")
                while not came and not state.stopped and listener.alive:
                    time.sleep(POLL)
                state.draining = True
                ends_at = time.monotonic() + config.drain
                while state.running and listener.alive and time.monotonic() < ends_at and len(came) < 2:
                    time.sleep(POLL)
                if state.running:  # closing the engines ends them with an error of their own
                    for model in served:
                        model.engine.close()
                listener.stop()
            if state.traces:
                state.traces.close()
            if state.stopped:
                reason = str(state.stopped.engine.error).partition("\n")[0]
                raise SystemExit(f"parablock: the engine of {state.stopped.name} has stopped ({reason})")
            if listener.error:
                raise SystemExit(f"parablock: the HTTP server has ended ({listener.error})")
        finally:
            for model in served:
                model.engine.close()


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM end nothing meanwhile: the list holds those that came."""
    came: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(text: str) -> None:
    """A line on stderr."""
    with contextlib.suppress(OSError):  # nowhere to say it
        os.write(2, f"{text}\n".encode())


def listen(config: ServeConfig) -> socket.socket:
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
