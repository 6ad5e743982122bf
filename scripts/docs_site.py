"""Build the documentation site: gather the pages, build them strictly, check what came out.

    python scripts/docs_site.py

Pages are the files of docs/ and a few of the repository's own (PAGES). Links are written for the repository, where
every file has its place; here links to pages lead to pages, other files are copied beside them, and a link to a folder,
which has no page, becomes plain text. The result, build/site, fetches nothing from elsewhere; `check_site` sees to that
and to every link, picture and anchor.
"""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {
    ROOT / "ARCHITECTURE.md": "architecture.md",
    ROOT / "CONTRIBUTING.md": "contributing.md",
    ROOT / "CHANGELOG.md": "changelog.md",
    ROOT / "parablock" / "bundled" / "README.md": "bundled.md",
    ROOT / "parablock" / "bundled" / "smollm2" / "README.md": "smollm2.md",
    **{path: path.name for path in sorted(DOCS.glob("*.md"))},
}
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\]\([^)]*\))*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def gather(out: Path) -> None:
    """Write all pages and the files they link to into the folder `out`."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shutil.copyfile(DOCS / "style.css", out / "style.css")
    for source, name in PAGES.items():
        pieces = re.split(r"(^```.*?^```)", source.read_text(), flags=re.M | re.S)  # code is left alone
        (out / name).write_text("".join(p if p.startswith("```") else _with_links(p, source, out) for p in pieces))


def _with_links(text: str, source: Path, out: Path) -> str:
    """Text of `source` with links as the site has them."""
    return LINK.sub(lambda match: _link(match, source, out), text)


def _link(match: re.Match[str], source: Path, out: Path) -> str:
    """One link of `source`, as the site has it; what it leads to is copied if it is no page."""
    target, anchor = match[2], match[3] or ""
    label = _with_links(match[1], source, out)  # which may be a picture
    path = (source.parent / target).resolve()
    if urlsplit(target).scheme:
        place = target
    elif path in PAGES:
        place = PAGES[path]
    elif path.is_dir():
        return label
    elif path.is_file() and path.suffix != ".md":
        place = str(path.relative_to(DOCS) if path.is_relative_to(DOCS) else Path("files") / path.relative_to(ROOT))
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / place)
    else:
        raise ValueError(f"{source.name} links to {target}: no page and no file; mend the link, or add it to PAGES")
    return f"[{label}]({place}{anchor})"


class _Page(HTMLParser):
    """What a page loads, where its links lead, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        (self.links if tag == "a" else self.loads).extend(given[name] for name in ("src", "href") if name in given)


def check_site(site: Path) -> list[str]:
    """What is wrong with a built site, in lines: outside files that a page would fetch, links that lead nowhere."""
    pages = {path: _Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    wrong = []
    for path, page in pages.items():
        name = path.relative_to(site)
        wrong += [f"{name} loads {load}" for load in page.loads if urlsplit(load).netloc]
        for link in {
            link for link in page.links + page.loads if not urlsplit(link).scheme and not urlsplit(link).netloc
        }:
            parts = urlsplit(link)
            place = site if parts.path.startswith("/") else path.parent
            target = (place / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                wrong.append(f"{name} links to {link}, which does not exist")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                wrong.append(f"{name} links to {link}, and there is no such anchor")
    for style in sorted(site.rglob("*.css")):
        outside = re.findall(r"url\(['\"]?((?:https?:)?//[^)'\"]+)", style.read_text())
        wrong += [f"{style.relative_to(site)} loads {url}" for url in outside]
    return wrong


def main() -> None:
    gather(ROOT / "build" / "pages")
    tool = Path(sys.executable).with_name("zensical")
    if subprocess.run([tool, "build", "--clean", "--strict"], cwd=ROOT, check=False).returncode:
        raise SystemExit("the site was not built; what is wrong is said above")
    if wrong := check_site(ROOT / "build" / "site"):
        raise SystemExit("\n".join(wrong))
    print("build/site/index.html")


if __name__ == "__main__":
    main()
