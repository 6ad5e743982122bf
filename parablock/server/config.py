"""What a user can set about the server."""

from dataclasses import dataclass

from parablock.engine.config import EngineConfig, KVDtype
from parablock.settings import help_of, require, require_at_least, setting


@dataclass(frozen=True)
class ServeConfig:
    """How `parablock serve` listens, and what it refuses."""

    host: str = setting("127.0.0.1", help="The address to listen on; 0.0.0.0 is every network.")
    port: int = setting(8000, help="The port; 0: any free one, which is printed.")
    max_rows: int = setting(32, help="Answers decoded together.")
    max_queue: int = setting(128, help="Answers that may wait; further ones are refused (429).")
    deadline: float = setting(600.0, help="Seconds until an answer must be whole.")
    max_body: int = setting(1_000_000, help="The longest request in bytes.")
    api_keys: str | None = setting(
        None, help="A file with several keys and their limits (TOML), in place of PARABLOCK_API_KEY."
    )
    otlp_endpoint: str | None = setting(
        None, help="A collector for OpenTelemetry's traces, http://HOST:4318. Default: no traces."
    )
    keep_responses: int = setting(
        0, help="Responses of /v1/responses that are kept in memory, so that later ones may follow them. Default: none."
    )
    cors_origin: tuple[str, ...] | None = setting(
        None, help="Web pages of this origin may ask (repeatable). Default: none."
    )
    drain: float = setting(60.0, help="Seconds that running requests get after SIGTERM.")
    kv_dtype: KVDtype | None = setting(None, help=help_of(EngineConfig, "kv_dtype"))
    compile: bool = setting(False, help="torch.compile: slower start, faster steps.")

    def engine(self) -> EngineConfig:
        """The settings of every model's engine."""
        return EngineConfig(
            max_rows=self.max_rows, max_queue=self.max_queue, kv_dtype=self.kv_dtype, compile=self.compile
        )

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, "port", self.port, "use 1 to 65535, or 0 for any free one")
        require_at_least(self, 1, "max_rows", "max_body")
        require_at_least(self, 0, "max_queue", "keep_responses")
        require(
            self.otlp_endpoint is None or self.otlp_endpoint.startswith(("http://", "https://")),
            "otlp_endpoint", self.otlp_endpoint, "use http://HOST:PORT",
        )  # fmt: skip
        require(self.deadline > 0, "deadline", self.deadline, "use a positive number of seconds")
        require(self.drain >= 0, "drain", self.drain, "use 0 or more seconds")
