"""What a user can set about decoding."""

from dataclasses import dataclass
from typing import Literal

from parablock.settings import require, require_at_least, require_choice, setting

LEAST = 1e-6  # what is smaller vanishes when probabilities are computed in float32
Mode = Literal["diffusion", "autoregressive", "speculative"]
Drafter = Literal["masks", "lookup", "both"]
Strategy = Literal["threshold", "factor", "fixed", "verified"]


@dataclass(frozen=True)
class DecodeConfig:
    """How text is decoded; what is None the checkpoint or the context decides."""

    mode: Mode | None = setting(
        None,
        help="'diffusion' (several tokens per forward), 'autoregressive', or 'speculative' (the autoregressive answer; "
        "drafts of several tokens are verified in one forward). Default: what the checkpoint was made for.",
    )
    max_new_tokens: int | None = setting(
        None, help="The answer is at most this long, exactly. Default: 512, less if the context is shorter."
    )
    block_size: int | None = setting(None, help="Tokens decoded together. Default: the checkpoint's own.")
    sub_block_size: int = setting(8, help="A block is revealed in parts of this many tokens, left to right.")
    strategy: Strategy = setting(
        "threshold",
        help="Which positions to reveal: 'threshold', 'factor' or 'fixed' (the most confident ones); or 'verified': "
        "those that a causal pass through the block confirms.",
    )
    threshold: float = setting(0.9, help="Reveal positions whose confidence is above this [0, 1].")
    factor: float = setting(1.0, help="For 'factor': larger reveals more.")
    tokens_per_step: int = setting(1, help="For 'fixed': how many positions a step reveals.")
    temperature: float = setting(0.0, help="0 is greedy; above, tokens are sampled.")
    top_p: float = setting(1.0, help="Sample from the smallest set of tokens with this probability.")
    top_k: int | None = setting(None, help="Sample from this many most probable tokens. Default: all.")
    sub_block_cache: bool = setting(True, help="Reuse the K/V of the other sub-blocks inside a block.")
    drafter: Drafter | None = setting(
        None,
        help="For 'speculative': where drafts come from. 'lookup': what followed the last tokens where they stood "
        "before, in prompt or answer; 'masks': a causal adapter; 'both': the likelier of the two. Default: 'both' with "
        "an adapter, else 'lookup'.",
    )
    draft_tokens: int | None = setting(
        None,
        help="For 'speculative': how many tokens to draft. Default: up to 7, as many as pay (under load none).",
    )
    draft_threshold: float = setting(
        0.0, help="For 'speculative': drafts are verified while all up to them are right with more than this [0, 1)."
    )
    stop_token_ids: tuple[int, ...] | None = setting(
        None, help="Token ids that end the answer (repeatable). Default: the checkpoint's own."
    )
    mask_token_id: int | None = setting(
        None, help="The id that stands at masked positions. Default: the checkpoint's own."
    )
    seed: int | None = setting(None, help="Makes sampling repeatable. Default: a fresh one.")

    def __post_init__(self) -> None:
        if self.mode is not None:
            require_choice("mode", self.mode, Mode)
        require_choice("strategy", self.strategy, Strategy)
        if self.drafter is not None:
            require_choice("drafter", self.drafter, Drafter)
        require_at_least(
            self, 1, "max_new_tokens", "block_size", "sub_block_size", "tokens_per_step", "top_k", "draft_tokens"
        )  # fmt: skip
        if self.mode is not None:
            self.check_drafts(self.mode)
        require(0.0 <= self.draft_threshold < 1.0, "draft_threshold", self.draft_threshold, "use a value in [0, 1)")
        require(0.0 <= self.threshold <= 1.0, "threshold", self.threshold, "use a value in [0, 1]")
        require(self.factor > 0.0, "factor", self.factor, "use a positive value")
        sampled = LEAST <= self.temperature <= 1 / LEAST
        remedy = f"use 0 (greedy) or a value in [{LEAST:g}, {1 / LEAST:g}]"
        require(self.temperature == 0.0 or sampled, "temperature", self.temperature, remedy)
        require(LEAST <= self.top_p <= 1.0, "top_p", self.top_p, f"use a value in [{LEAST:g}, 1]")
        whole = self.seed is None or -(2**63) <= self.seed < 2**63
        require(whole, "seed", self.seed, "use a whole number of at most 63 bits")
        if self.block_size is not None:
            self.check_sub_block(self.block_size)

    @property
    def verified(self) -> bool:
        """Block diffusion whose drafts are verified, once the mode is known."""
        return self.mode == "diffusion" and self.strategy == "verified"

    def check_drafts(self, mode: Mode) -> None:
        """ValueError if something is set about drafts that `mode` does not make."""
        for name in ("drafter", "draft_tokens"):
            value = getattr(self, name)
            if value is not None and mode != "speculative":
                raise ValueError(
                    f"{name}={value!r} belongs to mode='speculative', and mode is {mode!r}; set that mode, or leave "
                    f"{name} out"
                )

    def check_sub_block(self, block_size: int) -> None:
        """ValueError unless `block_size` is a whole number of sub-blocks."""
        require(
            block_size % self.sub_block_size == 0,
            "sub_block_size", self.sub_block_size, f"use a divisor of the block size {block_size}",
        )  # fmt: skip
