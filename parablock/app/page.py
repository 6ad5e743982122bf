"""The web page: chat, live decoding with replay, and AR racing block diffusion or speculative decoding."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gradio as gr

from parablock.app.controls import Settings, Site, controls
from parablock.app.lanes import Lane, run, verdict
from parablock.decoding.config import Mode

STATIC = Path(__file__).parent / "static"
TITLES: dict[Mode, str] = {
    "diffusion": "Block diffusion", "autoregressive": "Autoregressive", "speculative": "Speculative"
}  # fmt: skip
EXPLAINED: dict[Mode, str] = {
    "diffusion": "Every grey box is a token the model has yet to reveal; each forward reveals all those it is sure of.",
    "speculative": "Grey tokens are drafts, which the next forward verifies: right ones turn green, wrong ones are "
    "struck out. So the answer is what the model writes token by token.",
}
FONTS = ("Inter", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")


@dataclass
class Session:
    """One visitor's conversation."""

    turns: list[dict[str, str]] = field(default_factory=list)
    runs: int = 0
    stop: bool = False
    busy: bool = False


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
    if race and settings.seed in (None, -1):
        settings = replace(settings, seed=secrets.randbelow(2**31))  # what is sampled is drawn alike
    runners: list[tuple[Mode, str]] = [(site.mode, site.model), ("autoregressive", site.ar)]
    lanes = [
        Lane(TITLES[mode], {"model": model, "messages": messages, **settings.of(mode)})
        for mode, model in (runners if race else runners[:1])
    ]
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
                    html_template=(STATIC / "stage.html").read_text().replace("EXPLAINED", EXPLAINED[site.mode]),
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
                    race = gr.Button("Race AR", elem_id="race", min_width=60)
                    stop = gr.Button("Stop", elem_id="stop", interactive=False, min_width=60)
                    clear = gr.Button("New chat", elem_id="clear", min_width=60)
                gr.Examples(list(site.examples), box, label="Examples", elem_id="examples")
            with gr.Column(scale=3, min_width=260, elem_classes="pb-settings"):
                chosen = controls(site)
        outputs = [stage, box, ask, race, stop]
        inputs = [session, box, *chosen]

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
            while session.busy:  # what is still coming ends first, or it would stand on the new page
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

    sources = " and ".join(name for name in site.drafters if name != "both")
    own = ("block size", site.block_size) if site.mode == "diffusion" else ("drafts by", sources)
    facts: list[tuple[str, object]] = [("model", site.model), own, ("AR", site.ar)]
    pills = "".join(f"<span>{name} <b>{escape(str(fact))}</b></span>" for name, fact in facts)
    return (
        '<div class="pb-head"><h1><i></i><i></i>parablock</h1>'
        "<p>Watch a language model write many tokens at a time.</p>"
        f'<div class="pb-facts">{pills}</div></div>'
    )
