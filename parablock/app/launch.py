"""`parablock app`: the page, and unless one is given a server of its own for it."""

import hmac
import os
import socket
import time
from collections.abc import Callable

from parablock.app.client import Client
from parablock.checkpoints.named import BUNDLED_MODELS
from parablock.server.listener import Listener, warn_if_open

GENERAL = (
    "Explain in three sentences why the sky is blue.",
    "Write a short poem about a lighthouse.",
    "What is 17 times 23? Show your steps.",
)
LOGIN = "User name: parablock. Password: the key that the page was started with (PARABLOCK_API_KEY)."


def run_app(model: str | None, ar: str | None, url: str | None, host: str, port: int, dtype: str | None = None) -> None:
    """Serve the page until Ctrl-C. With a key (PARABLOCK_API_KEY) the page asks for it.

    Raises:
        ValueError: a wrong option, no server at `url`, or a model it does not have.
        OSError: the port is taken, or the page's own server did not start, or has ended.
    """
    if url is not None and dtype is not None:
        raise ValueError(f"dtype={dtype!r}: the server at {url} has loaded its models; start it with --dtype instead")
    key = os.environ.get("PARABLOCK_API_KEY") or None
    warn_if_open(_free_address(host, port), asks=key is not None)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported: nothing leaves this machine
    ended = _never
    if url is None:
        assert model is not None
        name = model
        counterpart = ar or ("bundled-ar" if name == "bundled" else name)
        client, ended = _own_server(list(dict.fromkeys([name, counterpart])), dtype)
    else:
        client = Client(url.rstrip("/").removesuffix("/v1"), key)
        name, counterpart = _choose(client, model, ar)
    cards = {card["id"]: card["parablock"] for card in client.models()}
    from parablock.app.controls import Site
    from parablock.app.page import build, look

    bundled = name in BUNDLED_MODELS
    site = Site(
        client, name, counterpart, cards[name]["block_size"], cards[name]["context"],
        mode="diffusion" if "diffusion" in cards[name]["modes"] else "speculative",
        drafters=tuple(cards[name]["drafters"]), history=not bundled, slower=10 if bundled else 1,
        examples=_problems() if bundled else GENERAL,
    )  # fmt: skip
    page = build(site)
    page.launch(
        server_name=host, server_port=port, quiet=True, prevent_thread_lock=True, share=False, ssr_mode=False,
        auth=None if key is None else _login(key), auth_message=LOGIN, **look(),
    )  # fmt: skip
    print(f"parablock app: http://{host}:{port} (Ctrl-C ends it)", flush=True)
    try:
        while (reason := ended()) is None:
            time.sleep(0.5)
        raise OSError(f"the page's own server has ended: {reason}")
    except KeyboardInterrupt:
        pass
    finally:
        page.close(verbose=False)


def _never() -> str | None:
    """A running server is somebody else's: the page says so when it is gone."""
    return None


def _login(key: str) -> Callable[[str, str], bool]:
    return lambda _, password: hmac.compare_digest(password.encode(), key.encode())


def _free_address(host: str, port: int) -> str:
    """The address that a host name stands for, on which the port is free."""
    if not 1 <= port <= 65535:
        raise ValueError(f"port={port} is out of range; use 1 to 65535")
    try:
        with socket.create_server((host, port)) as probe:
            address: str = probe.getsockname()[0]
            return address
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port} ({error.strerror}); choose another with --port") from None


def _choose(client: Client, model: str | None, ar: str | None) -> tuple[str, str]:
    """The two models of a running server: those named, else the first (that was adapted) and its AR counterpart."""
    cards = client.models()
    known = [card["id"] for card in cards]
    for option, name in (("model", model), ("ar", ar)):
        if name is not None and name not in known:
            raise ValueError(f"{option}={name!r} is not on {client.url}; it has: {', '.join(known)}")
    adapted = [card["id"] for card in cards if "diffusion" in card["parablock"]["modes"]]
    chosen = model or [*adapted, *known][0]
    return chosen, ar or ("bundled-ar" if chosen == "bundled" and "bundled-ar" in known else chosen)


def _own_server(names: list[str], dtype: str | None) -> tuple[Client, Callable[[], str | None]]:
    """A server of this process on a free port of localhost, with a key that nobody else knows; why it has ended."""
    import secrets

    from parablock.engine.config import EngineConfig
    from parablock.server.app import create_app
    from parablock.server.config import ServeConfig
    from parablock.server.keys import given_keys
    from parablock.server.served import load_models

    key = secrets.token_urlsafe(32)
    listening = socket.create_server(("127.0.0.1", 0))
    app = create_app(load_models(names, EngineConfig(), dtype), ServeConfig(), given_keys(None, key))
    listener, state = Listener(app, listening), app.state.server

    def ended() -> str | None:
        if served := state.stopped:
            return f"the engine of {served.name} has stopped ({served.stopped})"
        return None if listener.alive else str(listener.error)

    return Client(f"http://127.0.0.1:{listening.getsockname()[1]}", key), ended


def _problems() -> tuple[str, ...]:
    """Questions of the bundled task, which is all the bundled models know."""
    from parablock.data.word_problems import word_problem

    return tuple(word_problem("test", 7, index).question for index in (2, 3, 4))
