"""Make the pictures of docs/page.md from the real page: `python scripts/page_pictures.py` (needs Chromium)."""

import io
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

IMAGES = Path(__file__).parent.parent / "docs" / "images"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
LETTER = "Write a short letter to my dentist, asking for an earlier appointment."  # to the model that drafts
QUESTION = (
    "Jodo has 12 marbles, Lumi has twice as many, and Jodo gives them all to Lumi. Lumi buys 26 more. "
    "How many marbles are there in the end?"
)
DESKTOP = {"width": 1200, "height": 830}
PHONE = {"width": 390, "height": 844}
LARGEST_GIF = 1_500_000


def start(model: str, folder: Path) -> tuple[subprocess.Popen[str], str]:
    """The page of a model, as seen from `folder`, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "parablock", "app", model, "--port", str(port)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"http://\S+", line):
            return process, found[0]
    raise SystemExit("the page did not start")


def opened(browser: Browser, url: str, size: Any, scheme: Any, scale: float = 1.5) -> Page:
    context = browser.new_context(
        viewport=size, color_scheme=scheme, device_scale_factor=scale, reduced_motion="reduce"
    )
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector(".pb-stage")
    return page


def ask(page: Page, button: str = "#ask", question: str = QUESTION) -> None:
    """Ask, wait for the end, and show it without a blinking cursor."""
    page.fill("#question textarea", question)
    if question == LETTER:
        page.get_by_label("number input for Max tokens").fill("96")
    page.click(button)
    page.wait_for_selector(".pb-lane")
    page.select_option(".pb-pace", "1")
    for lane in range(page.locator(".pb-lane").count()):
        page.locator(".pb-lane").nth(lane).and_(page.locator('[data-state="done"]')).wait_for()
    page.select_option(".pb-pace", "10")
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(600)


def scrub(page: Page, step: int) -> None:
    page.locator(".pb-scrub").fill(str(step))
    page.wait_for_timeout(600)


def shoot(page: Page, name: str) -> None:
    page.screenshot(path=IMAGES / f"{name}.png")


def animate(page: Page, name: str) -> None:
    """The stage's replay, one frame per forward, the last one shown longer."""
    steps = int(page.locator(".pb-scrub").get_attribute("max") or 0) + 1
    frames = []
    for step in range(steps):
        scrub(page, step)
        frames.append(Image.open(io.BytesIO(page.locator(".pb-stage").screenshot())).convert("RGB"))
    palette = frames[-1].quantize(255)
    whole = [Image.new("RGB", frames[-1].size, frame.getpixel((20, 20))) for frame in frames]  # the stage grows
    for frame, canvas in zip(frames, whole, strict=True):
        canvas.paste(frame)
    small = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in whole]
    durations = [900] * (steps - 1) + [3000]
    path = IMAGES / f"{name}.gif"
    small[0].save(path, save_all=True, append_images=small[1:], duration=durations, loop=0, optimize=True)
    if path.stat().st_size > LARGEST_GIF:
        raise SystemExit(f"{path} has {path.stat().st_size} bytes; make it smaller than {LARGEST_GIF}")


def blocks(browser: Browser, url: str) -> None:
    """Block diffusion: an answer in light and dark colours, on a phone, in a race, and step by step."""
    ask(opened(browser, url, DESKTOP, "light"))  # the first answer warms the engines up
    page = opened(browser, url, DESKTOP, "light")
    ask(page)
    scrub(page, 3)
    shoot(page, "page-light")
    page = opened(browser, url, DESKTOP, "dark")
    ask(page)
    page.click('[data-colour="order"]')
    page.wait_for_timeout(400)
    page.evaluate("document.activeElement.blur()")
    shoot(page, "page-dark")
    page = opened(browser, url, PHONE, "light", 2)
    ask(page)
    scrub(page, 3)
    shoot(page, "page-phone")
    page = opened(browser, url, {"width": 1200, "height": 1050}, "light")
    ask(page, "#race")  # the first race warms the other engine up
    page.click("#clear")
    page.wait_for_selector(".pb-empty:visible")
    ask(page, "#race")
    page.wait_for_selector(".pb-verdict:visible")
    page.mouse.move(0, 0)
    shoot(page, "page-race")
    page = opened(browser, url, {"width": 1200, "height": 860}, "light", 1)
    ask(page)
    animate(page, "denoising")


def drafts(browser: Browser, url: str) -> None:
    """Speculative decoding in the middle of an answer, and its race against AR."""
    ask(opened(browser, url, DESKTOP, "light"), question=LETTER)  # the first answer warms the engine up
    page = opened(browser, url, DESKTOP, "light")
    ask(page, question=LETTER)
    steps = int(page.locator(".pb-scrub").get_attribute("max") or 0) + 1
    for step in range(steps):  # one that shows all kinds of drafts, if there is one
        scrub(page, step)
        if page.locator(".pb-text .pb-draft").count() and page.locator(".pb-text .pb-refused").count():
            break
    else:
        scrub(page, steps // 2)
    page.evaluate("document.activeElement.blur()")
    page.mouse.move(0, 0)
    page.wait_for_timeout(600)
    shoot(page, "page-drafts")
    page = opened(browser, url, {"width": 1200, "height": 1050}, "light")
    ask(page, "#race", LETTER)
    page.wait_for_selector(".pb-verdict:visible")
    page.mouse.move(0, 0)
    shoot(page, "page-race-drafts")
    page = opened(browser, url, {"width": 1000, "height": 860}, "light", 1)
    ask(page, question=LETTER)
    animate(page, "drafting")


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        for model, take in (("bundled", blocks), ("smollm2", drafts)):
            process, url = start(model, folder)
            try:
                take(browser, url)
            finally:
                process.terminate()
                process.wait(20)
        browser.close()


if __name__ == "__main__":
    main()
