"""`parablock app`: the page, and unless one is given a server of its own for it."""

import os
import socket
import threading
import time
from typing import Any

from parablock.app.client import Client
from parablock.checkpoints.look import BUNDLED_MODELS

GENERAL = (
    "Explain in three sentences why the sky is blue.",
    "Write a short poem about a lighthouse.",
    "What is 17 times 23? Show your steps.",
)


def run_app(model: str | None, ar: str | None, url: str | None, host: str, port: int) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        ValueError: a wrong option, no server at `url`, or a model it does not have.
        OSError: the port is taken.
    """
    _check_free(host, port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported: nothing leaves this machine
    key = os.environ.get("PARABLOCK_API_KEY")
    name = model or "bundled"
    if url is None:
        counterpart = ar or ("bundled-ar" if name == "bundled" else name)
        client = _own_server(list(dict.fromkeys([name, counterpart])))
    else:
        client = Client(url.rstrip("/").removesuffix("/v1"), key)
        name, counterpart = _choose(client, model, ar)
    cards = {card["id"]: card["parablock"] for card in client.models()}
    from parablock.app.page import Site, build, look

    bundled = name in BUNDLED_MODELS
    site = Site(
        client, name, counterpart, cards[name]["block_size"], cards[name]["context"],
        adapted="diffusion" in cards[name]["modes"], history=not bundled, slower=10 if bundled else 1,
        examples=_problems() if bundled else GENERAL,
    )  # fmt: skip
    page = build(site)
    page.launch(
        server_name=host, server_port=port, quiet=True, prevent_thread_lock=True, share=False, ssr_mode=False, **look()
    )
    print(f"parablock app: http://{host}:{port} (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        page.close(verbose=False)


def _check_free(host: str, port: int) -> None:
    if not 1 <= port <= 65535:
        raise ValueError(f"port={port} is out of range; use 1 to 65535")
    try:
        with socket.create_server((host, port)):
            pass
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


def _own_server(names: list[str]) -> Client:
    """A server of this process on a free port of localhost, with a key that nobody else knows."""
    import secrets

    import uvicorn

    from parablock.engine.config import EngineConfig
    from parablock.server.app import create_app
    from parablock.server.config import ServeConfig
    from parablock.server.served import load_models

    key = secrets.token_urlsafe(32)
    listener = socket.create_server(("127.0.0.1", 0))
    application = create_app(load_models(names, EngineConfig()), ServeConfig(), key)
    server: Any = uvicorn.Server(uvicorn.Config(application, log_level="warning", access_log=False))
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    return Client(f"http://127.0.0.1:{listener.getsockname()[1]}", key)


def _problems() -> tuple[str, ...]:
    """Questions of the bundled task, which is all the bundled models know."""
    from parablock.data.word_problems import word_problem

    return tuple(word_problem("test", 7, index).question for index in (2, 3, 4))
