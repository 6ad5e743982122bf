"""What a user can set about decoding."""

from dataclasses import dataclass
from typing import Literal

from parablock.settings import require, require_at_least, require_choice, setting

LEAST = 1e-6  # what is smaller vanishes when probabilities are computed in float32
MOST_BIASED = 4096  # tokens
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
    min_p: float = setting(
        0.0, help="Sample only from tokens with at least this share of the most probable one's probability [0, 1]."
    )
    presence_penalty: float = setting(
        0.0, help="Taken from the logit of every token that stands in the answer already [-2, 2]."
    )
    frequency_penalty: float = setting(
        0.0, help="The same, as often as the token stands in the answer already [-2, 2]."
    )
    repetition_penalty: float = setting(
        1.0,
        help="Logits of tokens that stand in prompt or answer are divided by it if positive, else multiplied "
        "[0.01, 100].",
    )
    logit_bias: tuple[tuple[int, float], ...] = setting(
        (), help="Token ids with what is added to their logits [-100, 100]; up to 4096 tokens.", command=False
    )
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
    ignore_eos: bool = setting(False, help="The checkpoint's own stop tokens do not end the answer.")
    min_tokens: int = setting(0, help="The answer has at least so many tokens: none before them is a stop token.")
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
        self._check_logits()
        whole = self.seed is None or -(2**63) <= self.seed < 2**63
        require(whole, "seed", self.seed, "use a whole number of at most 63 bits")
        if self.block_size is not None:
            self.check_sub_block(self.block_size)

    def _check_logits(self) -> None:
        """ValueError unless what changes the distribution is in range."""
        require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "use a value in [0, 1]")
        for name in ("presence_penalty", "frequency_penalty"):
            require(-2.0 <= getattr(self, name) <= 2.0, name, getattr(self, name), "use a value in [-2, 2]")
        penalty = self.repetition_penalty
        require(0.01 <= penalty <= 100.0, "repetition_penalty", penalty, "use a value in [0.01, 100]")
        if len(self.logit_bias) > MOST_BIASED:
            raise ValueError(f"logit_bias={len(self.logit_bias)} tokens are too many; name at most {MOST_BIASED}")
        for token, bias in self.logit_bias:
            require(-100.0 <= bias <= 100.0, "logit_bias", (token, bias), "use a bias in [-100, 100]")
        require_at_least(self, 0, "min_tokens")
        most = self.max_new_tokens
        if most is not None and self.min_tokens > most:
            raise ValueError(f"min_tokens={self.min_tokens} is more than max_new_tokens={most}; lower it")

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        neutral = self.presence_penalty == self.frequency_penalty == 0.0 and self.repetition_penalty == 1.0
        return not neutral or bool(self.logit_bias) or self.min_tokens > 0

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

    def check_tokens(self, vocabulary: int) -> None:
        """ValueError if a bias belongs to no token."""
        for token, bias in self.logit_bias:
            remedy = f"name ids of the vocabulary of {vocabulary} tokens"
            require(0 <= token < vocabulary, "logit_bias", (token, bias), remedy)

    def check_sub_block(self, block_size: int) -> None:
        """ValueError unless `block_size` is a whole number of sub-blocks."""
        require(
            block_size % self.sub_block_size == 0,
            "sub_block_size", self.sub_block_size, f"use a divisor of the block size {block_size}",
        )  # fmt: skip
