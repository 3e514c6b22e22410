"""Shows canvases in a terminal while they are decided: masks as dots, tokens as they come."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import numpy as np
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.style import Style

from .canvas_result import Event
from .generation_report import CONTROLS, Labels

FASTEST = 1 / 15
"""Seconds from one drawing to the next, at least."""

SHARE = 24
"""Times that a drawing took, which pass before the next one: even a slow terminal takes no more than 4% of the time."""

MANY = 1 << 30
ROOM = 3
"""Lines that another canvas needs to be begun: its status, and some of its text."""

PLAIN, GIVEN, MASK, NEWEST, STATUS = range(5)
STYLES = {
    PLAIN: Style(),
    GIVEN: Style(color="cyan"),
    MASK: Style(dim=True),
    NEWEST: Style(color="black", bgcolor="bright_yellow", bold=True),
    STATUS: Style(bold=True),
}
DOT, NOTHING, BREAK = "·", "◦", "↵"

Line = list[tuple[int, str]]
"""(style, text) from left to right."""

Piece = tuple[str, int]
"""Text, and its cells; more than any line has where it holds line breaks."""


class _Canvas:
    """ids, given int64 and bool [N], undecided bool [N], fresh bool [N]: decided since it was drawn last. computed:
    tokens computed."""

    def __init__(self, number: int, ids: Sequence[int] | np.ndarray, mask_id: int) -> None:
        self.number, self.ids = number, np.array(ids, np.int64)
        self.undecided = self.ids == mask_id
        self.given = ~self.undecided
        self.fresh = np.zeros(len(self.ids), bool)
        self.newest = self.fresh  # what the last drawing showed
        self.steps = self.refreshes = 0
        self.computed = 0
        self.done = False

    def take(self, event: Event) -> None:
        self.ids[event.positions] = event.tokens
        self.undecided[event.positions] = False
        self.fresh[event.positions] = True
        if event.length < len(self.ids):
            for name in ("ids", "undecided", "given", "fresh", "newest"):
                setattr(self, name, getattr(self, name)[: event.length])
        self.steps = event.step
        self.refreshes += event.refresh
        self.computed += event.computed
        self.done = event.result is not None

    def kinds(self) -> np.ndarray:
        """uint8 [N]: the style of each position. Looking makes the fresh ones old, as soon as others have come."""
        if self.fresh.any():
            self.newest, self.fresh = self.fresh, np.zeros(len(self.ids), bool)
        kinds = np.full(len(self.ids), PLAIN, np.uint8)
        kinds[self.given] = GIVEN
        kinds[self.newest] = NEWEST
        kinds[self.undecided] = MASK
        return kinds

    def status(self, several: bool) -> str:
        total = int((~self.given).sum())
        parts = [f"step {self.steps}", f"{total - int(self.undecided.sum())}/{total} decided"]
        if self.steps:
            parts.append(f"{self.computed / self.steps:.1f} tokens computed a step")
        parts.append(f"{self.refreshes} refresh" + ("" if self.refreshes == 1 else "es"))
        return (f"canvas {self.number + 1}: " if several else "") + ", ".join(parts)


class CanvasDisplay:
    """Shows what `Sampler.stream` yields; nothing at all where the console is no terminal.

        with CanvasDisplay(canvases, mask_id, words) as display:
            for event in sampler.stream(canvases):
                display.show(event)

    canvases: ids of each, as the sampler gets them. words: ids -> the text of each id by itself, with its spaces; asked
    once for an id. console: default stderr, where progress belongs. transient: what was drawn goes away at the end, so
    that the text can be printed in its place. An exception, Ctrl-C too, leaves the terminal as it was and is passed
    on."""

    def __init__(
        self,
        canvases: Sequence[Sequence[int] | np.ndarray],
        mask_id: int,
        words: Callable[[Sequence[int]], Sequence[str]],
        *,
        console: Console | None = None,
        transient: bool = True,
    ) -> None:
        self._console = Console(stderr=True) if console is None else console
        self.silent = not self._console.is_terminal or self._console.is_dumb_terminal
        self._canvases = [
            _Canvas(number, ids, mask_id) for number, ids in enumerate(() if self.silent else canvases)
        ]
        self._words, self._plain = words, Labels(None).plain
        self._known: dict[int, Piece] = {}
        self._transient = transient
        self._live: Live | None = None
        self._next = 0.0

    def __enter__(self) -> CanvasDisplay:
        if not self.silent:
            # What is printed meanwhile goes above the canvas; a stdout that is no terminal is left alone.
            self._live = Live(
                self,
                console=self._console,
                auto_refresh=False,
                transient=self._transient,
                redirect_stdout=sys.stdout.isatty(),
                redirect_stderr=sys.stderr.isatty(),
            )
            self._live.start()
            self._draw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def show(self, event: Event) -> None:
        """Takes in one step; draws, if the last drawing was long enough ago."""
        if self.silent:
            return
        self._canvases[event.canvas].take(event)
        if time.monotonic() >= self._next:
            self._draw()

    def _draw(self) -> None:
        if self._live is None:
            return
        begun = time.monotonic()
        self._live.refresh()
        ended = time.monotonic()
        self._next = max(begun + FASTEST, ended + SHARE * (ended - begun))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Asked by rich at each drawing, with the terminal's size of that moment."""
        lines = self._lines(max(1, options.max_width), max(1, console.size.height - 1))
        for number, line in enumerate(lines):
            if number:
                yield Segment.line()
            for style, text in line:
                yield Segment(text, STYLES[style])

    def _lines(self, width: int, height: int) -> list[Line]:
        """At most `height` lines of at most `width` cells."""
        several = len(self._canvases) > 1
        waiting = [canvas for canvas in self._canvases if not canvas.done]
        lines: list[Line] = []
        for canvas in waiting or self._canvases:
            room = height - len(lines) - several
            if room < (ROOM if lines else 1):
                break
            if room > 1:
                lines += self._text(canvas, width, room - 1)
            lines.append([(STATUS, _fitting(canvas.status(several), width))])
        if several and len(lines) < height:
            done = len(self._canvases) - len(waiting)
            lines.append([(STATUS, _fitting(f"{done} of {len(self._canvases)} done", width))])
        return lines

    def _text(self, canvas: _Canvas, width: int, height: int) -> list[Line]:
        """The lines around the newest tokens, or where there are none the first mask."""
        kinds = canvas.kinds()
        look = np.flatnonzero(kinds == NEWEST)
        if not len(look):
            look = np.flatnonzero(kinds == MASK)[:1]
        middle = int(look[len(look) // 2]) if len(look) else 0
        rows: list[Line] = []
        found = 0  # the line that the newest are on
        for first, line in _wrapped(self._pieces(canvas), kinds.tolist(), width):
            if first <= middle:
                found = len(rows)
            elif len(rows) > found + height:
                break
            rows.append(line)
        start = min(max(0, found - height // 2), max(0, len(rows) - height))
        return rows[start : start + height]

    def _pieces(self, canvas: _Canvas) -> list[Piece]:
        """What stands for each position."""
        known = self._known
        for token in set(np.unique(canvas.ids[~canvas.undecided]).tolist()) - known.keys():
            text = self._plain("".join(self._words([token])))
            text = text.replace("\t", "  ").translate(CONTROLS | {10: BREAK + "\n"}) or NOTHING
            known[token] = text, MANY if "\n" in text else cell_len(text)
        return [
            (DOT, 1) if undecided else known[token]
            for token, undecided in zip(canvas.ids.tolist(), canvas.undecided.tolist())
        ]


def _wrapped(pieces: list[Piece], kinds: list[int], width: int) -> Iterator[tuple[int, Line]]:
    """(first position, line) of each line: pieces are kept whole where they fit, a line break ends a line."""
    line: Line = []
    bits: list[str] = []  # the end of the line, all of one style
    used = first = 0
    last = PLAIN
    for position, ((text, cells), kind) in enumerate(zip(pieces, kinds)):
        for bit, taken in ((text, cells),) if cells <= width else _cut(text, width):
            if used + taken > width or bit == "\n":
                yield first, [*line, (last, "".join(bits))]
                line, bits, used, first = [], [], 0, position
            if bit == "\n":
                first = position + 1
                continue
            if kind != last:
                if bits:
                    line.append((last, "".join(bits)))
                bits, last = [], kind
            bits.append(bit)
            used += taken
    if bits:
        yield first, [*line, (last, "".join(bits))]


def _cut(text: str, width: int) -> Iterator[tuple[str, int]]:
    """(bit, its cells) of a text that is longer than a line, or holds line breaks: these have none. Characters wider
    than a line are left out."""
    for character in text:
        cells = 0 if character == "\n" else cell_len(character)
        if cells <= width:
            yield character, cells


def _fitting(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
