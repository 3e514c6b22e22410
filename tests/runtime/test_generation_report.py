"""The HTML report of one generation: its text, trees, chart, and what it must not hold."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from elision.passes.errors import ElisionError
from elision.runtime import generation_report
from elision.runtime.drafter_ngram import Ngram
from elision.runtime.drafter_recycling import Recycling
from elision.runtime.drafters import Union
from elision.runtime.generate import Generation, Generator
from elision.runtime.generation_pictures import committed_nodes, depths, time_chart, tree_picture
from elision.runtime.generation_report import Labels, render_generation, write_generation_report
from elision.runtime.lm_facts import facts_of_module
from elision.runtime.lm_text import Text
from elision.runtime.speculation import Speculation
from elision.runtime.verify_costs import flat

from .lm_double import Recompute, byte_tokenizer, tiny_llama

PROMPT = "<script>alert(1)</script> & again & again & "
COLOURS = {"ngram": "d0", "recycling": "d1"}


class Page(HTMLParser):
    """Every tag is closed in order and nothing is loaded; `tokens`: (class, id, text, link) of those in the text."""

    VOID = {"meta"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.tokens: list[Any] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        named = {name: value or "" for name, value in attrs}
        assert len(named) == len(attrs)
        assert not {"src", "srcset", "xlink:href", "action"} & set(named)
        assert named.get("href", "#").startswith("#")
        assert "url(" not in named.get("style", "")
        if "id" in named:
            self.ids.append(named["id"])
        if "data-id" in named:
            self.tokens.append([named["class"].split(), int(named["data-id"]), "", named.get("href")])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        raise AssertionError(f"{tag} closes itself")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.tokens and self.open[-1] in ("a", "span") and not self.tokens[-1][2]:
            self.tokens[-1][2] = data


def made(tokenizer, prompt=PROMPT, count=60, speculation=True, **options) -> tuple[Generator, Generation]:
    model = tiny_llama(vocabulary=260, positions=200)
    drafting = Speculation(Union([Ngram(), Recycling()]), flat(1e-3), guard=False) if speculation else None
    generator = Generator.around(
        Recompute(model, 200), facts_of_module(model), tokenizer, speculation=drafting
    )
    prompt = prompt if tokenizer is not None else [byte + 3 for byte in prompt.encode()]
    return generator, generator.generate(prompt, count, eos=[], trace=True, **options)


@pytest.fixture(scope="module")
def written():
    return made(byte_tokenizer())


@pytest.fixture(scope="module")
def page(written):
    return render_generation(*written, PROMPT)


def test_the_page_is_whole_and_alone(written, page, tmp_path):
    path = write_generation_report(tmp_path / "page.html", *written, PROMPT)
    assert path.read_text(encoding="utf-8") == page
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    parsed = Page(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "http://" not in page and "https://" not in page and "@import" not in page and "url(" not in page
    assert parsed.found.count("script") == 1  # ours
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; again" in page
    assert all(
        f"#{name}" != link or name in parsed.ids for *_, link in parsed.tokens for name in [link or ""]
    )


def test_every_token_is_there_once_in_the_colour_of_its_drafter(written, page):
    generator, result = written
    tokens = Page(page).tokens
    assert [token for _, token, _, _ in tokens] == result.token_ids
    expected: list[tuple[str | None, int, bool]] = [(None, 0, False)]
    for number, record in enumerate(result.trace, 1):
        nodes = committed_nodes(record)
        assert [record["tokens"][n] for n in nodes if n is not None] == record["new"][
            : len(nodes) - nodes.count(None)
        ]
        drawn = len(record["tokens"]) > 1
        expected += [
            (None if node is None else COLOURS[record["origins"][node]], number, drawn) for node in nodes
        ]
    assert {colour for colour, _, _ in expected} == {None, "d0", "d1"}  # else this would test little
    for (kinds, _, _, link), (colour, number, drawn) in zip(tokens, expected, strict=True):
        assert [kind for kind in kinds if kind.startswith("d")] == ([colour] if colour else [])
        assert link == (f"#round-{number}" if drawn else None)
    assert "".join(text for _, _, text, _ in tokens) == Labels(generator.text).plain(result.text)
    counts = {colour: sum(colour == c for c, _, _ in expected) for colour in (*COLOURS.values(), None)}
    legend = re.findall(r'<span class="t (d\d|)">[^<]*</span> (\d+)', page)
    assert {colour or None: int(count) for colour, count in legend} == counts


def test_each_tree_is_drawn(written, page):
    _, result = written
    trees = [record for record in result.trace if len(record["tokens"]) > 1]
    pictures = re.findall(r'<svg class="tree".*?</svg>', page)
    assert len(pictures) == len(trees) > 3
    for record, svg in zip(trees, pictures):
        own = committed_nodes(record)[-1] is None
        assert svg.count("<rect") == svg.count("<title>") == len(record["tokens"]) + own
        kept = len([node for node in committed_nodes(record) if node is not None])
        assert svg.count('class="kept ') == kept and svg.count('class="given"') == own
        places = re.findall(r'<rect x="(\d+)" y="(\d+)"', svg)
        assert len(set(places)) == len(places)
    assert page.count("<details open>") == 1
    figures = generation_report._figures(result)
    assert figures["rows"] == result.speculation["rows_verified"]
    assert figures["each"] == pytest.approx(result.speculation["tokens_per_verification"], abs=1e-3)
    assert sum(part["share"] for part in figures["shares"]) == pytest.approx(100)


def test_acceptance_is_that_of_the_engine(written):
    _, result = written
    shares = result.speculation["acceptance"]
    by_depth, by_rank = generation_report._acceptance(result.trace)
    for bars, theirs, first in ((by_depth, shares["by_depth"], 0), (by_rank, shares["by_rank"], 1)):
        for bar in bars["bars"]:
            if isinstance(bar["at"], int):
                assert bar["share"] / 100 == pytest.approx(theirs[str(bar["at"] - first)], abs=1e-4)


def test_without_a_tokenizer_ids_are_shown():
    generator, result = made(None)
    html = render_generation(generator, result, PROMPT)
    tokens = Page(html).tokens
    assert [text for _, _, text, _ in tokens] == [str(token) for token in result.token_ids]
    assert 'class="text ids"' in html


@pytest.mark.parametrize("count", [0, 1, 2])
def test_short_ones(count):
    generator, result = made(byte_tokenizer(), count=count)
    page = Page(render_generation(generator, result, PROMPT))
    assert [token for _, token, _, _ in page.tokens] == result.token_ids


def test_without_a_drafter_and_sampled():
    generator, result = made(byte_tokenizer(), count=12, speculation=False)
    html = render_generation(generator, result, "x" * 700)
    assert len(Page(html).tokens) == 12 and '<svg class="tree"' not in html
    assert "Rounds 1 to 11: no draft" in html and "the whole prompt" in html
    generator, result = made(byte_tokenizer(), count=30, temperature=1.0, seed=3)
    assert [
        token for _, token, _, _ in Page(render_generation(generator, result, "")).tokens
    ] == result.token_ids


def test_what_a_page_cannot_hold(written, monkeypatch):
    html = render_generation(*written, 'a\x00b\x1b"\ud800</div>\r\u0085')
    Page(html).text.encode()
    assert "␀" in html and "␛" in html and "␍" in html and "\x00" not in html and html.count("�") >= 2
    monkeypatch.setattr(generation_report, "TREES", 2)
    html = render_generation(*written, "")
    assert html.count('<svg class="tree"') == 2 and "The first 2 of" in html
    assert [token for _, token, _, _ in Page(html).tokens] == written[1].token_ids


def test_no_trace_and_no_place_to_write(written, tmp_path, monkeypatch):
    generator, result = written
    plain = generator.generate("hello", 2, eos=[])
    with pytest.raises(ElisionError, match="trace=True"):
        write_generation_report(tmp_path / "page.html", generator, plain, "hello")
    with pytest.raises(ElisionError, match="no such folder") as caught:
        write_generation_report(tmp_path / "none" / "page.html", generator, result, PROMPT)
    assert "\n" not in str(caught.value)
    with pytest.raises(ElisionError, match="a folder, not a file"):
        write_generation_report(tmp_path, generator, result, PROMPT)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ElisionError, match="No space left"):
        write_generation_report(tmp_path / "page.html", generator, result, PROMPT)
    assert list(tmp_path.iterdir()) == []


# ---- pictures ----------------------------------------------------------------------------------------
def record(tokens, parents, accepted, new, **others):
    made = {
        "tokens": tokens,
        "parents": parents,
        "accepted": accepted,
        "new": new,
        "draft": 1e-4,
        "verify": 1e-2,
    }
    return made | {"values": [0.5] * len(tokens), "origins": ["", *["ngram"] * (len(tokens) - 1)]} | others


def test_a_tree_lies_as_it_should():
    """Node 2 and its child 4 were accepted, 9 came from the model; 1 was refused, its child 3 never reached."""
    one = record([5, 1, 2, 3, 4], [-1, 0, 0, 1, 2], [0, 2, 4], [2, 4, 9])
    svg = tree_picture(one, lambda _, token: f"<{token}>", lambda _: "d0", "a & b")
    assert 'aria-label="a &amp; b"' in svg
    nodes = re.findall(r'<g class="([^"]*)"><title>&lt;(\d)&gt;[^<]*</title><rect x="(\d+)" y="(\d+)"', svg)
    kinds = {token: kind for kind, token, _, _ in nodes}
    assert kinds == {
        "5": "root", "1": "refused d0", "2": "kept d0", "3": "untested d0", "4": "kept d0", "9": "given",
    }  # fmt: skip
    x = {token: int(x) for _, token, x, _ in nodes}
    y = {token: int(y) for _, token, _, y in nodes}
    assert y["5"] == y["2"] == y["4"] == y["9"] < y["1"] == y["3"]
    assert x["5"] < x["1"] == x["2"] < x["3"] == x["4"] < x["9"]


def test_the_last_token_may_be_in_the_tree():
    ended = record([5, 1, 2], [-1, 0, 1], [0, 1], [1, 2])
    assert committed_nodes(ended) == [1, 2]
    assert 'class="given"' not in tree_picture(ended, lambda _, t: str(t), lambda _: "d0", "")
    assert committed_nodes(record([5, 1], [-1, 0], [0], [7])) == [None]


def test_a_tree_of_one_long_chain_and_a_broad_one():
    chain = record([1] * 64, list(range(-1, 63)), list(range(64)), [1] * 63 + [2])
    assert depths(chain["parents"]) == list(range(64))
    assert 'height="24"' in tree_picture(chain, lambda _, t: str(t), lambda _: "d0", "")
    broad = record(list(range(64)), [-1] + [0] * 63, [0], [99])
    svg = tree_picture(broad, lambda _, t: "wide 漢字 label of a token", lambda _: "d0", "")
    assert f'height="{64 * 24}"' in svg and ">wide 漢字 lab…</text>" in svg
    assert "<title>wide 漢字 label of a token: id 3, ngram" in svg


def test_chart():
    assert time_chart([]) == ""
    rounds = [record([1], [-1], [0], [1]) for _ in range(20)]
    rounds[3]["verify"] = 5.0
    svg = time_chart(rounds)
    assert svg.count('class="verify"') == 20 and svg.count('class="cut"') == 1
    assert "round 4: 1 token from 1 row; draft 0.1 ms, verify 5e+03 ms" in svg
    many = time_chart(rounds * 50)
    assert 200 <= many.count('class="verify"') <= 256 and "mean" in many
    time_chart([record([1], [-1], [0], [1], draft=0.0, verify=0.0)])


def test_labels():
    labels = Labels(Text(byte_tokenizer(), 260))
    assert labels(None, 3 + 32) == "␣" and labels(5, 3 + 10) == "↵" and labels(5, 3 + ord("a")) == "a"
    assert labels(None, 2) == "</s>" and labels(2, 3 + ord("a")) == "a"
    half = "é".encode()
    assert labels(None, 3 + half[0]) == "Ã"  # as the tokenizer writes that byte
    assert labels(None, 259) == "#259"
    assert labels.pieces([3 + half[0], 3 + half[1], 2]) == ["", "é", ""] and labels.special(2)
    assert Labels(None)(3, 7) == "7"
