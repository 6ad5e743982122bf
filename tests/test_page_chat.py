"""A conversation on the web page: asked anew, copied, told how to behave, and still there after a reload."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import start
from server_process import free_port

import parablock as pb
from parablock.app.session import KEPT_CHARACTERS, KEPT_TURNS, latest, stored
from parablock.data.chat import encode_prompt

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'parablock[app]'")
pytest.importorskip("playwright", reason="playwright drives the browser: pip install playwright")
from test_page import ADDRESS, QUESTION, _ask, _shown, browser, expect, in_browser, open_page

__all__ = ["browser", "open_page"]  # fixtures

OTHER = "Jodo has 12 marbles, and Lumi has twice as many. How many marbles are there in the end?"
STORE = "parablock: bundled"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with start("app", "bundled", "--port", free_port()) as process:
        yield process.wait_for(ADDRESS).replace("127.0.0.1", "localhost")


def answer_to(question: str, system: str = "", config: pb.DecodeConfig | None = None) -> str:
    model, tokenizer = pb.load("bundled")
    asked = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": question}]
    tokens = pb.generate(model, encode_prompt(tokenizer, asked), config).tokens[0]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def answered(page: Any, button: str = "#ask", question: str | None = None) -> str:
    """Ask (anew), and wait for the end of that answer."""
    page.evaluate("document.querySelectorAll('.pb-lane').forEach((lane) => lane.classList.add('old'))")
    if question is not None:
        page.fill("#question textarea", question)
    page.click(button)
    page.wait_for_selector(".pb-lane:not(.old)")
    page.select_option(".pb-pace", "1")
    page.wait_for_selector('.pb-stage[data-state="done"] .pb-lane:not(.old)[data-state="done"]')
    return _shown(page)


def sampled(page: Any) -> None:
    for label, value in (("Temperature", "2"), ("Max tokens", "40")):
        page.get_by_label(f"number input for {label}").fill(value)
        page.get_by_label(f"number input for {label}").blur()


def kept(page: Any) -> Any:
    text = page.evaluate("name => localStorage.getItem(name)", STORE)
    return text and json.loads(text)


@in_browser
def test_a_conversation_survives_a_reload(open_page: Any) -> None:
    page = open_page()
    expect(page.locator("#again")).to_be_disabled()
    turns = [{"question": question, "answer": answer_to(question)} for question in (QUESTION, OTHER)]
    for turn in turns:
        assert answered(page, question=turn["question"]) == turn["answer"]
    assert kept(page) == turns
    page.reload()
    expect(page.locator(".pb-turns .pb-question")).to_have_text([turn["question"] for turn in turns])
    shown = page.locator(".pb-turns .pb-answer span").evaluate_all("nodes => nodes.map((node) => node.textContent)")
    assert shown == [turn["answer"] for turn in turns]
    expect(page.locator(".pb-empty")).to_be_hidden()
    assert answered(page, "#again") == turns[1]["answer"]
    assert page.locator(".pb-turns .pb-answer").count() == 1
    assert kept(page) == turns
    assert open_page().locator(".pb-turns .pb-answer").count() == 0  # in another browser
    page.click("#clear")
    expect(page.locator(".pb-empty")).to_be_visible()
    expect(page.locator("#again")).to_be_disabled()
    assert kept(page) is None
    page.reload()
    page.wait_for_selector(".pb-empty")
    assert page.errors == []


@in_browser
@pytest.mark.parametrize("value", ["nonsense", '[{"question": "\\ud800", "answer": []}]', "[" * 50_000])
def test_what_somebody_else_has_stored_is_forgotten(open_page: Any, value: str) -> None:
    page = open_page()
    page.evaluate("([name, value]) => localStorage.setItem(name, value)", [STORE, value])
    page.reload()
    page.wait_for_selector(".pb-empty")
    page.wait_for_function("name => localStorage.getItem(name) === null", arg=STORE)
    answered(page, question=QUESTION)
    assert page.errors == []


@in_browser
def test_a_browser_that_keeps_nothing_has_the_page_too(open_page: Any) -> None:
    page = open_page()
    page.add_init_script("Object.defineProperty(window, 'localStorage', {get() { throw new Error('forbidden'); }})")
    page.reload()
    answered(page, question=QUESTION)
    page.click("#clear")
    expect(page.locator(".pb-empty")).to_be_visible()


@in_browser
def test_an_answer_is_given_anew(open_page: Any) -> None:
    page = open_page()
    greedy = answered(page, question=OTHER)
    sampled(page)
    answers = [answered(page, question="Hello!")]
    page.fill("#question textarea", "not yet asked")
    answers += [answered(page, "#again") for _ in range(3)]
    assert len({*answers}) > 1
    assert page.input_value("#question textarea") == "not yet asked"
    turns = [{"question": OTHER, "answer": greedy}, {"question": "Hello!", "answer": answers[-1]}]
    assert kept(page) == turns
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Seed").blur()
    expected = answer_to("Hello!", config=pb.DecodeConfig(temperature=2.0, seed=7, max_new_tokens=40))
    assert answered(page, "#again") == answered(page, "#again") == expected


@in_browser
@pytest.mark.parametrize("secure", [True, False])
def test_an_answer_is_copied_as_plain_text(open_page: Any, secure: bool) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    if not secure:  # so is a page by plain HTTP from another machine
        page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    for question, place in ((QUESTION, ".pb-lane"), (OTHER, ".pb-turns")):
        answered(page, question=question)
        page.click(f"{place} .pb-copy")  # of the answer, then of the same when it has become an earlier one
        expect(page.locator(f"{place} .pb-copy")).to_have_text("Copied")
        page.fill("#question textarea", "")
        page.focus("#question textarea")
        page.keyboard.press("Control+V")
        expect(page.locator("#question textarea")).to_have_value(answer_to(QUESTION))
    assert page.errors == []


@in_browser
def test_a_system_message_goes_along(open_page: Any) -> None:
    page = open_page()
    system = "Nola and Jodo are kind.\nThey buy 12 lemons."
    page.fill("#system textarea", system)
    expected = answer_to(QUESTION, system)
    assert expected != answer_to(QUESTION)
    assert answered(page, question=QUESTION) == expected


@in_browser
def test_a_model_without_a_system_role_is_told(open_page: Any, tmp_path: Path) -> None:
    model, tokenizer = pb.load("bundled")
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    pb.save(model, tokenizer, tmp_path / "model")
    with start("app", tmp_path / "model", "--port", free_port()) as process:
        page = open_page(process.wait_for(ADDRESS))
        page.fill("#system textarea", "Be kind.")
        _ask(page, QUESTION, "#race")
        told = page.locator(".pb-lane .pb-alert")
        expect(told).to_contain_text(["System role not supported"] * 2)
        expect(told).to_contain_text(["empty the field 'System message'"] * 2)
        page.fill("#system textarea", " ")
        expect(page.locator("#question textarea")).to_have_value(QUESTION)  # it is back in its box
        assert answered(page) == answer_to(QUESTION)


def test_what_is_kept_is_bounded() -> None:
    turns = [{"question": str(number), "answer": "yes"} for number in range(3 * KEPT_TURNS)]
    assert latest(turns) == turns[-KEPT_TURNS:] == stored(json.dumps(turns))
    long = {"question": "q" * KEPT_CHARACTERS, "answer": "a" * KEPT_CHARACTERS}
    assert latest([*turns, long]) == [long]
    assert latest([long, turns[0]]) == [turns[0]]
    assert latest([]) == []


@pytest.mark.parametrize(
    "text",
    [
        None, "", "null", "7", '"text"', "{}", '{"question": "a", "answer": "b"}', "[1]", "[[]]", '[{"question": "a"}]',
        '[{"question": "a", "answer": null}]', '[{"question": "\\ud800", "answer": "b"}]', "[" * 100_000, "9" * 10_000,
        '[{"question": "a", "answer": "b"}, 0]', " " * 2_000_000,
    ],
)  # fmt: skip
def test_of_what_is_no_conversation_nothing_is_read(text: str | None) -> None:
    assert stored(text) == []
