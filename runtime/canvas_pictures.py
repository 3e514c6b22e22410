"""Figures of a canvas: what each step computed, in which order positions were decided, and at what price."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..passes.errors import ElisionError
from .canvas_result import ACTIVE, BUFFER, DECIDED, FAR, REFRESHED, Result, Trace
from .files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STATES = {
    FAR: ("far: not touched", "#f1f3f5"),
    BUFFER: ("buffer: read from the cache", "#bcd3e6"),
    ACTIVE: ("active: computed", "#3d86c6"),
    REFRESHED: ("refreshed: computed afresh", "#e69f00"),
    DECIDED: ("decided in this step", "#14181d"),
}
"""Name and colour. They differ in brightness too, so that they can be told apart without any colour."""

DPI = 100
WIDE, HIGH, CELL = 960, 420, 24
"""Of the map, in pixels: what small ones are enlarged to, and the largest side of a cell."""

COLUMNS, ROWS = 4096, 2048
"""Cells of the map; of more positions or steps, neighbours share one."""

LEFT, RIGHT, TOP, BOTTOM, NARROWEST = 64, 16, 58, 44, 880
"""Around the map, in pixels: room for ticks and legend."""

GRID, INK, SOFT = "#dfe3e8", "#1c2430", "#5a6472"
SCALE = "viridis"
"""Of steps, from first to last: in the picture of the order, and in the text of the report."""


def states_of(trace: Trace) -> np.ndarray:
    """uint8 [steps, N]. Raises ElisionError for a trace without a step."""
    if not trace.states:
        raise ElisionError("the trace holds no step: nothing can be drawn")
    return trace.picture()


def prompt_of(trace: Trace) -> int:
    """Positions before the first that was decided; all of them where none was."""
    return min(trace.positions, default=states_of(trace).shape[1])


def computed_by_step(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [steps]: tokens computed, bool [steps]: in a refresh). The tokens of one text: guidance has two."""
    states = states_of(trace)
    active = (states == ACTIVE).any(1)
    refresh = (states == REFRESHED).any(1)
    refresh[0] |= not active[0]  # it may have decided all that it computed
    return (states >= ACTIVE).sum(1), refresh


def map_picture(trace: Trace, *, prompt: int | None = None, end: int | None = None) -> Figure:
    """What each step (downwards, from 1) did with each position (to the right, from 0).

    prompt: positions before the first mask (default: before the first decided). end: length of the canvas after an
    early stop. A cell is a whole number of pixels; where several share one, the one with most done is shown. Raises
    ElisionError for a trace without a step."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    states = states_of(trace)
    steps, length = states.shape
    prompt = prompt_of(trace) if prompt is None else prompt
    cells, down, across = _reduced(states)
    high = cells.shape[0] * max(1, min(CELL, HIGH // cells.shape[0]))
    wide = cells.shape[1] * max(1, min(CELL, WIDE // cells.shape[1]))
    size = max(1.0, wide / (WIDE * 1.15))  # a page shows wide pictures smaller
    left, right, top, bottom = (round(margin * size) for margin in (LEFT, RIGHT, TOP, BOTTOM))
    width, height = max(left + wide + right, round(NARROWEST * size)), top + high + bottom
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    axes = figure.add_axes((left / width, bottom / height, wide / width, high / height))
    axes.imshow(
        cells,
        cmap=ListedColormap([STATES[state][1] for state in sorted(STATES)]),
        vmin=FAR - 0.5,
        vmax=DECIDED + 0.5,
        interpolation="nearest",
        aspect="auto",
        extent=(-0.5, across * cells.shape[1] - 0.5, down * cells.shape[0] + 0.5, 0.5),
    )
    axes.set_xlim(-0.5, length - 0.5)
    axes.set_ylim(steps + 0.5, 0.5)
    handles: list[Patch | Line2D] = [
        Patch(facecolor=colour, edgecolor=SOFT, linewidth=0.5, label=name) for name, colour in STATES.values()
    ]
    marks = [(prompt, "--", "end of the prompt")] if 0 < prompt < length else []
    if end is not None and 0 < end < length:
        marks.append((end, ":", "cut by the early stop"))
    for at, style, name in marks:
        axes.axvline(at - 0.5, color="white", linewidth=2.6 * size)
        line = axes.axvline(at - 0.5, color=INK, linewidth=1.3 * size, linestyle=style)
        handles.append(Line2D([], [], color=INK, linestyle=line.get_linestyle(), label=f"{name} ({at})"))
    _dressed(axes, f"position{_shared(across)}", f"step{_shared(down)}", size, grid=False)
    figure.legend(
        handles=handles,
        ncols=4,
        loc="upper left",
        bbox_to_anchor=(left / width, 1.0),
        frameon=False,
        fontsize=8.5 * size,
        borderaxespad=0.3,
    )
    return figure


def order_picture(trace: Trace, *, prompt: int | None = None) -> Figure:
    """Each decision: its position against its step, in the colour that the step has in the report's text. Raises
    ElisionError for a trace without a step."""
    states = states_of(trace)
    steps, length = states.shape
    prompt = prompt_of(trace) if prompt is None else prompt
    figure, (axes,) = _figure(1, 360)
    axes.scatter(
        np.array(trace.when) + 1,
        trace.positions,
        c=trace.when,
        cmap=SCALE,
        vmin=0,
        vmax=max(1, steps - 1),
        s=_dot(len(trace.when)),
        linewidths=0,
    )
    if 0 < prompt < length:
        axes.axhline(prompt - 0.5, color=INK, linewidth=1.2, linestyle="--")
    axes.set_xlim(0.5, steps + 0.5)
    axes.set_ylim(length - 0.5, -0.5)
    _dressed(axes, "step", "position", 1.0)
    return figure


def time_picture(result: Result) -> Figure:
    """Over the steps: above the confidence of each decision and its mean, below the tokens computed, on a scale of
    powers of ten where they differ much, and what the full sampler computes. Raises ElisionError without a trace."""
    if result.trace is None:
        raise ElisionError("this result has no trace to draw: sample with trace=True")
    trace = result.trace
    states = states_of(trace)
    steps, length = states.shape
    figure, (upper, lower) = _figure(2, 480)

    when, confidence = np.array(trace.when, np.int64), np.array(trace.confidence, np.float64)
    upper.scatter(when + 1, confidence, s=_dot(len(when)), color="#3d86c6", alpha=0.55, linewidths=0)
    count = np.bincount(when, minlength=steps)
    some = np.flatnonzero(count)
    mean = np.bincount(when, confidence, steps)[some] / count[some]
    upper.plot(some + 1, mean, color=INK, linewidth=1.1, label="mean of the step")
    upper.set_ylim(-0.03, 1.03)
    upper.set_xlim(0.5, steps + 0.5)
    upper.legend(frameon=False, fontsize=8.5, loc="lower right")
    _dressed(upper, "", "confidence", 1.0)

    computed, refresh = computed_by_step(trace)
    texts = texts_of(result)
    computed, full = computed * texts, length * texts
    least = computed[computed > 0].min(initial=full)
    logarithmic = full > 8 * least
    edges, base = np.arange(steps + 1) + 0.5, max(0.5, least / 2) if logarithmic else 0.0
    for kind, chosen, name in (
        (ACTIVE, ~refresh, "computed in cached steps"),
        (REFRESHED, refresh, "computed in refreshes"),
    ):
        values = np.where(chosen, np.maximum(computed, base), base)
        lower.stairs(values, edges, baseline=base, fill=True, color=STATES[kind][1], label=name)
    lower.axhline(full, color=INK, linewidth=1.3, linestyle="--", label="the full sampler")
    if logarithmic:
        lower.set_yscale("log")
    lower.set_ylim(base, full * (1.6 if logarithmic else 1.1))
    lower.set_xlim(0.5, steps + 0.5)
    _dressed(lower, "step", "tokens computed", 1.0)
    lower.legend(frameon=False, fontsize=8.5, ncols=3, loc="lower left", bbox_to_anchor=(0, 0.99))
    return figure


def texts_of(result: Result) -> int:
    """Texts that a step computes: 2 under guidance, else 1."""
    assert result.trace is not None
    each = result.trace.states[0].size * len(result.trace.states)
    return max(1, round(result.full / each))


def step_colours(levels: int) -> list[tuple[str, str]]:
    """(colour, ink that can be read on it) of steps in so many groups, first to last."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    found = []
    for value in np.linspace(0.0, 1.0, levels):
        red, green, blue = colormaps[SCALE](value)[:3]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
        bright = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
        found.append((to_hex((red, green, blue)), "#000000" if bright > 0.18 else "#ffffff"))
    return found


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": "Elision"})
    return buffer.getvalue()


def write_map(
    path: str | os.PathLike[str], trace: Trace, *, prompt: int | None = None, end: int | None = None
) -> Path:
    """`map_picture` as a PNG file, whole or not at all. Raises ElisionError."""
    data = png_bytes(map_picture(trace, prompt=prompt, end=end))
    return write_atomically(path, lambda temporary: temporary.write_bytes(data))


def _reduced(states: np.ndarray) -> tuple[np.ndarray, int, int]:
    """(uint8 [at most ROWS, at most COLUMNS], steps that share a cell, positions that do)."""
    down, across = -(-states.shape[0] // ROWS), -(-states.shape[1] // COLUMNS)
    for axis, each in enumerate((down, across)):
        if each > 1:
            states = np.maximum.reduceat(states, np.arange(0, states.shape[axis], each), axis)
    return states, down, across


def _shared(each: int) -> str:
    return f" ({each} in a cell)" if each > 1 else ""


def _dot(count: int) -> float:
    return float(np.clip(6000 / max(1, count), 5, 36))


def _figure(panels: int, height: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, height / DPI), dpi=DPI, facecolor="white", layout="constrained")
    return figure, list(figure.subplots(panels, 1, squeeze=False)[:, 0])


def _dressed(axes: Axes, across: str, down: str, size: float, *, grid: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(across, fontsize=9.5 * size, color=INK)
    axes.set_ylabel(down, fontsize=9.5 * size, color=INK)
    axes.tick_params(labelsize=8.5 * size, colors=SOFT, width=0.8 * size, length=3.5 * size)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
    if across and down.startswith(("step", "position")):
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    for spine in axes.spines.values():
        spine.set(color=GRID, linewidth=size)
        if not grid:
            spine.set_position(("outward", size * 72 / DPI))  # beside the cells at the edge, not on them
    if grid:
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
