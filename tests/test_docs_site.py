"""The documentation holds together: links and anchors lead somewhere, every page is in the navigation and has the
outline of its kind, and what is made from kept results is that of the results there are.

`make docs` checks the links of the built site as well; this needs no site."""

from __future__ import annotations

import re
import runpy
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "examples" / "models" / "README.md", *PAGES]
OUTLINE = (
    "What happens",
    "When it pays",
    "What it costs",
    "How to use it",
    "Options",
    "Figures",
    "Limits",
    "Sources",
)
LARGEST = 150_000
"""Bytes of a picture."""

families = runpy.run_path(str(ROOT / "benchmarks" / "families.py"))
pictures = runpy.run_path(str(ROOT / "benchmarks" / "pictures.py"))
FAMILIES = sorted({page for _, page, *_ in families["FAMILIES"]})


@cache
def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def headings(page: Path) -> Iterator[tuple[str, str]]:
    """(tag, text) of each, without marks of emphasis and code."""
    found = tokens(page)
    for opening, inline in pairwise(found):
        if opening.type == "heading_open":
            yield opening.tag, "".join(child.content for child in inline.children or ())


@cache
def anchors(page: Path) -> set[str]:
    """As GitHub makes them; the site agrees wherever one is linked to, else it does not build."""
    seen: Counter[str] = Counter()
    made = set()
    for _, text in headings(page):
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        made.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return made


def links(page: Path) -> Iterator[str]:
    for token in tokens(page):
        for child in token.children or ():
            if child.type in ("link_open", "image"):
                yield str(child.attrs.get("href", child.attrs.get("src")))


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if re.match(r"https?://", link):
            continue
        where, _, anchor = link.partition("#")
        target = (page.parent / where).resolve() if where else page
        assert target.exists(), f"{page.name}: {link} leads nowhere"
        assert page not in PAGES or target.is_relative_to(DOCS), f"{page.name}: {link} is no part of the site"
        if anchor:
            assert anchor in anchors(target), (
                f"{page.name}: {link}: no such heading (there are {anchors(target)})"
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_read_alike_on_the_site(page: Path) -> None:
    """The site's Markdown nests lists by four columns, and pages hold no HTML but comments."""
    lines = page.read_text(encoding="utf-8").splitlines()
    depth = 0
    for token in tokens(page):
        depth += {"list_item_open": 1, "list_item_close": -1}.get(token.type, 0)
        if token.type == "list_item_open" and token.map:
            line = lines[token.map[0]]
            assert len(line) - len(line.lstrip()) >= 4 * (depth - 1), (
                f"{page.name}: nest by four columns: {line}"
            )
        assert token.type != "html_block" or token.content.lstrip().startswith("<!--"), token.content
        for child in token.children or ():
            assert child.type != "html_inline" or child.content.startswith("<!--"), (
                f"{page.name}: {child.content}"
            )
    assert [tag for tag, _ in headings(page)].count("h1") == 1


def test_every_page_is_in_the_navigation_once() -> None:
    def within(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for part in entry.values() if isinstance(entry, dict) else entry:
                yield from within(part)

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert Counter(within(nav)) == Counter(page.name for page in PAGES)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_the_outline_of_its_kind(name: str) -> None:
    found = [text for tag, text in headings(DOCS / name) if tag == "h2"]
    missing = [part for part in OUTLINE if not any(text.startswith(part) for text in found)]
    assert not missing, f"{name} has no section {missing}"


def test_pictures_are_small_and_shown() -> None:
    shown = {link for page in PAGES for link in links(page)}
    for picture in (DOCS / "pictures").iterdir():
        assert f"pictures/{picture.name}" in shown, f"{picture.name} is on no page"
        assert picture.stat().st_size <= LARGEST, f"{picture.name} has more than {LARGEST // 1000} kB"


@pytest.mark.parametrize("name", pictures["CHARTS"])
def test_charts_are_of_the_results_there_are(name: str) -> None:
    _, sources = pictures["CHARTS"][name]
    found = pictures["digest_in"](DOCS / "pictures" / f"{name}.svg")
    assert found == pictures["digest"](sources), f"draw it anew: python benchmarks/pictures.py {name}"


@pytest.mark.parametrize(("page", "name"), families["TABLES"])
def test_tables_are_of_the_results_there_are(page: str, name: str) -> None:
    start, end = families["marks"](name)
    written = (DOCS / page).read_text(encoding="utf-8").split(start)[1].split(end)[0].strip()
    assert written == families["TABLES"][page, name](), "write it anew: make pages"
