"""The web page: chat, live denoising with replay, and AR racing block diffusion."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from parablock.app.client import Client
from parablock.app.lanes import Lane, run, verdict
from parablock.decoding.config import DecodeConfig, Strategy

STATIC = Path(__file__).parent / "static"
DIFFUSION, AUTOREGRESSIVE = "Block diffusion", "Autoregressive"
FONTS = ("Inter", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")


@dataclass(frozen=True)
class Site:
    """What the page shows: two models of one server. `ar` may be the same model, decoded token by token.

    `adapted`: whether `model` decodes by block diffusion; one that does not is shown token by token, and races nobody.
    `history`: send earlier turns along unless the user says otherwise. `slower`: how many times slower than it came an
    answer is shown at first.
    """

    client: Client
    model: str
    ar: str
    block_size: int
    context: int
    adapted: bool
    history: bool
    slower: int
    examples: tuple[str, ...]


@dataclass
class Session:
    """One visitor's conversation."""

    turns: list[dict[str, str]] = field(default_factory=list)
    runs: int = 0
    stop: bool = False
    busy: bool = False


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
    temperature: float
    top_p: float
    top_k: int | None  # 0 or an empty field: all tokens
    seed: int | None  # -1 or an empty field: another one each time
    max_tokens: int

    def common(self) -> dict[str, Any]:
        """What both ways of decoding take."""
        names = ("temperature", "top_p", "max_tokens")
        seed = None if self.seed == -1 else self.seed
        return {**{name: getattr(self, name) for name in names}, "top_k": self.top_k or None, "seed": seed}

    def diffusion(self) -> dict[str, Any]:
        """What block diffusion takes, of the strategies' numbers only the one that counts."""
        numbers = {"threshold": ["threshold"], "factor": ["factor"], "fixed": ["tokens_per_step"], "verified": []}
        names = ("strategy", *numbers[self.strategy], "sub_block_size", "sub_block_cache")
        return {"mode": "diffusion", **self.common(), **{name: getattr(self, name) for name in names}}


def view(
    site: Site, session: Session, question: str, lanes: list[Lane], state: str, message: str = ""
) -> dict[str, Any]:
    """The value of the stage."""
    return {
        "run": session.runs,
        "turns": list(session.turns),
        "question": question,
        "state": state,
        "message": message,
        "pace": site.slower,
        "lanes": [lane.view(whole=state != "running") for lane in lanes],
        "verdict": verdict(lanes) if state == "done" else None,
    }


def written(view: dict[str, Any]) -> str:
    """A view as text, which gradio sends as it is; of objects it would work out the differences, slowly."""
    return json.dumps(view).replace("<", "\\u003c")


async def answer(
    site: Site, session: Session, text: str, settings: Settings, *, race: bool
) -> AsyncIterator[dict[str, Any]]:
    """Views of the stage while `text` is answered."""
    session.runs += 1
    session.stop = False
    question = text.strip()
    if not question:
        yield view(site, session, "", [], "failed", "There is no question yet: type one, or click an example.")
        return
    earlier = session.turns if settings.history else []
    messages = [
        message
        for turn in earlier
        for message in (
            {"role": "user", "content": turn["question"]},
            {"role": "assistant", "content": turn["answer"]},
        )
    ]
    messages.append({"role": "user", "content": question})
    body = {"messages": messages, "mode": "autoregressive", **settings.common()}
    lanes = [Lane(AUTOREGRESSIVE, {**body, "model": site.ar if site.adapted else site.model})]
    if site.adapted:
        diffusion = Lane(DIFFUSION, {"model": site.model, "messages": messages, **settings.diffusion()})
        lanes = [diffusion, *lanes] if race else [diffusion]
    yield view(site, session, question, lanes, "running")
    async for _ in run(site.client, lanes, lambda: session.stop):
        yield view(site, session, question, lanes, "running")
    if earlier and any(lane.error for lane in lanes):
        lanes[0].error = f"{lanes[0].error or ''} Earlier turns went along; 'New chat' forgets them.".strip()
    state = "stopped" if session.stop else "failed" if any(lane.error for lane in lanes) else "done"
    yield view(site, session, question, lanes, state, "Stopped." if session.stop else "")
    if lanes[0].text:
        session.turns.append({"question": question, "answer": lanes[0].text})


def build(site: Site) -> gr.Blocks:
    """The page, to be launched with `look()`."""
    page: gr.Blocks = gr.Blocks(title="parablock", analytics_enabled=False, fill_width=True)
    with page:
        session = gr.State(Session())
        gr.HTML(_head(site))
        with gr.Row(elem_classes="pb-row"):
            with gr.Column(scale=7, min_width=320):
                stage = gr.HTML(
                    None,
                    html_template=(STATIC / "stage.html").read_text(),
                    js_on_load=(STATIC / "stage.js").read_text(),
                    apply_default_css=False,
                    elem_id="stage",
                )
                with gr.Group(elem_classes="pb-box"):
                    box = gr.Textbox(
                        placeholder="Type a question", show_label=False, container=False, lines=2, max_lines=8,
                        elem_id="question", autofocus=True, submit_btn=False,
                    )  # fmt: skip
                with gr.Row(elem_classes="pb-ask"):
                    ask = gr.Button("Ask", variant="primary", elem_id="ask", min_width=60)
                    race = gr.Button("Race AR", elem_id="race", min_width=60, visible=site.adapted)
                    stop = gr.Button("Stop", elem_id="stop", interactive=False, min_width=60)
                    clear = gr.Button("New chat", elem_id="clear", min_width=60)
                gr.Examples(list(site.examples), box, label="Examples", elem_id="examples")
            with gr.Column(scale=3, min_width=260, elem_classes="pb-settings"):
                controls = _controls(site)
        outputs = [stage, box, ask, race, stop]
        inputs = [session, box, *controls]

        async def answering(session: Session, text: str, values: tuple[Any, ...], *, race: bool) -> AsyncIterator[Any]:
            busy = (
                "" if text.strip() else gr.skip(),
                gr.Button(interactive=False),
                gr.Button(interactive=False),
                gr.Button(interactive=True),
            )
            free = (gr.Button(interactive=True), gr.Button(interactive=True), gr.Button(interactive=False))
            for _ in range(25):  # the last answer may be about to end
                if session.busy:
                    await asyncio.sleep(0.02)
            if session.busy:  # Enter, while an answer is still coming
                yield (gr.skip(),) * 5
                return
            first, shown, session.busy = True, None, True
            try:
                async for shown in answer(site, session, text, Settings(*values), race=race):
                    yield written(shown), *(busy if first else [gr.skip()] * 4)
                    first = False
            finally:
                session.busy = False  # before the buttons are free: whoever asks then is heard
            assert shown is not None
            yield written(shown), (text if text.strip() and shown["state"] == "failed" else gr.skip()), *free

        async def asked(session: Session, text: str, *values: Any) -> AsyncIterator[Any]:
            async for update in answering(session, text, values, race=False):
                yield update

        async def raced(session: Session, text: str, *values: Any) -> AsyncIterator[Any]:
            async for update in answering(session, text, values, race=True):
                yield update

        async def stopped(session: Session) -> None:
            session.stop = True

        async def cleared(session: Session) -> str:
            session.stop = True
            for _ in range(100):  # what is still coming ends first, or it would stand on the new page
                if session.busy:
                    await asyncio.sleep(0.02)
            session.turns.clear()
            session.runs += 1
            return written(view(site, session, "", [], "idle"))

        quiet: Any = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
        gr.on([ask.click, box.submit], asked, inputs, outputs, trigger_mode="multiple", **quiet)
        race.click(raced, inputs, outputs, trigger_mode="multiple", **quiet)
        stop.click(stopped, session, None, queue=False, **quiet)
        clear.click(cleared, session, stage, queue=False, **quiet)
    return page


def look() -> dict[str, Any]:
    """The page's fonts and colours, for `launch`; nothing of it is fetched from elsewhere."""
    theme = gr.themes.Base(
        primary_hue="indigo", neutral_hue="slate", radius_size="lg", font=FONTS,
        font_mono=("ui-monospace", "SF Mono", "Cascadia Mono", "DejaVu Sans Mono", "monospace"),
    )  # fmt: skip
    return {"theme": theme, "css_paths": STATIC / "stage.css", "footer_links": []}


def _head(site: Site) -> str:
    from html import escape

    facts: list[tuple[str, object]] = [("model", site.model)]
    facts += [("block size", site.block_size), ("AR", site.ar)] if site.adapted else [("AR", "one token per forward")]
    pills = "".join(f"<span>{name} <b>{escape(str(fact))}</b></span>" for name, fact in facts)
    return (
        '<div class="pb-head"><h1><i></i><i></i>parablock</h1>'
        "<p>Watch a language model write many tokens at a time.</p>"
        f'<div class="pb-facts">{pills}</div></div>'
    )


def _controls(site: Site) -> list[Any]:
    """The settings, in the order of `Settings`."""
    default = DecodeConfig()
    divisors = [size for size in range(1, site.block_size + 1) if site.block_size % size == 0]
    gr.HTML("<h3>Settings</h3>")
    strategy = gr.Radio(
        list(get_args(Strategy)), value=default.strategy, label="Strategy", info="Which tokens a forward reveals."
    )
    threshold = gr.Slider(0, 1, default.threshold, step=0.01, label="Threshold", info="Those more confident than this.")
    factor = gr.Slider(0.1, 8, default.factor, step=0.1, label="Factor", info="The more, the bolder.", visible=False)
    fixed = gr.Slider(1, site.block_size, 4, step=1, label="Tokens per step", info="So many each time.", visible=False)
    sub_block = gr.Dropdown(
        divisors, value=default.sub_block_size if default.sub_block_size in divisors else site.block_size,
        label="Sub-block size", info=f"Of the block's {site.block_size} tokens; sub-blocks are revealed in turn.",
    )  # fmt: skip
    cache = gr.Checkbox(default.sub_block_cache, label="Sub-block cache")
    temperature = gr.Slider(0, 2, default.temperature, step=0.05, label="Temperature")
    top_p = gr.Slider(0.05, 1, default.top_p, step=0.05, label="Top-p")
    with gr.Row():
        top_k = gr.Number(0, label="Top-k", info="0: of all.", precision=0, minimum=0, min_width=80)
        seed = gr.Number(-1, label="Seed", info="-1: any.", precision=0, minimum=-1, min_width=80)
    longest = max(16, min(2048, site.context // 2))
    max_tokens = gr.Slider(1, longest, min(512, longest), step=1, label="Max tokens")
    history = gr.Checkbox(site.history, label="Send earlier turns along", elem_id="history")

    def of_strategy(name: str) -> list[Any]:
        return [gr.Slider(visible=name == kind) for kind in ("threshold", "factor", "fixed")]

    strategy.change(of_strategy, strategy, [threshold, factor, fixed], queue=False, show_progress="hidden")
    return [history, strategy, threshold, factor, fixed, sub_block, cache, temperature, top_p, top_k, seed, max_tokens]
