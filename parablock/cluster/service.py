"""What runs on Ray: all that a replica has to know."""

from dataclasses import dataclass

from parablock.cluster.config import ClusterConfig
from parablock.server.config import ServeConfig
from parablock.settings import require


@dataclass(frozen=True)
class Service:
    """All that a replica has to know; what `serve deploy` reads from its file."""

    models: tuple[str, ...]
    serve: ServeConfig
    cluster: ClusterConfig
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.serve.api_keys is not None:
            raise ValueError(
                f"api_keys={self.serve.api_keys!r} does not go with replicas, each of which would count a key's limits "
                "alone; use PARABLOCK_API_KEY"
            )
        keep = self.serve.keep_responses
        require(keep == 0, "keep_responses", keep, "a replica does not know the others' responses; leave it out")
