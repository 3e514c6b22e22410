"""docs/passes.md says what the passes declare, of every option something is said, and tables elsewhere agree."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from elision.passes.base import known_passes
from elision.passes.docs import PAGES, page
from elision.passes.options import default_text, option_help

DOCS = Path(__file__).parents[2] / "docs"
OWN = [name for name, kind in known_passes().items() if kind.__module__.startswith("elision.")]


def test_the_page_of_passes_is_current() -> None:
    assert (DOCS / "passes.md").read_text(encoding="utf-8") == page(), (
        "write it anew: python -c 'import elision.passes.docs as d; print(d.page(), end=\"\")' > docs/passes.md"
    )


@pytest.mark.parametrize("name", OWN)
def test_of_every_option_something_is_said(name: str) -> None:
    silent = [option for option, said in option_help(known_passes()[name].Options).items() if not said]
    assert not silent, f"the docstring of {name}'s options does not say `option`: ... of {silent}"


@pytest.mark.parametrize("name", OWN)
def test_every_pass_is_told_about_on_a_page(name: str) -> None:
    assert name in PAGES, f"passes/docs.py does not say on which page {name} is told about"
    assert f"`{name}" in re.sub(r"\n {4}\b", "\n`", (DOCS / PAGES[name]).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", OWN)
def test_a_table_of_options_agrees_with_the_declaration(name: str) -> None:
    """A page about one pass may have a table of its options with their defaults: names and defaults are true."""
    if [PAGES[other] for other in OWN].count(PAGES[name]) > 1:
        return  # a page about several passes: passes.md has their options
    text = (DOCS / PAGES[name]).read_text(encoding="utf-8")
    known = {entry.name: default_text(entry) for entry in fields(known_passes()[name].Options)}
    for head, body in re.findall(r"^(\| option \|.*)\n\|[ |-]+\n((?:\|.*\n)+)", text, re.MULTILINE):
        if "default" not in head:
            continue
        column = [cell.strip() for cell in head.split("|")].index("default")
        for row in body.splitlines():
            cells = [cell.strip() for cell in row.split("|")]
            for option in re.findall(r"`(\w+)`", cells[1]):
                assert option in known, f"{PAGES[name]}: {name} has no option {option}"
                told = cells[column].strip("`")
                assert known[option] == "none" or _same(told, known[option]), (
                    f"{PAGES[name]}: {option} is {known[option]}, not {told}"
                )


def _same(told: str, known: str | None) -> bool:
    try:
        return float(told) == float(known or "")
    except ValueError:
        return told == known


def test_help_of_options_is_read_off_a_docstring() -> None:
    @dataclass(frozen=True)
    class Options:
        """`first`: a number; of two kinds. second, `third`: told: together.
        fourth of nothing. `fifth`, of some: more. `last`: the end."""

        first: int = 0
        second: int = 0
        third: int = 0
        fourth: int = 0
        fifth: int = 0
        last: int = 0

    assert option_help(Options) == {
        "first": "a number; of two kinds",
        "second": "told: together. fourth of nothing",
        "third": "told: together. fourth of nothing",
        "fourth": "",
        "fifth": "of some: more",
        "last": "the end",
    }
