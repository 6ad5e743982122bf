"""The service as files: a config for Ray's `serve deploy`, and a RayService for KubeRay."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import yaml

from parablock import __version__
from parablock.cluster.service import Service
from parablock.server.config import ServeConfig

APPLICATION = "parablock.cluster.application:build"
IMAGE = f"parablock:{__version__}"
RAY_VERSION = "2.60.0"
PORT = 8000  # where KubeRay's service expects Ray Serve
SECRET = "parablock"  # with the field api-key
HEADS = {
    "serve.yaml": "# serve deploy serve.yaml    All machines have parablock[ray]; the key is PARABLOCK_API_KEY in the\n"
    "# environment of Ray's head.\n",
    "rayservice.yaml": "# kubectl apply -f rayservice.yaml    The image has parablock[ray].\n"
    "# A key, if you want one: kubectl create secret generic parablock --from-literal=api-key=...\n",
}


def write_files(service: Service, folder: Path) -> None:
    """Write `serve.yaml` and `rayservice.yaml` into a folder, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("serve.yaml", serve_config(service)), ("rayservice.yaml", ray_service(service))):
        part = folder / f"{name}.part"
        part.write_text(HEADS[name] + _text(content))
        os.replace(part, folder / name)
        print(folder / name)


def _text(content: dict[str, Any]) -> str:
    text: str = yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120)
    return text


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks."""


def _block(dumper: yaml.SafeDumper, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _block)


def serve_config(service: Service) -> dict[str, Any]:
    """What `serve deploy` reads."""
    where = {"host": service.serve.host, "port": service.serve.port or PORT}
    return {"proxy_location": "EveryNode", "http_options": where, "applications": [_application(service)]}


def _application(service: Service) -> dict[str, Any]:
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(service.serve).items()}
    defaults = dataclasses.asdict(ServeConfig())
    return {
        "name": "parablock",
        "route_prefix": "/",
        "import_path": APPLICATION,
        "args": {
            "models": list(service.models),
            "dtype": service.dtype,
            "serve": {k: v for k, v in settings.items() if v != defaults[k] and k not in ("host", "port")},
            "cluster": {k: v for k, v in dataclasses.asdict(service.cluster).items() if k != "address"},
        },
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
    }


def ray_service(service: Service) -> dict[str, Any]:
    """What KubeRay reads: a head that only directs, and a worker for each replica."""
    cluster = service.cluster
    limits: dict[str, Any] = {"cpu": max(1, round(cluster.cpus_per_replica)) + 1, "memory": "16Gi"}
    if cluster.gpus_per_replica:
        limits["nvidia.com/gpu"] = max(1, round(cluster.gpus_per_replica))
    workers = {
        "groupName": "replicas",
        "replicas": cluster.least,
        "minReplicas": cluster.least,
        "maxReplicas": cluster.max_replicas or cluster.replicas,
        "rayStartParams": {},
        "template": {"spec": {"containers": [_container("ray-worker", limits)]}},
    }
    ports = [{"containerPort": p, "name": n} for n, p in (("gcs", 6379), ("dashboard", 8265), ("serve", PORT))]
    head = _container("ray-head", {"cpu": 2, "memory": "4Gi"}) | {"ports": ports}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "parablock"},
        "spec": {
            "serveConfigV2": _text({"applications": [_application(service)]}),
            "rayClusterConfig": {
                "rayVersion": RAY_VERSION,
                "enableInTreeAutoscaling": cluster.max_replicas is not None,
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
                    "template": {"spec": {"containers": [head]}},
                },
                "workerGroupSpecs": [workers],
            },
        },
    }


def _container(name: str, limits: dict[str, Any]) -> dict[str, Any]:
    secret = {"name": SECRET, "key": "api-key", "optional": True}
    key = {"name": "PARABLOCK_API_KEY", "valueFrom": {"secretKeyRef": secret}}
    passive = {"name": "OMP_WAIT_POLICY", "value": "passive"}
    resources = {"limits": limits, "requests": limits}
    return {"name": name, "image": IMAGE, "env": [key, passive], "resources": resources}
