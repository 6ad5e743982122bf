"""Speculative decoding on the web page: a real Chromium over a real `parablock app` with a causal adapter."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import start
from server_process import free_port

import parablock as pb
from parablock.data.chat import encode_prompt

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'parablock[app]'")
pytest.importorskip("playwright", reason="playwright drives the browser: pip install playwright")
from test_page import ADDRESS, PHONE, QUESTION, _ask, browser, expect, in_browser, open_page

__all__ = ["browser", "open_page"]  # fixtures

SEEN = """() => {  // how many drafts, refused and accepted ones a visitor sees, noted after every change
    window.seen = [];
    const note = () => window.seen.push(
        ['draft', 'refused', 'accepted'].map((kind) => document.querySelectorAll(`.pb-text .pb-${kind}`).length));
    new MutationObserver(note).observe(document.querySelector('#stage'), {childList: true, subtree: true});
}"""


@pytest.fixture(scope="module")
def address(causal_adapter: Path) -> Iterator[str]:
    with start("app", causal_adapter, "--port", free_port()) as process:
        yield process.wait_for(ADDRESS)


@pytest.fixture(scope="module")
def answer(causal_adapter: Path) -> tuple[str, int, int]:
    """The text; how many tokens are drafted, and how many accepted."""
    model, tokenizer = pb.load(causal_adapter)
    config = pb.DecodeConfig(mode="speculative", draft_tokens=4)
    out = pb.generate(model, encode_prompt(tokenizer, [{"role": "user", "content": QUESTION}]), config)
    return tokenizer.decode(out.tokens[0], skip_special_tokens=True), out.drafted[0], out.accepted[0]


def settled(page: Any, lane: int = 0) -> str:
    """The text of an answer without its drafts."""
    nodes = page.locator(f".pb-lane:nth-child({lane + 1}) .pb-text > :not(.pb-draft, .pb-refused)")
    pieces: list[str] = nodes.evaluate_all("nodes => nodes.map((node) => node.textContent)")
    return "".join(pieces).replace("↵", "")


def kinds(page: Any, kind: str) -> int:
    return int(page.locator(f".pb-lane:first-child .pb-text .pb-{kind}").count())


@in_browser
def test_drafts_are_grey_then_accepted_or_struck_out(open_page: Any, answer: tuple[str, int, int]) -> None:
    text, drafted, accepted = answer
    page = open_page()
    expect(page.locator(".pb-empty")).to_contain_text("Grey tokens are drafts")
    expect(page.locator(".pb-facts")).to_contain_text("masks and lookup")
    assert not page.get_by_label("Sub-block cache").is_visible()
    page.evaluate(SEEN)
    page.get_by_label("number input for Draft tokens").fill("4")
    page.get_by_label("number input for Draft tokens").blur()
    _ask(page, QUESTION)
    page.select_option(".pb-pace", "1")
    page.wait_for_selector('.pb-lane[data-state="done"]')
    assert settled(page) == text
    assert kinds(page, "draft") == kinds(page, "refused") == 0  # nothing provisional remains
    assert kinds(page, "accepted") == accepted
    assert page.inner_text(".pb-right") == f"{accepted} of {drafted}"
    assert page.locator('[data-colour="drafts"]').get_attribute("aria-pressed") == "true"
    expect(page.locator('[data-scale="drafts"]')).to_be_visible()

    refused, steps = 0, int(page.locator(".pb-scrub").get_attribute("max")) + 1
    page.click('[data-do="first"]')
    waiting: list[str] = []
    for _ in range(steps):
        before = page.locator(".pb-text .pb-draft").all_text_contents()
        assert text.startswith(settled(page).rstrip())  # what a draft says is never part of the answer
        struck = page.locator(".pb-text .pb-refused").all_text_contents()
        assert not struck or not waiting or struck[-1] in waiting
        refused, waiting = refused + len(struck), before
        page.click('[data-do="forth"]')
    assert accepted <= drafted - refused <= accepted + 4  # at the very end nothing is struck out
    page.select_option(".pb-pace", "10")
    page.click('[data-do="play"]')
    page.wait_for_function("document.querySelector('.pb-text .pb-draft')")
    page.wait_for_function("document.querySelector('.pb-text .pb-refused')")
    page.click('[data-colour="confidence"]')
    assert kinds(page, "accepted") == 0
    assert any(seen[0] for seen in page.evaluate("window.seen"))
    assert page.errors == []


@in_browser
@pytest.mark.parametrize("temperature", ["0", "1"])
def test_a_race_shows_that_both_answers_are_equal(open_page: Any, answer: Any, temperature: str) -> None:
    page = open_page(viewport=PHONE)
    page.get_by_label("number input for Draft tokens").fill("4")
    page.get_by_label("number input for Temperature").fill(temperature)
    page.get_by_label("number input for Temperature").blur()
    _ask(page, QUESTION, "#race")
    page.wait_for_selector(".pb-lane")
    page.select_option(".pb-pace", "1")
    page.wait_for_selector(".pb-verdict:not([hidden])")
    assert page.locator(".pb-lane h3").all_inner_texts() == ["Speculative", "Autoregressive"]
    assert page.inner_text(".pb-texts") == "The two answers are identical, character for character."
    assert settled(page, 0) == settled(page, 1)
    assert temperature != "0" or settled(page, 0) == answer[0]
    forwards = [int(text) for text in page.locator(".pb-count").all_inner_texts()]
    assert forwards[0] < forwards[1]
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_where_answers_differ_is_told() -> None:
    from parablock.app.lanes import compared

    assert compared("one two", "one two")["equal"]
    told = compared("one two", "one three")
    assert told == {"equal": False, "words": "The answers differ from character 6 on: 'wo' against 'hree'."}
    assert compared("one", "one more")["words"].endswith("from character 4 on: the end against ' more'.")
