"""The documentation site: its pages are complete, and what is wrong with one is found. `make docs` builds it."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from docs_site import PAGES, ROOT, check_site, gather


def named_pages(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [name for part in (entry if isinstance(entry, list) else entry.values()) for name in named_pages(part)]


def test_every_page_has_its_place_in_the_navigation() -> None:
    nav = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    assert sorted(named_pages(nav)) == sorted(PAGES.values())


def test_pages_are_gathered_with_what_they_link_to(tmp_path: Path) -> None:
    gather(tmp_path)
    assert {path.name for path in tmp_path.glob("*.md")} == set(PAGES.values())
    assert (tmp_path / "images" / "denoising.gif").is_file()
    assert "(files/examples/serving.py)" in (tmp_path / "serving.md").read_text()
    assert (tmp_path / "files" / "examples" / "serving.py").is_file()
    assert "(../" not in (tmp_path / "performance.md").read_text()  # a link to a folder is plain text


def test_a_link_to_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lost.md").write_text("[here](nowhere.md)")
    monkeypatch.setitem(PAGES, tmp_path / "lost.md", "lost.md")
    with pytest.raises(ValueError, match=r"lost.md links to nowhere.md"):
        gather(tmp_path / "out")


def test_what_is_wrong_with_a_site_is_found(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(
        '<link rel="stylesheet" href="style.css"><script src="//cdn.example/x.js"></script><img src="gone.png">'
        '<h2 id="here"></h2><a href="#here"></a><a href="#there"></a><a href="https://outside.example"></a>'
        '<a href="/index.html#here"></a><a href="gone.html"></a>'
    )
    (tmp_path / "style.css").write_text(
        "@font-face { src: url('https://fonts.example/f.woff2'); } a { src: url(x.png); }"
    )
    assert sorted(check_site(tmp_path)) == [
        "index.html links to #there, and there is no such anchor",
        "index.html links to gone.html, which does not exist",
        "index.html links to gone.png, which does not exist",
        "index.html loads //cdn.example/x.js",
        "style.css loads https://fonts.example/f.woff2",
    ]
