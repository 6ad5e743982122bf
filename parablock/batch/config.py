"""What a user can set about a batch."""

from dataclasses import dataclass

from parablock.engine.config import EngineConfig
from parablock.settings import help_of, require, require_at_least, setting


@dataclass(frozen=True)
class BatchConfig:
    """How `parablock batch` runs."""

    max_rows: int = setting(32, help=help_of(EngineConfig, "max_rows"))
    limit: int | None = setting(None, help="Only the first so many lines. Default: all.")
    ordered: bool = setting(False, help="The output's lines in the order of the input. Default: as they end.")
    replicas: int | None = setting(
        None, help="Processes, each with its own engine, on Ray. Default: this process alone; with an address one."
    )
    address: str | None = setting(
        None, help="The Ray cluster they run on: auto, HOST:PORT or ray://HOST:PORT. Default: this machine."
    )
    cpus_per_replica: float = setting(1.0, help="CPUs of the cluster that each takes, and threads that it uses.")
    gpus_per_replica: float = setting(0.0, help="GPUs of the cluster that each takes.")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "max_rows", "limit", "replicas")
        require(self.cpus_per_replica > 0, "cpus_per_replica", self.cpus_per_replica, "use a positive number")
        require_at_least(self, 0, "gpus_per_replica")

    @property
    def processes(self) -> int | None:
        """On Ray, or None without it."""
        return self.replicas or (None if self.address is None else 1)
