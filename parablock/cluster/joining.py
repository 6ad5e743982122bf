"""The Ray cluster of a command: a running one, or one of its own that ends with it."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

CONNECT_SECONDS = 5.0
# Ray reports nothing to its makers, and leaves the devices of processes that ask for none as they are
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
OBJECTS = 100 * 2**20  # bytes of memory for Ray's objects: requests and answers are small


@contextlib.contextmanager
def join(address: str | None, cpus: int | None = None, *, quiet: bool = False) -> Iterator[None]:
    """Be connected to it; `cpus`: what a cluster of one's own offers, by default those of the machine;
    `quiet`: what its processes print is not shown.

    Raises:
        OSError: nobody listens at the address.
    """
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": not quiet}
    if address is None:
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": OBJECTS, "num_cpus": cpus}
        options["_node_ip_address"] = "127.0.0.1"  # nobody else reaches it
    else:
        _check(address)
        options["address"] = address
    import ray

    for last in (False, True):
        try:
            ray.init(**options)
            break
        except ConnectionError as error:
            reason = str(error).splitlines()[0]
            raise OSError(
                f"--address {address}: no Ray cluster was found ({reason}); start one with `ray start`"
            ) from None
        except Exception as error:  # Ray's own word for processes that do not come up, within 30 s, fixed
            if address is not None or type(error) is not Exception:
                raise
            if last:
                raise OSError(f"Ray did not start on this machine ({str(error).splitlines()[0]})") from None
            ray.shutdown()
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
