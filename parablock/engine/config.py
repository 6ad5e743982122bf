"""What a user can set about the engine."""

from dataclasses import dataclass
from typing import Literal

from parablock.settings import require, require_at_least, setting

KVDtype = Literal["bfloat16"]


@dataclass(frozen=True)
class EngineConfig:
    """How an engine shares one model between many requests."""

    max_rows: int = setting(32, help="Requests that run together.")
    max_queue: int | None = setting(None, help="Requests that may wait; more are refused. Default: no limit.")
    kv_tokens: int | None = setting(
        None,
        help="Tokens that the K/V memory holds, prompts and answers. Default: what max_rows requests of full context "
        "need, or less, so that it fits a quarter of the free memory (three quarters on CUDA).",
    )
    kv_dtype: KVDtype | None = setting(
        None,
        help="The dtype that K/V are kept in: half the memory under float32 weights, for slightly different answers. "
        "Default: the model's own.",
    )
    max_context: int | None = setting(None, help="The longest prompt with its answer. Default: the model's own.")
    block_size: int | None = setting(None, help="Tokens decoded together. Default: the checkpoint's own.")
    prefill_chunk: int = setting(
        256,
        help="Prompt tokens that a step runs at most, so that a long prompt does not stall the others (more where more "
        "tokens than that are decoded in the step).",
    )
    prefix_cache: bool = setting(
        True,
        help="Keep the K/V of finished requests, and reuse what a new prompt begins with, as long as nobody else needs "
        "the memory.",
    )
    compile: bool = setting(
        False, help="torch.compile the model's forward: some 20 seconds at the first steps, faster steps after."
    )
    cuda_graphs: bool = setting(
        False, help="Capture the forward of every shape; rows and contexts are padded to powers of two."
    )
    threads: int | None = setting(
        None, help="Threads of torch on a CPU. Default: one for small steps, all for large ones."
    )

    def __post_init__(self) -> None:
        require(self.kv_dtype in (None, "bfloat16"), "kv_dtype", self.kv_dtype, "use 'bfloat16', or leave it out")
        require_at_least(self, 0, "max_queue")
        require_at_least(
            self, 1, "max_rows", "kv_tokens", "max_context", "block_size", "prefill_chunk", "threads"
        )  # fmt: skip
