"""`parablock serve` with replicas: a Ray cluster, found or started; the service on it; and a stop in good order."""

import logging
import time
from collections.abc import Sequence

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from parablock.cluster.application import NAME, QUIET, application
from parablock.cluster.config import ClusterConfig
from parablock.cluster.joining import join
from parablock.cluster.service import Service
from parablock.server.command import listen, noted_signals, say
from parablock.server.config import ServeConfig
from parablock.server.listener import warn_if_open

POLL = 0.2  # seconds between looks at signals, and at what starts or drains
LOOK = 2.0  # seconds between looks at what runs, which Ray's controller computes anew each time
KNOWN_SECONDS = 10.0  # until a process knows the replicas, if there are any
ENDED = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.DELETING, ApplicationStatus.NOT_STARTED)


def run_cluster(service: Service, key: str | None) -> None:
    """Serve until SIGTERM or Ctrl-C, and return when what ran has ended.

    Raises:
        ValueError: the cluster is too small, or runs this service already.
        OSError: the address is taken, or nobody listens at the cluster's.
        SystemExit: the replicas do not start, or the service was taken away; the message says why.
    """
    port = _free(service.serve, key)
    with join(service.cluster.address), noted_signals() as came:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        _check_room(service.cluster)
        options = {"host": service.serve.host, "port": port}
        serve.start(proxy_location="HeadOnly", http_options=options, logging_config=QUIET)
        if NAME in serve.status().applications:
            raise ValueError(
                f"this cluster serves {NAME!r} already; end that command, or update it with `serve deploy`"
            )
        try:
            target = serve.RunTarget(application(service, key), name=NAME, route_prefix="/", logging_config=QUIET)
            serve.run_many([target], wait_for_applications_running=False, wait_for_ingress_deployment_creation=False)
            if _wait_until_running(came):
                where = f"http://{service.serve.host}:{port}/v1"
                say(
                    f"parablock serves {', '.join(service.models)} at {where} "
                    f"({service.cluster.least} replicas on Ray, {ray.get_runtime_context().gcs_address})"
                )
                while not came and _status() not in ENDED:
                    _wait(LOOK, came)
                if not came:
                    raise SystemExit("parablock: the service was taken off the cluster")
                _drain(service.serve.drain, came)
        finally:
            serve.delete(NAME)
            if not serve.status().applications:  # nor does anybody else need the port
                serve.shutdown()


def _free(config: ServeConfig, key: str | None) -> int:
    """The port, which nobody uses now."""
    with listen(config) as listening:
        address, port = listening.getsockname()[:2]
        warn_if_open(address, asks=key is not None)
        return int(port)


def _check_room(cluster: ClusterConfig) -> None:
    """ValueError if the replicas can never run here: Ray would wait for ever."""
    every = ray.cluster_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for kind, each in (("GPU", cluster.gpus_per_replica), ("CPU", cluster.cpus_per_replica)):
        there, largest = every.get(kind, 0), max(node.get(kind, 0) for node in nodes)
        if each and (cluster.least * each > there or each > largest):
            raise ValueError(
                f"{cluster.least} replicas of {each:g} {kind}s need {cluster.least * each:g}, and the cluster has "
                f"{there:g} (at most {largest:g} on one machine); use fewer replicas, or a smaller "
                f"--{kind.lower()}s-per-replica"
            )


def _wait(seconds: float, came: Sequence[int]) -> None:
    ends_at = time.monotonic() + seconds
    while not came and time.monotonic() < ends_at:
        time.sleep(POLL)


def _status() -> ApplicationStatus:
    found = serve.status().applications.get(NAME)
    return ApplicationStatus.NOT_STARTED if found is None else found.status


def _wait_until_running(came: Sequence[int]) -> bool:
    """Whether it runs; else a signal came.

    Raises:
        SystemExit: a replica cannot start.
    """
    while not came:
        status = _status()
        if status == ApplicationStatus.RUNNING:
            return True
        if status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            said = [d.message for d in serve.status().applications[NAME].deployments.values() if d.message]
            lines = [line for line in "\n".join(said).splitlines() if line.strip()]
            raise SystemExit(f"parablock: the replicas do not start: {lines[-1].strip() if lines else status}")
        time.sleep(POLL)
    return False


def _drain(seconds: float, came: Sequence[int]) -> None:
    """No new requests; those that run get so long, then they end with an error of their own."""
    ends_at = time.monotonic() + seconds
    while ray.get(_tell.remote("drain")) and time.monotonic() < ends_at and len(came) < 2:
        time.sleep(POLL)
    ray.get(_tell.remote("close"))


@ray.remote(num_cpus=0)
def _tell(method: str) -> int:
    """Call a method of all replicas, from within the cluster; the sum of what they say."""
    replicas = serve.get_deployment_handle("replica", NAME)
    ends_at = time.monotonic() + KNOWN_SECONDS
    while not (told := replicas.broadcast(method).results(return_exceptions=True)) and time.monotonic() < ends_at:
        time.sleep(POLL)  # a new process does not know the replicas at once
    return sum(count for count in told if isinstance(count, int))
