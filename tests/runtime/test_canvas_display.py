"""Canvases in a terminal."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from elision.runtime import canvas_display
from elision.runtime.canvas_display import CanvasDisplay
from elision.runtime.canvas_plan import canvas_ids
from elision.runtime.canvas_policies import Window
from elision.runtime.canvas_result import Event, Result
from elision.runtime.canvas_sampler import Sampler
from rich.console import Console

from .canvas_models import EagerCanvas, make

MASK, EOS = 39, 38
HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"


class Clock:
    """Stands for the module `time` of the display."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(canvas_display, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def console(width=60, height=20, terminal=True) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(force_terminal=terminal, file=file, width=width, height=height, _environ={}), file


def event(canvas, step, positions, tokens, length, refresh=False, result=None, computed=3) -> Event:
    positions, tokens = np.array(positions, np.int64), np.array(tokens, np.int64)
    return Event(canvas, step, refresh, positions, tokens, np.ones(len(positions)), length, computed, result)


def words(ids):
    return [f"w{token} " for token in ids]


def drawn(display, width=60, height=19) -> list[str]:
    return ["".join(text for _, text in line) for line in display._lines(width, height)]


def kinds(display, kind) -> list[str]:
    return [text for line in display._lines(60, 19) for style, text in line if style == kind]


def test_tokens_appear_as_they_are_decided(clock):
    screen, file = console()
    with CanvasDisplay([canvas_ids([7, 8], 4, MASK)], MASK, words, console=screen) as display:
        assert drawn(display) == ["w7 w8 ····", "step 0, 0/4 decided, 0 refreshes"]
        clock.now += 1
        display.show(event(0, 1, [4, 2], [14, 12], 6, refresh=True))
        assert drawn(display) == [
            "w7 w8 w12 ·w14 ·",
            "step 1, 2/4 decided, 3.0 tokens computed a step, 1 refresh",
        ]
        assert kinds(display, canvas_display.NEWEST) == ["w12 ", "w14 "]
        clock.now += 1
        display.show(event(0, 2, [3], [13], 6))
        assert kinds(display, canvas_display.NEWEST) == ["w13 "]
        assert kinds(display, canvas_display.GIVEN) == ["w7 w8 "]
        display.show(event(0, 3, [], [], 6))  # nothing decided: the last ones stay lit
        assert kinds(display, canvas_display.NEWEST) == ["w13 "]
        display.show(event(0, 4, [5], [15], 6, result=Result(steps=4, refreshed=6, stepped=6)))
        assert drawn(display)[-1] == "step 4, 4/4 decided, 3.0 tokens computed a step, 1 refresh"
    text = file.getvalue()
    assert "w12 " in text and text.count(HIDDEN) == text.count(SHOWN) == 1
    assert text.endswith("\x1b[1A\x1b[2K")  # all of it is erased


def test_it_draws_fifteen_times_a_second_at_most(clock, monkeypatch):
    screen, _ = console()
    count = []
    with CanvasDisplay([canvas_ids([], 200, MASK)], MASK, words, console=screen) as display:
        monkeypatch.setattr(display._live, "refresh", lambda: count.append(clock.now))
        for step in range(200):
            clock.now += 0.01
            display.show(event(0, step + 1, [step], [step % 30], 200))
        assert 20 <= len(count) <= 31
        count.clear()
        monkeypatch.setattr(
            display._live, "refresh", lambda: (count.append(0), setattr(clock, "now", clock.now + 0.1))
        )
        for _ in range(300):
            clock.now += 0.01
            display.show(event(0, 201, [], [], 200))
        assert len(count) <= 2  # a slow terminal is asked less often


def test_long_ones_scroll_to_the_newest():
    screen, _ = console()
    display = CanvasDisplay([canvas_ids(range(30), 3000, MASK)], MASK, words, console=screen)
    assert len(drawn(display)) == 19 and drawn(display)[0].startswith("w0 ")
    for position in (30, 1500, 3029):
        display.show(event(0, 1, [position], [31], 3030))
        lines = drawn(display)
        assert len(lines) == 19 and all(len(line) <= 60 for line in lines)
        assert any("w31 " in line for line in lines)
    for height in (1, 2, 3):
        assert len(drawn(display, 5, height)) == height


def test_lines_break_where_they_should():
    screen, _ = console()
    texts = {1: "abc ", 2: "x\ny", 3: "漢字漢字漢字", 4: "", 5: "\x1b[31m\t", 6: "\n", 7: "[bold]"}
    display = CanvasDisplay([[1, 2, 1, 6, 1, MASK], [3, 4, MASK], [5, 7, MASK]], MASK,
                            lambda ids: [texts[i] for i in ids], console=screen)  # fmt: skip
    assert drawn(display, 8, 30)[:4] == ["abc x↵", "yabc ↵", "abc ·", "canvas …"]
    assert [line for line in drawn(display, 7, 30) if "漢" in line] == ["漢字漢", "字漢字◦"]
    assert "␛[31m  [bold]·" in drawn(display, 30, 30)


def test_several_and_a_cut(clock):
    screen, _ = console()
    canvases = [canvas_ids([7], 6, MASK), canvas_ids([8, 9], 3, MASK), canvas_ids([5], 2, MASK)]
    with CanvasDisplay(canvases, MASK, words, console=screen, transient=False) as display:
        assert [line for line in drawn(display) if "canvas" in line] == [
            f"canvas {n}: step 0, 0/{total} decided, 0 refreshes" for n, total in ((1, 6), (2, 3), (3, 2))
        ]
        assert drawn(display)[-1] == "0 of 3 done"
        assert sum("canvas" in line for line in drawn(display, 60, 6)) == 2  # no room for the third
        display.show(event(0, 1, [2, 5], [12, EOS], 7))
        display.show(event(0, 2, [1, 6], [11, 16], 6))  # cut: what was decided last is gone
        assert "w7 w11 w12 ··w38 " in drawn(display)
        assert any(line.startswith("canvas 1: step 2, 3/5 decided, 3.0 tokens") for line in drawn(display))
        display.show(event(0, 3, [3], [13], 4, result=Result(finish="eos")))
        lines = drawn(display)
        assert not any("canvas 1" in line for line in lines) and lines[-1] == "1 of 3 done"
        display.show(event(1, 1, [2, 3, 4], [1, 2, 3], 5, result=Result()))
        display.show(event(2, 1, [1, 2], [1, 2], 3, result=Result()))
        assert "w7 w11 w12 w13 " in drawn(display) and drawn(display)[-1] == "3 of 3 done"


def test_it_follows_the_sampler(clock):
    screen, _ = console(200)
    canvases = [canvas_ids([3, 1], 9, MASK), canvas_ids([2], 5, MASK)]
    sampler = Sampler(
        EagerCanvas(make("llada"), 64),
        MASK,
        policy=Window(6, 2, 3, form="contiguous"),
        eos=[EOS],
        early_stop=True,
    )
    results = {}
    with CanvasDisplay(canvases, MASK, words, console=screen) as display:
        for one in sampler.stream(canvases):
            clock.now += 1
            display.show(one)
            if one.result is not None:
                results[one.canvas] = one.result
        lines = drawn(display, 200, 19)
    for result in results.values():
        assert "".join(words(result.token_ids)) in lines
        assert f"{result.computed / result.steps:.1f} tokens computed a step" in "".join(lines)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_leaves_a_clean_terminal(error):
    screen, file = console()
    before = sys.stdout, sys.stderr
    with (
        pytest.raises(error),
        CanvasDisplay([canvas_ids([7], 4, MASK)], MASK, words, console=screen) as display,
    ):
        display.show(event(0, 1, [1], [11], 5))
        raise error
    text = file.getvalue()
    assert text.count(HIDDEN) == text.count(SHOWN) == 1 and text.endswith("\x1b[2K")
    assert (sys.stdout, sys.stderr) == before
    display.show(event(0, 2, [2], [12], 5))  # afterwards nothing is drawn
    assert file.getvalue() == text


def test_words_that_fail_leave_a_clean_terminal(clock):
    def broken(ids):
        raise ValueError("no such word")

    screen, file = console()
    with (
        pytest.raises(ValueError, match="no such word"),
        CanvasDisplay([canvas_ids([], 4, MASK)], MASK, broken, console=screen) as display,
    ):
        clock.now += 1
        display.show(event(0, 1, [1], [11], 4))
    assert file.getvalue().count(SHOWN) == 1


def test_nothing_is_printed_where_there_is_no_terminal(monkeypatch, capsys):
    def never(ids):
        raise AssertionError("asked for a word")

    screen, file = console(terminal=False)
    dumb = Console(force_terminal=True, file=file, _environ={"TERM": "dumb"})
    for one in (screen, dumb, None):  # None: stderr, which pytest has captured
        with CanvasDisplay([canvas_ids([7], 4, MASK)], MASK, never, console=one) as display:
            display.show(event(0, 1, [1], [11], 5))
        assert display.silent
    assert file.getvalue() == "" and capsys.readouterr() == ("", "")
