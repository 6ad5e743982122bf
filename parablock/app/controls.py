"""What the page shows and what can be set there."""

from dataclasses import dataclass
from typing import Any, get_args

import gradio as gr

from parablock.app.client import Client
from parablock.decoding.config import DecodeConfig, Drafter, Mode, Strategy

LONGEST_SYSTEM = 10_000  # characters


@dataclass(frozen=True)
class Site:
    """What the page shows: two models of one server. `ar` may be the same model, decoded token by token.

    `mode`: how `model` decodes several tokens per forward, "diffusion" or "speculative". `drafters`: of the latter.
    `history`: send earlier turns along unless the user says otherwise. `slower`: how many times slower than it came an
    answer is shown at first.
    """

    client: Client
    model: str
    ar: str
    block_size: int
    context: int
    mode: Mode
    drafters: tuple[Drafter, ...]
    history: bool
    slower: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """The controls beside the stage, in their order."""

    history: bool
    strategy: Strategy
    threshold: float
    factor: float
    tokens_per_step: int
    sub_block_size: int
    sub_block_cache: bool
    drafter: Drafter | None
    draft_tokens: int | None  # 0 or an empty field: as many as pay
    draft_threshold: float
    temperature: float
    top_p: float
    top_k: int | None  # 0 or an empty field: all tokens
    seed: int | None  # -1 or an empty field: another one each time
    max_tokens: int
    system: str  # empty: no system message

    def common(self) -> dict[str, Any]:
        """What both ways of decoding take."""
        names = ("temperature", "top_p", "max_tokens")
        seed = None if self.seed == -1 else self.seed
        return {**{name: getattr(self, name) for name in names}, "top_k": self.top_k or None, "seed": seed}

    def of(self, mode: Mode) -> dict[str, Any]:
        """What a mode takes."""
        own = {"diffusion": self._diffusion, "speculative": self._speculative, "autoregressive": dict}[mode]()
        return {"mode": mode, **self.common(), **own}

    def _speculative(self) -> dict[str, Any]:
        tokens = self.draft_tokens or None
        return {"drafter": self.drafter, "draft_tokens": tokens, "draft_threshold": self.draft_threshold}

    def _diffusion(self) -> dict[str, Any]:
        """Of the strategies' numbers only the one that counts."""
        numbers = {"threshold": ["threshold"], "factor": ["factor"], "fixed": ["tokens_per_step"], "verified": []}
        names = ("strategy", *numbers[self.strategy], "sub_block_size", "sub_block_cache")
        return {name: getattr(self, name) for name in names}


def controls(site: Site) -> list[Any]:
    """The settings, in the order of `Settings`."""
    default = DecodeConfig()
    divisors = [size for size in range(1, site.block_size + 1) if site.block_size % size == 0]
    diffusion, drafting = site.mode == "diffusion", site.mode == "speculative"
    gr.HTML("<h3>Settings</h3>")
    strategy = gr.Radio(
        list(get_args(Strategy)), value=default.strategy, label="Strategy", info="Which tokens a forward reveals.",
        visible=diffusion,
    )  # fmt: skip
    threshold = gr.Slider(
        0, 1, default.threshold, step=0.01, label="Threshold", info="Those more confident than this.", visible=diffusion
    )
    factor = gr.Slider(0.1, 8, default.factor, step=0.1, label="Factor", info="The more, the bolder.", visible=False)
    fixed = gr.Slider(1, site.block_size, 4, step=1, label="Tokens per step", info="So many each time.", visible=False)
    sub_block = gr.Dropdown(
        divisors, value=default.sub_block_size if default.sub_block_size in divisors else site.block_size,
        label="Sub-block size", info=f"Of the block's {site.block_size} tokens; sub-blocks are revealed in turn.",
        visible=diffusion,
    )  # fmt: skip
    cache = gr.Checkbox(default.sub_block_cache, label="Sub-block cache", visible=diffusion)
    drafter = gr.Radio(
        list(site.drafters), value=next(iter(site.drafters), None), label="Drafter", info="Where drafts come from.",
        visible=drafting,
    )  # fmt: skip
    drafts = gr.Slider(
        0, site.block_size - 1, 0, step=1, label="Draft tokens", info="0: as many as pay.", elem_id="drafts",
        visible=drafting,
    )  # fmt: skip
    sure = gr.Slider(
        0, 0.99, default.draft_threshold, step=0.01, label="Draft threshold", info="Drafts likelier right than this.",
        visible=drafting,
    )  # fmt: skip
    temperature = gr.Slider(0, 2, default.temperature, step=0.05, label="Temperature")
    top_p = gr.Slider(0.05, 1, default.top_p, step=0.05, label="Top-p")
    with gr.Row():
        top_k = gr.Number(0, label="Top-k", info="0: of all.", precision=0, minimum=0, min_width=80)
        seed = gr.Number(-1, label="Seed", info="-1: any.", precision=0, minimum=-1, min_width=80)
    longest = max(16, min(2048, site.context // 2))
    max_tokens = gr.Slider(1, longest, min(512, longest), step=1, label="Max tokens")
    system = gr.Textbox(
        label="System message", placeholder="none", lines=2, max_lines=6, max_length=LONGEST_SYSTEM, elem_id="system"
    )
    history = gr.Checkbox(site.history, label="Send earlier turns along", elem_id="history")

    def of_strategy(name: str) -> list[Any]:
        return [gr.Slider(visible=name == kind) for kind in ("threshold", "factor", "fixed")]

    strategy.change(of_strategy, strategy, [threshold, factor, fixed], queue=False, show_progress="hidden")
    return [
        history, strategy, threshold, factor, fixed, sub_block, cache, drafter, drafts, sure,
        temperature, top_p, top_k, seed, max_tokens, system,
    ]  # fmt: skip
