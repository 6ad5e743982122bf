"""What a user can set about replicas."""

from dataclasses import dataclass
from typing import Literal

from parablock.settings import require, require_at_least, require_choice, setting

Routing = Literal["prefixes", "balance"]


@dataclass(frozen=True)
class ClusterConfig:
    """How many replicas `parablock serve` runs on Ray, and what each of them gets."""

    replicas: int = setting(1, help="Processes with the model, behind one address.")
    min_replicas: int | None = setting(
        None,
        help="With --max-replicas, in place of --replicas: as many as the requests in flight need, at least so many.",
    )
    max_replicas: int | None = setting(None, help="... and at most so many.")
    gpus_per_replica: float = setting(0.0, help="GPUs of each replica; a fraction shares one.")
    cpus_per_replica: float = setting(1.0, help="CPUs of each replica: the threads it computes with.")
    routing: Routing = setting(
        "prefixes",
        help="'prefixes': to the replica that has the K/V of a request's beginning; 'balance': Ray's default.",
    )
    address: str | None = setting(
        None,
        help="A running Ray cluster: 'auto' (this machine's), HOST:PORT, or ray://HOST:PORT. Default: one of this "
        "command's own, on this machine.",
    )

    def __post_init__(self) -> None:
        require_choice("routing", self.routing, Routing)
        require_at_least(self, 1, "replicas", "min_replicas", "max_replicas")
        require_at_least(self, 0, "gpus_per_replica", "cpus_per_replica")
        if (self.min_replicas is None) != (self.max_replicas is None):
            raise ValueError("min_replicas and max_replicas belong together; give both, or replicas")
        if self.min_replicas is not None and self.max_replicas is not None:
            require(
                self.max_replicas >= self.min_replicas, "max_replicas", self.max_replicas,
                f"use at least min_replicas={self.min_replicas}",
            )  # fmt: skip

    @property
    def least(self) -> int:
        """Replicas that must run for the service to be there."""
        return self.replicas if self.min_replicas is None else self.min_replicas
