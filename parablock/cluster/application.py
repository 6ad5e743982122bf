"""The two deployments, the front and the replicas, as an application of Ray Serve."""

import os
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from parablock.cluster.config import ClusterConfig
from parablock.cluster.front import Front
from parablock.cluster.replica import Replica
from parablock.cluster.router import PrefixRouter
from parablock.cluster.service import Service
from parablock.server.config import ServeConfig

NAME = "parablock"
BESIDE = 64  # requests that a replica takes beyond the answers it holds: its own refusals, models, metrics
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


def application(service: Service, key: str | None) -> Application:
    """The service; `key`: what clients must send as a bearer token."""
    config, cluster = service.serve, service.cluster
    resources = {"num_cpus": cluster.cpus_per_replica, "num_gpus": cluster.gpus_per_replica}
    ends: dict[str, Any] = {"graceful_shutdown_timeout_s": config.drain, "graceful_shutdown_wait_loop_s": 0.2}
    replica: Any = serve.deployment(
        Replica,
        name="replica",
        ray_actor_options=resources,
        max_ongoing_requests=config.max_rows + config.max_queue + BESIDE,
        health_check_period_s=1.0,
        health_check_timeout_s=30.0,
        max_constructor_retry_count=2,
        **_scale(cluster, config),
        **_routing(cluster, config),
        **ends,
    )
    ingress: Any = serve.ingress()(Front)
    front: Any = serve.deployment(
        ingress,
        name="front",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=100_000,
        health_check_period_s=1.0,
        **ends,
    )
    bound: Application = front.bind(replica.bind(service, key), service)
    return bound


def _scale(cluster: ClusterConfig, config: ServeConfig) -> dict[str, Any]:
    if cluster.min_replicas is None or cluster.max_replicas is None:
        return {"num_replicas": cluster.replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=cluster.min_replicas,
            max_replicas=cluster.max_replicas,
            target_ongoing_requests=max(1, config.max_rows // 2),
        )
    }


def _routing(cluster: ClusterConfig, config: ServeConfig) -> dict[str, Any]:
    if cluster.routing == "balance":
        return {}
    router: Any = PrefixRouter
    slack = {"slack": max(2, config.max_rows // 4)}
    return {"request_router_config": RequestRouterConfig(request_router_class=router, request_router_kwargs=slack)}


def build(arguments: dict[str, Any]) -> Application:
    """What a Serve config file names; `arguments` as `service_arguments` writes them.

    The key is that of the environment (`PARABLOCK_API_KEY`), so that no file holds it.
    """
    given = arguments["serve"].items()
    settings: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given}
    service = Service(
        tuple(arguments["models"]),
        ServeConfig(**settings),
        ClusterConfig(**arguments["cluster"]),
        arguments["dtype"],
    )
    return application(service, os.environ.get("PARABLOCK_API_KEY") or None)
