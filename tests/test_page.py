"""The web page in a real Chromium, over a real `parablock app` with a server of its own."""

import copy
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import httpx
import pytest
import torch
from odd_device import odd_device
from processes import run, start, start_function
from server_process import free_port

import parablock as pb
from parablock.app.client import Client
from parablock.data.chat import encode_prompt

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'parablock[app]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install playwright")
expect = sync_api.expect
expect.set_options(timeout=30_000)  # a busy machine is slow, not wrong

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed: apt-get install chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
QUESTION = "Nola had 80 lemons but lost 38 of them. On Friday 29 lemons break. How many lemons are there in the end?"
ADDRESS = r"http://[\d.]+:\d+"
ENDS = r'"outcome": "\w+"'
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with start("app", "bundled", "--port", free_port(), cold=True) as process:
        yield process.wait_for(ADDRESS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[Any]:
    contexts = []

    def opened(url: str = address, key: str | None = None, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.asked_for = []
        page.errors = []
        page.on("request", lambda request: page.asked_for.append(request.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(url)
        if key is not None:
            page.get_by_label("username").fill("parablock")
            page.get_by_label("password").fill(key)
            page.get_by_role("button", name="Login").click()
        page.wait_for_selector(".pb-stage")
        return page

    yield opened
    for context in contexts:
        context.close()


def _ask(page: Any, question: str, button: str = "#ask") -> None:
    page.fill("#question textarea", question)
    page.click(button)


def _shown(page: Any, lane: int = 0) -> str:
    """The text of an answer, without the signs that stand for line breaks."""
    text: str = page.locator(".pb-text").nth(lane).evaluate("node => node.textContent")
    return text.replace("↵", "")


def _masks(page: Any) -> int:
    return int(page.locator(".pb-text .pb-mask").count())


@in_browser
def test_a_question_is_watched_and_played_again(open_page: Any, address: str) -> None:
    page = open_page()
    page.evaluate(
        """() => {  // what a visitor sees, noted after every change
            window.seen = [];
            const note = () => {
                const text = document.querySelector('.pb-text');
                if (text) window.seen.push([text.querySelectorAll('.pb-mask').length, text.textContent.length]);
            };
            new MutationObserver(note).observe(document.querySelector('#stage'), {childList: true, subtree: true});
        }"""
    )
    _ask(page, QUESTION)
    page.wait_for_selector('.pb-lane[data-state="done"]')
    model, tokenizer = pb.load("bundled")
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": QUESTION}])
    answer = tokenizer.decode(pb.generate(model, prompt).tokens[0], skip_special_tokens=True)
    assert _shown(page) == answer
    assert _masks(page) == 0
    seen = page.evaluate("window.seen")
    assert any(masks > 0 for masks, _ in seen)
    assert any(masks > 0 and 0 < known < len(answer) for masks, known in seen)
    assert int(page.inner_text(".pb-count")) > 1
    assert float(page.inner_text(".pb-width")) > 1
    assert page.inner_text(".pb-first").endswith("s")
    assert int(page.inner_text(".pb-speed dd, dd.pb-speed").replace(",", "")) > 0

    page.click('[data-do="first"]')
    at_first, masks = _shown(page), _masks(page)
    assert at_first != answer
    assert masks > 0
    page.click('[data-do="forth"]')
    assert _masks(page) < masks or len(_shown(page)) > len(at_first)
    page.click('[data-do="back"]')
    assert _shown(page) == at_first
    last = page.locator(".pb-scrub").get_attribute("max")
    page.locator(".pb-scrub").fill(str(last))
    assert _shown(page) == answer
    page.select_option(".pb-pace", "100")
    page.click('[data-do="play"]')
    page.wait_for_function("document.querySelector('.pb-text .pb-mask')")
    page.select_option(".pb-pace", "1")
    expect(page.locator(".pb-text")).to_contain_text("####")

    token = page.locator(".pb-token").first
    by_confidence = token.evaluate("node => node.style.getPropertyValue('--h')")
    page.click('[data-colour="order"]')
    assert token.evaluate("node => node.style.getPropertyValue('--h')") != by_confidence
    hosts = {urlparse(url).hostname for url in page.asked_for if not url.startswith(("data:", "blob:"))}
    assert hosts == {urlparse(address).hostname}
    assert page.errors == []


@in_browser
def test_a_race_shows_both_answers_on_a_phone_too(open_page: Any) -> None:
    page = open_page(viewport=PHONE, color_scheme="dark")
    _ask(page, QUESTION, "#race")
    page.wait_for_selector(".pb-lane")
    page.select_option(".pb-pace", "1")
    page.wait_for_selector(".pb-verdict:not([hidden])")
    assert "as fast as" in page.inner_text(".pb-verdict")
    assert "####" in _shown(page, 0)
    assert "####" in _shown(page, 1)
    forwards = [int(text) for text in page.locator(".pb-count").all_inner_texts()]
    assert forwards[0] < forwards[1]
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.evaluate("document.body.classList.contains('dark')")


@in_browser
def test_messages_settings_and_history(open_page: Any) -> None:
    page = open_page()
    page.click("#ask")
    expect(page.locator(".pb-stage > .pb-alert")).to_contain_text("no question yet")
    _ask(page, "word " * 2000)
    expect(page.locator(".pb-lane .pb-alert")).to_contain_text(re.compile("context|tokens|longer"))
    page.get_by_role("radio", name="fixed").check()
    page.get_by_label("number input for Tokens per step").fill("1")
    page.get_by_label("number input for Tokens per step").blur()
    _ask(page, QUESTION)
    page.select_option(".pb-pace", "1")
    page.wait_for_selector('.pb-lane[data-state="done"]')
    assert float(page.inner_text(".pb-width")) < 1.5  # one token per step, besides the first of a block
    page.locator("#history input").check()
    _ask(page, QUESTION)
    expect(page.locator(".pb-turns .pb-answer")).to_contain_text("####")
    page.click("#clear")
    expect(page.locator(".pb-empty")).to_be_visible()


def _endless_model(folder: Path) -> Path:
    """The bundled model, deeper and with random weights: never sure, so one slow token per forward, without an end."""
    model, tokenizer = pb.load("bundled")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.layer_types, config.max_position_embeddings = 48, None, 2048
    torch.manual_seed(1)
    pb.save(type(model)(type(config)(**config.to_dict())), tokenizer, folder)
    return folder


def _race_without_end(page: Any) -> None:
    page.get_by_label("number input for Max tokens").fill("1900")
    page.get_by_label("number input for Max tokens").blur()
    _ask(page, QUESTION, "#race")
    page.wait_for_function("document.querySelectorAll('.pb-lane[data-state=running]:has(.pb-token)').length === 2")


@in_browser
def test_it_attaches_to_a_server_and_frees_what_nobody_watches(open_page: Any, tmp_path: Path) -> None:
    key = {"PARABLOCK_API_KEY": "secret"}
    model = _endless_model(tmp_path / "model")
    with start("serve", model, "--port", 0, environment=key) as server:
        url = server.wait_for(ADDRESS)
        with pytest.raises(ValueError, match="PARABLOCK_API_KEY"):
            Client(url, "wrong").models()
        with start("app", "--url", url, "--port", free_port(), environment=key) as app:
            address = app.wait_for(ADDRESS)
            page = open_page(address, "secret")
            _race_without_end(page)
            page.click("#stop")
            expect(page.locator(".pb-stage > .pb-alert")).to_contain_text("Stopped")
            expect(page.locator("#ask")).to_be_enabled()
            expect(page.locator(".pb-lane").first).to_have_attribute("data-state", "stopped")
            assert [server.wait_for(ENDS, n) for n in (1, 2)] == ['"outcome": "cancelled"'] * 2
            _race_without_end(page)
            page.close()
            assert [server.wait_for(ENDS, n) for n in (3, 4)] == ['"outcome": "cancelled"'] * 2
            page = open_page(address, "secret")
            server.kill()
            server.wait()
            _ask(page, QUESTION)
            expect(page.locator(".pb-lane .pb-alert")).to_contain_text("is gone")


@in_browser
def test_a_page_with_a_key_asks_for_it(browser: Any) -> None:
    port = free_port()
    with start(
        "app", "bundled", "--host", "0.0.0.0", "--port", port, environment={"PARABLOCK_API_KEY": "a key: ü"}
    ) as process:
        address = process.wait_for(rf"http://0.0.0.0:{port}").replace("0.0.0.0", "127.0.0.1")
        with httpx.Client(base_url=address) as visitor:
            for path in ("config", "info", "queue/data?session_hash=x", "gradio_api/info"):
                assert visitor.get(path).status_code in (401, 404), path
            for wrong in ("", "a key", "parablock"):
                assert visitor.post("login", data={"username": "x", "password": wrong}).status_code in (400, 422)
            assert visitor.get("config").status_code == 401
            assert visitor.post("login", data={"username": "x", "password": "a key: ü"}).status_code == 200
            assert visitor.get("config").status_code == 200
        page = browser.new_page()
        asked_for: list[str] = []
        page.on("request", lambda request: asked_for.append(request.url))
        page.goto(address)
        expect(page.get_by_text("PARABLOCK_API_KEY")).to_be_visible()
        assert page.locator(".pb-stage").count() == 0
        page.get_by_label("username").fill("anybody")
        page.get_by_label("password").fill("wrong")
        page.get_by_role("button", name="Login").click()
        expect(page.get_by_text("Incorrect")).to_be_visible()  # and the fields are empty again
        page.get_by_label("username").fill("anybody")
        page.get_by_label("password").fill("a key: ü")
        page.get_by_role("button", name="Login").click()
        page.wait_for_selector(".pb-stage")
        _ask(page, QUESTION)
        expect(page.locator(".pb-text")).to_contain_text("####")
        hosts = {urlparse(url).hostname for url in asked_for if not url.startswith(("data:", "blob:"))}
        assert hosts == {"127.0.0.1"}
        page.close()


@in_browser
def test_a_seed_and_top_k_are_those_of_the_answer(open_page: Any) -> None:
    page = open_page()
    page.get_by_label("number input for Temperature").fill("2")
    page.get_by_label("number input for Temperature").blur()
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Top-k").fill("5")
    page.get_by_label("Top-k").blur()
    page.get_by_label("number input for Max tokens").fill("40")
    page.get_by_label("number input for Max tokens").blur()
    _ask(page, QUESTION)
    page.select_option(".pb-pace", "1")
    page.wait_for_selector('.pb-lane[data-state="done"]')
    model, tokenizer = pb.load("bundled")
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": QUESTION}])
    config = pb.DecodeConfig(temperature=2.0, top_k=5, seed=7, max_new_tokens=40)
    expected = tokenizer.decode(pb.generate(model, prompt, config).tokens[0], skip_special_tokens=True)
    expect(page.locator(".pb-text")).to_contain_text(expected[-20:].splitlines()[-1])
    assert _shown(page) == expected


@in_browser
def test_a_page_whose_server_is_lost_ends(open_page: Any, tmp_path: Path) -> None:
    with start_function(odd_device, str(tmp_path), ["app", "bundled", "--port", str(free_port())]) as process:
        page = open_page(process.wait_for(ADDRESS))
        (tmp_path / "broken").touch()
        _ask(page, QUESTION)
        assert process.wait() == 2
        reason = "the engine of bundled has stopped (RuntimeError)"
        assert process.err.splitlines()[-1] == f"parablock: the page's own server has ended: {reason}"


def test_a_page_whose_server_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "uvloop.py").write_text("raise RuntimeError('this event loop does not fit')")
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    out = run("app", "bundled", "--port", free_port(), cold=True, environment={"PYTHONPATH": path})
    assert out.returncode == 2
    told = "parablock: the HTTP server did not start (this event loop does not fit)"
    assert out.stderr.splitlines()[-1] == told


def test_wrong_options_are_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for args, says in (
            (["bundled", "--port", 0], "port=0"),
            (["bundled", "--port", taken.getsockname()[1]], "choose another with --port"),
            (["--url", "http://127.0.0.1:9", "--port", free_port()], "parablock serve"),
            (["--url", "nonsense", "--port", free_port()], "url='nonsense'"),
            (["--url", "http://127.0.0.1:9", "--dtype", "int8"], "start it with --dtype instead"),
            (["no/such/model", "--port", free_port()], "no/such/model"),
        ):
            out = run("app", *args)
            told = out.stdout + out.stderr
            assert out.returncode == 2
            assert len(told.splitlines()) == 1, told
            assert says in told


def test_the_page_has_its_files() -> None:
    static = Path(pb.__file__).parent / "app" / "static"
    assert {path.name for path in static.iterdir()} == {"stage.html", "stage.css", "stage.js", "cells.js", "keep.js"}
    assert not re.search(r"https?://|@import|url\(", "".join(path.read_text() for path in static.iterdir()))
