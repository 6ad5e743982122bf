"""The web page: chat, live decoding with replay, and AR racing block diffusion or speculative decoding."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from parablock.app.controls import Settings, Site, controls
from parablock.app.lanes import Lane, run, verdict
from parablock.app.session import Session, Turn, latest, messages, stored
from parablock.decoding.config import Mode

STATIC = Path(__file__).parent / "static"
SCRIPTS = ("cells.js", "keep.js", "stage.js")  # one after the other
RESTORE = """(session, stage) => {
    try { return [session, localStorage.getItem(STORE)]; } catch { return [session, null]; }  // it may be forbidden
}"""
TITLES: dict[Mode, str] = {
    "diffusion": "Block diffusion", "autoregressive": "Autoregressive", "speculative": "Speculative"
}  # fmt: skip
EXPLAINED: dict[Mode, str] = {
    "diffusion": "Every grey box is a token the model has yet to reveal; each forward reveals all those it is sure of.",
    "speculative": "Grey tokens are drafts, which the next forward verifies: right ones turn green, wrong ones are "
    "struck out. So the answer is what the model writes token by token.",
}
FONTS = ("Inter", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")


@dataclass(frozen=True)
class Parts:
    """The elements of the chat."""

    stage: gr.HTML
    box: gr.Textbox
    ask: gr.Button
    race: gr.Button
    stop: gr.Button
    again: gr.Button
    clear: gr.Button


def view(
    site: Site,
    session: Session,
    turns: Sequence[Turn],
    question: str,
    lanes: Sequence[Lane],
    state: str,
    message: str = "",
) -> dict[str, Any]:
    """The value of the stage: `turns` above, then the question and its answers. `kept`: what the browser keeps."""
    return {
        "run": session.run,
        "turns": list(turns),
        "question": question,
        "state": state,
        "message": message,
        "pace": site.slower,
        "lanes": [lane.view(whole=state != "running") for lane in lanes],
        "verdict": verdict(lanes) if state == "done" else None,
        "store": _store(site),
        "kept": None if state == "running" else list(session.turns),
    }


def written(view: dict[str, Any]) -> str:
    """A view as text, which gradio sends as it is; of objects it would work out the differences, slowly."""
    return json.dumps(view).replace("<", "\\u003c")


async def answer(
    site: Site, session: Session, text: str, settings: Settings, *, race: bool, again: bool
) -> AsyncIterator[dict[str, Any]]:
    """Views of the stage while `text` is answered; `again`: in place of the last answer."""
    session.begin()
    question = text.strip()
    turns = session.turns[:-1] if again else session.turns
    if not question:
        nothing = "There is no question yet: type one, or click an example."
        yield view(site, session, turns, "", [], "failed", nothing)
        return
    earlier = turns if settings.history else []
    asked = messages(earlier, settings.system, question)
    if race and settings.seed in (None, -1):
        settings = replace(settings, seed=secrets.randbelow(2**31))  # what is sampled is drawn alike
    runners: list[tuple[Mode, str]] = [(site.mode, site.model), ("autoregressive", site.ar)]
    lanes = [
        Lane(TITLES[mode], {"model": model, "messages": asked, **settings.of(mode)})
        for mode, model in (runners if race else runners[:1])
    ]
    yield view(site, session, turns, question, lanes, "running")
    async for _ in run(site.client, lanes, lambda: session.stop):
        yield view(site, session, turns, question, lanes, "running")
    for lane in lanes:
        lane.advise(system=bool(settings.system.strip()), earlier=bool(earlier))
    if lanes[0].text:
        session.turns = latest([*turns, {"question": question, "answer": lanes[0].text}])
    state = "stopped" if session.stop else "failed" if any(lane.error for lane in lanes) else "done"
    yield view(site, session, turns, question, lanes, state, "Stopped." if session.stop else "")


def build(site: Site) -> gr.Blocks:
    """The page, to be launched with `look()`."""
    page: gr.Blocks = gr.Blocks(title="parablock", analytics_enabled=False, fill_width=True)
    with page:
        gr.HTML(_head(site))
        with gr.Row(elem_classes="pb-row"):
            with gr.Column(scale=7, min_width=320):
                parts = _chat(site)
            with gr.Column(scale=3, min_width=260, elem_classes="pb-settings"):
                chosen = controls(site)
        _connect(site, page, parts, chosen)
    return page


def _chat(site: Site) -> Parts:
    stage = gr.HTML(
        None,
        html_template=(STATIC / "stage.html").read_text().replace("EXPLAINED", EXPLAINED[site.mode]),
        js_on_load="\n".join((STATIC / name).read_text() for name in SCRIPTS),
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
        again = gr.Button("Regenerate", elem_id="again", interactive=False, min_width=60)
        clear = gr.Button("New chat", elem_id="clear", min_width=60)
    gr.Examples(list(site.examples), box, label="Examples", elem_id="examples")
    return Parts(stage, box, ask, race, stop, again, clear)


def _connect(site: Site, page: gr.Blocks, parts: Parts, chosen: list[Any]) -> None:
    """What happens when something is clicked, and when the page is loaded."""
    session = gr.State(Session())
    inputs = [session, parts.box, *chosen]
    outputs = [parts.stage, parts.box, parts.ask, parts.race, parts.stop, parts.again]

    def answering(**how: bool) -> Callable[..., AsyncIterator[Any]]:
        async def updates(session: Session, text: str, *values: Any) -> AsyncIterator[Any]:
            async for update in _answering(site, session, text, values, **how):
                yield update

        return updates

    async def stopped(session: Session) -> None:
        session.stop = True

    async def cleared(session: Session) -> tuple[Any, ...]:
        session.stop = True
        while session.busy:  # what is still coming ends first, or it would stand on the new page
            await asyncio.sleep(0.02)
        session.begin()
        session.turns = []
        return written(view(site, session, [], "", [], "idle")), gr.Button(interactive=False)

    async def loaded(session: Session, kept: str | None) -> tuple[Any, ...]:
        if session.busy or session.turns or kept is None:
            return gr.skip(), gr.skip()
        session.begin()
        session.turns = stored(kept)
        shown = view(site, session, session.turns, "", [], "idle")
        return written(shown), gr.Button(interactive=bool(session.turns))

    quiet: Any = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
    asking: Any = {"inputs": inputs, "outputs": outputs, "trigger_mode": "multiple", **quiet}
    gr.on([parts.ask.click, parts.box.submit], answering(), **asking)
    parts.race.click(answering(race=True), **asking)
    parts.again.click(answering(again=True), **asking)
    parts.stop.click(stopped, session, None, queue=False, **quiet)
    parts.clear.click(cleared, session, [parts.stage, parts.again], queue=False, **quiet)
    kept = RESTORE.replace("STORE", json.dumps(_store(site)))
    page.load(loaded, [session, parts.stage], [parts.stage, parts.again], js=kept, queue=False, **quiet)


async def _answering(
    site: Site, session: Session, text: str, values: tuple[Any, ...], *, race: bool = False, again: bool = False
) -> AsyncIterator[Any]:
    """The stage, the box and the buttons while an answer comes; `again`: to the last question, not to what is typed."""
    for _ in range(25):  # the last answer may be about to end
        if session.busy:
            await asyncio.sleep(0.02)
    if session.busy:  # Enter, while an answer is still coming
        yield (gr.skip(),) * 6
        return
    if again:
        text = session.turns[-1]["question"] if session.turns else ""
    typed = bool(text.strip()) and not again
    yields, shown, session.busy = 0, None, True
    try:
        async for shown in answer(site, session, text, Settings(*values), race=race, again=again):
            yield written(shown), *([gr.skip()] * 5 if yields else ["" if typed else gr.skip(), *_buttons(session)])
            yields += 1
    finally:
        session.busy = False  # before the buttons are free: whoever asks then is heard
    assert shown is not None
    yield written(shown), (text if typed and shown["state"] == "failed" else gr.skip()), *_buttons(session)


def _buttons(session: Session) -> tuple[gr.Button, ...]:
    """Those to ask, to race, to stop and to ask again."""
    free = not session.busy
    return tuple(gr.Button(interactive=on) for on in (free, free, not free, free and bool(session.turns)))


def _store(site: Site) -> str:
    """The name under which the browser keeps the conversation with a model."""
    return f"parablock: {site.model}"


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
