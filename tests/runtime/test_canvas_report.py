"""Pictures of a canvas and its HTML report."""

from __future__ import annotations

import base64
import io
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from elision.passes.errors import ElisionError
from elision.runtime import canvas_pictures
from elision.runtime.canvas_pictures import (
    computed_by_step,
    map_picture,
    order_picture,
    png_bytes,
    prompt_of,
    step_colours,
    time_picture,
    write_map,
)
from elision.runtime.canvas_plan import canvas_ids
from elision.runtime.canvas_policies import Window
from elision.runtime.canvas_report import LEVELS, render_canvas, write_canvas_report
from elision.runtime.canvas_result import ACTIVE, BUFFER, DECIDED, FAR, REFRESHED, Result, Trace
from elision.runtime.canvas_sampler import Sampler
from matplotlib import image as reader

from .canvas_models import EagerCanvas, make

MASK, EOS = 39, 38
STATES = [
    [REFRESHED, REFRESHED, DECIDED, REFRESHED, FAR, FAR],
    [BUFFER, BUFFER, BUFFER, ACTIVE, DECIDED, FAR],
    [BUFFER, BUFFER, BUFFER, DECIDED, BUFFER, ACTIVE],
    [BUFFER, BUFFER, BUFFER, BUFFER, BUFFER, DECIDED],
]
TEXTS = ["<script>alert(1)</script>", " & ", "a\n", "", '"\x1b', "end"]
SETTINGS = {"policy": "window", "early <stop>": True, "temperature": 0.7, "seed": None, "eos": [1, 2]}


def made() -> Result:
    """Four steps of six positions, two of them given."""
    trace = Trace([np.array(row, np.uint8) for row in STATES])
    trace.positions, trace.tokens = [2, 4, 3, 5], [12, 14, 13, 15]
    trace.when, trace.confidence = [0, 1, 2, 3], [0.9, 0.25, 0.5, 1.0]
    return Result(
        [10, 11, 12, 13, 14, 15], [12, 13, 14, 15], steps=4, refreshes=1, refreshed=4, stepped=5, full=24,
        refresh_seconds=0.5, step_seconds=1.25, rest_seconds=0.25, trace=trace,
    )  # fmt: skip


def sampled(new=12, **options) -> Result:
    sampler = Sampler(
        EagerCanvas(make("llada"), 64), MASK, policy=Window(6, 2, 3, form="contiguous"), **options
    )
    return sampler.run([canvas_ids([3, 1, 4], new, MASK)], trace=True)[0]


def pixels(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3]."""
    return (reader.imread(io.BytesIO(data), format="png")[..., :3] * 255).round().astype(np.uint8)


def colour(state: int) -> list[int]:
    return list(bytes.fromhex(canvas_pictures.STATES[state][1][1:]))


# ---- pictures ----------------------------------------------------------------------------------------
def test_the_map_is_the_trace():
    trace = made().trace
    figure = map_picture(trace)
    (axes,) = figure.axes
    (image,) = axes.images
    assert np.array_equal(image.get_array(), STATES)
    assert image.get_extent() == [-0.5, 5.5, 4.5, 0.5]  # positions from 0, steps from 1 downwards
    assert [line.get_xdata()[0] for line in axes.lines] == [1.5, 1.5]  # behind the two that were given
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [name.split(":")[0] for name in names] == [
        "far", "buffer", "active", "refreshed", "decided in this step", "end of the prompt (2)",
    ]  # fmt: skip
    assert "cut by the early stop (5)" in [
        text.get_text() for text in map_picture(trace, end=5).legends[0].get_texts()
    ]
    assert len(map_picture(trace, prompt=0).axes[0].lines) == 0


def test_each_cell_of_the_map_has_its_colour():
    trace = made().trace
    drawn = pixels(png_bytes(map_picture(trace, prompt=0)))
    left, top, cell = canvas_pictures.LEFT, canvas_pictures.TOP, canvas_pictures.CELL
    for row, states in enumerate(STATES):
        for column, state in enumerate(states):
            at = drawn[top + row * cell + cell // 2, left + column * cell + cell // 2]
            assert at.tolist() == colour(state)


def test_states_differ_without_colour():
    grey = sorted(np.dot(colour(state), (0.299, 0.587, 0.114)) for state in canvas_pictures.STATES)
    assert min(np.diff(grey)) > 20


@pytest.mark.parametrize("steps, length, shape", [(1, 1, (1, 1)), (5, 4097, (5, 2049)), (4097, 3, (1366, 3))])
def test_every_size_is_drawn(steps, length, shape):
    """Where cells are shared, nothing that was done is lost."""
    states = np.full((steps, length), FAR, np.uint8)
    states[-1, -1] = DECIDED
    trace = Trace(list(states), [length - 1], [7], [steps - 1], [0.5])
    image = map_picture(trace).axes[0].images[0].get_array()
    assert image.shape == shape
    assert image[-1, -1] == DECIDED and (image != FAR).sum() == 1


def test_a_long_run_has_a_pixel_for_each_cell():
    """And no smoothing, nor anything drawn over it."""
    random = np.random.default_rng(0)
    states = random.integers(0, 5, (512, 2048)).astype(np.uint8)
    drawn = pixels(png_bytes(map_picture(Trace(list(states)))))
    assert drawn.shape[0] < 1000 and drawn.shape[1] < 2500
    colours = np.array([colour(state) for state in range(5)], np.uint8)
    size = 2048 / (canvas_pictures.WIDE * 1.15)
    top, left = round(canvas_pictures.TOP * size), round(canvas_pictures.LEFT * size)
    assert np.array_equal(drawn[top : top + 512, left : left + 2048], colours[states])


def test_counts_are_those_of_the_sampler():
    result = sampled()
    trace = result.trace
    computed, refresh = computed_by_step(trace)
    assert len(computed) == result.steps and refresh.sum() == result.refreshes
    assert computed[refresh].sum() == result.refreshed and computed[~refresh].sum() == result.stepped
    assert prompt_of(trace) == 3 and canvas_pictures.texts_of(result) == 1
    assert canvas_pictures.texts_of(sampled(guidance=1.0)) == 2
    everything = Trace([np.full(3, DECIDED, np.uint8)], [0, 1, 2], [7] * 3, [0] * 3, [0.5] * 3)
    assert computed_by_step(everything)[1].tolist() == [True]


def test_order_and_time():
    result = made()
    (axes,) = order_picture(result.trace).axes
    assert axes.collections[0].get_offsets().tolist() == [[1, 2], [2, 4], [3, 3], [4, 5]]
    upper, lower = time_picture(result).axes
    assert upper.collections[0].get_offsets().tolist() == [[1, 0.9], [2, 0.25], [3, 0.5], [4, 1.0]]
    steps, refreshes = (patch.get_data().values.tolist() for patch in lower.patches)
    assert refreshes == [4, 0, 0, 0] and steps == [0, 2, 2, 1]
    assert lower.lines[0].get_ydata()[0] == 6 and lower.get_yscale() == "linear"
    wide = Trace([np.full(64, FAR, np.uint8) for _ in range(2)])
    for states in wide.states:
        states[:2] = ACTIVE
    assert time_picture(Result(full=128, trace=wide)).axes[1].get_yscale() == "log"  # and no decision at all


def test_the_map_as_a_file(tmp_path, monkeypatch):
    path = write_map(tmp_path / "map.png", made().trace)
    assert path.read_bytes().startswith(b"\x89PNG") and [f.name for f in tmp_path.iterdir()] == ["map.png"]
    before = path.read_bytes()
    with pytest.raises(ElisionError, match="holds no step"):
        write_map(path, Trace())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ElisionError, match="No space left"):
        write_map(path, sampled().trace)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_colours_of_steps_can_be_read():
    def bright(text):
        c = np.array(list(bytes.fromhex(text[1:]))) / 255
        return np.dot(
            np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4), (0.2126, 0.7152, 0.0722)
        )

    colours = step_colours(LEVELS)
    assert len(set(colours)) == LEVELS
    for paper, ink in colours:
        low, high = sorted((bright(paper), bright(ink)))
        assert (high + 0.05) / (low + 0.05) > 4.5


# ---- the page ----------------------------------------------------------------------------------------
class Page(HTMLParser):
    """Every tag is closed in order and nothing is loaded; `tokens`: (classes, title, text) of the canvas."""

    VOID = {"meta", "img"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.tokens: list[list] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        named = {name: value or "" for name, value in attrs}
        assert not {"href", "srcset", "action"} & set(named) and "url(" not in named.get("style", "")
        self.found.append(tag)
        if "src" in named:
            self.sources.append(named["src"])
        if "data-position" in named:
            assert int(named["data-position"]) == len(self.tokens)
            self.tokens.append([named["class"].split(), named["title"], ""])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.tokens and self.open[-1] == "span" and not self.tokens[-1][2]:
            self.tokens[-1][2] = data


@pytest.fixture(scope="module")
def html() -> str:
    return render_canvas(result=made(), prompt_text="<b>\ud800", tokens=TEXTS, settings=SETTINGS)


def test_the_page_needs_nothing_else(html):
    page = Page(html)
    assert "script" not in page.found and "link" not in page.found and "<script" not in html
    assert not re.search(r"https?://|@import|url\(", html)
    assert len(page.sources) == 3
    for source in page.sources:
        assert source.startswith("data:image/png;base64,")
        assert pixels(base64.b64decode(source.partition(",")[2])).ndim == 3


def test_each_token_stands_in_the_colour_of_its_step(html):
    tokens = Page(html).tokens
    assert [text for _, _, text in tokens] == [*TEXTS[:4], '"␛', "end"]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "&lt;b&gt;�" in html and "\x1b" not in html
    levels = [[name for name in classes if re.fullmatch(r"s\d+", name)] for classes, _, _ in tokens]
    assert levels == [[], [], ["s0"], ["s8"], ["s4"], ["s12"]]
    assert tokens[0][1] == "position 0, id 10, given"
    assert tokens[4][1] == "position 4, id 14, step 2, confidence 0.250"
    assert "part" in tokens[3][0] and all(f".s{level} {{" in html for level in range(LEVELS))


def test_figures_and_settings_stand_in_the_page(html):
    cards = dict(re.findall(r'<span class="soft">([^<]*)</span><b>([^<]*)</b>', html))
    assert cards == {
        "fewer token computations": "2.7 times",
        "token computations": "9",
        "denoising steps": "4",
        "refreshes": "1",
        "new tokens a second": "2.0",
    }
    text = Page(html).text
    for part in ("refresh 25.0% (0.500 s)", "step 62.5% (1.250 s)", "rest 12.5% (0.250 s)"):
        assert part in text
    assert "the full sampler: 24; 4 in refreshes, 5 in cached steps" in text
    rows = re.findall(r'<tr><th scope="row">([^<]*)</th><td>([^<]*)</td></tr>', html)
    assert rows == [
        ("policy", "window"), ("early &lt;stop&gt;", "yes"), ("temperature", "0.7"), ("seed", "none"), ("eos", "1, 2"),
    ]  # fmt: skip


def test_page_and_picture_are_written_together(tmp_path):
    result = sampled()
    ids = [str(token) for token in result.token_ids]
    path = write_canvas_report(tmp_path / "page.html", result=result, prompt_text="", tokens=ids, settings={})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["page.html", "page.png"]
    html = path.read_text(encoding="utf-8")
    assert 'class="text ids"' in html and "Settings" not in html
    assert [text for _, _, text in Page(html).tokens] == ids
    assert base64.b64encode((tmp_path / "page.png").read_bytes()).decode() in html


def test_a_canvas_that_was_cut():
    """The early stop: texts may be of the whole canvas, and what was decided behind the cut is in the map alone."""
    result = made()
    result.token_ids, result.new_tokens, result.finish = result.token_ids[:5], result.new_tokens[:3], "eos"
    html = render_canvas(result=result, prompt_text="", tokens=TEXTS, settings={})
    assert len(Page(html).tokens) == 5 and "cut behind the token that ends the text" in html
    result = sampled(early_stop=True, eos=list(range(20)))
    assert result.finish == "eos" and len(result.token_ids) < 15
    Page(render_canvas(result=result, prompt_text="", tokens=["x"] * 15, settings={}))


def test_what_cannot_be_written(tmp_path, monkeypatch):
    def attempt(name, result=None, tokens=TEXTS):
        write_canvas_report(
            tmp_path / name, result=result or made(), prompt_text="", tokens=tokens, settings={}
        )

    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.html").mkdir()
    for name, message in (
        ("none/page.html", "no such folder"),
        ("folder.html", "a folder, not a file"),
        ("page.PNG", "name it .html"),
    ):
        with pytest.raises(ElisionError, match=message) as caught:
            attempt(name)
        assert "\n" not in str(caught.value)
    (tmp_path / "folder.html").rmdir()
    with pytest.raises(ElisionError, match=r"folder\.png: a folder"):
        attempt("folder.html")
    with pytest.raises(ElisionError, match="trace=True"):
        attempt("page.html", Result())
    with pytest.raises(ElisionError, match="3 texts for the 6 positions"):
        attempt("page.html", tokens=["a"] * 3)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ElisionError, match="No space left"):
        attempt("page.html")
    assert [file.name for file in tmp_path.iterdir()] == ["folder.png"]
