"""What a user can set about a measurement of speed."""

from dataclasses import dataclass

from parablock.decoding.config import Drafter
from parablock.settings import require, require_at_least, require_choice, setting


@dataclass(frozen=True)
class BenchConfig:
    """What `parablock bench` measures: the cross product of the lists, each case `repeats` times."""

    concurrency: tuple[int, ...] = setting((1, 8, 32), joined=True, help="Requests in flight, as a list.")
    prompt_tokens: tuple[int, ...] = setting(
        (), joined=True, help="Random prompts of these lengths, as a list. Default: the workload's own prompts."
    )
    thresholds: tuple[float, ...] = setting(
        (0.9,), joined=True, option="threshold", help="Block diffusion's threshold, as a list."
    )
    sub_block_sizes: tuple[int, ...] = setting(
        (8,), joined=True, option="sub_block_size", help="Block diffusion's sub-block size, as a list."
    )
    sub_block_cache: tuple[bool, ...] = setting(
        (True,), joined=True, help="Block diffusion's sub-block cache: 'on', 'off' or 'on,off'."
    )
    drafters: tuple[str, ...] = setting(
        (),
        joined=True,
        option="drafter",
        help="Speculative decoding's drafter, as a list. Default: the checkpoint's own.",
    )
    compile: tuple[bool, ...] = setting((False,), joined=True, help="torch.compile: 'off', 'on' or 'off,on'.")
    new_tokens: int = setting(128, help="The longest answer; to random prompts every answer.")
    requests: int = setting(16, help="Requests per case, at least.")
    rounds: int = setting(2, help="... and at least so many times those in flight.")
    repeats: int = setting(5, help="Of every case, in turns.")
    tokens_per_step: int | None = setting(
        None,
        help="Reveal so many per step. Default: by threshold; 4 with random weights, whose confidence says nothing.",
    )
    threads: int | None = setting(None, help="Of a CPU. Default: one for small steps, all for large.")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "new_tokens", "requests", "rounds", "repeats", "tokens_per_step", "threads")
        for name in ("concurrency", "thresholds", "sub_block_sizes", "sub_block_cache", "compile"):
            require(bool(getattr(self, name)), name, getattr(self, name), "name at least one value")
        for name in ("concurrency", "prompt_tokens", "sub_block_sizes"):
            require(all(v >= 1 for v in getattr(self, name)), name, getattr(self, name), "use values of at least 1")
        for drafter in self.drafters:
            require_choice("drafters", drafter, Drafter)
        require(all(0.0 <= v <= 1.0 for v in self.thresholds), "thresholds", self.thresholds, "use values in [0, 1]")
