"""The Ray cluster of a command: a running one, or one of its own that ends with it."""

import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import Any

from parablock.cluster.config import ClusterConfig

CONNECT_SECONDS = 5.0
OBJECTS = 100 * 2**20  # bytes of memory for Ray's objects: requests and answers are small


@contextlib.contextmanager
def join(cluster: ClusterConfig) -> Iterator[None]:
    """Be connected to it.

    Raises:
        OSError: nobody listens at the address.
    """
    address = cluster.address
    options: dict[str, Any] = {"logging_level": logging.WARNING}
    if address is None:
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": OBJECTS}
    else:
        _check(address)
        options["address"] = address
    import ray

    try:
        ray.init(**options)
    except ConnectionError as error:
        reason = str(error).splitlines()[0]
        raise OSError(f"--address {address}: no Ray cluster was found ({reason}); start one with `ray start`") from None
    except Exception as error:  # Ray's own word for a machine on which its processes do not come up
        if address is not None or type(error) is not Exception:
            raise
        raise OSError(f"Ray did not start on this machine ({str(error).splitlines()[0]})") from None
    try:
        yield
    finally:
        ray.shutdown()


def _check(address: str) -> None:
    """OSError at once if nobody listens there; Ray itself would try for a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdigit():
        raise ValueError(f"--address {address!r} is no address; use 'auto', HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"--address {address}: nobody listens there ({reason}); start Ray with `ray start`") from None
