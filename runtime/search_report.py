"""How a search is shown: a table of its front, and a picture of quality against time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..passes.errors import ElisionError
from .files import write_atomically

if TYPE_CHECKING:
    from .search import TuneResult
    from .search_run import Trial

SUFFIXES = (".png", ".svg", ".pdf")


def show(console: Console, result: TuneResult) -> None:
    """The front, then what was chosen, against what, on which calls."""
    table = Table(box=None, pad_edge=False)
    for title in ("", result.goal.name, "held out", "ms", "of the original", "pipeline"):
        table.add_column(title, justify="left" if title in ("", "pipeline") else "right", no_wrap=not title)
    rows = result.front
    rows += [t for t in (result.constant, result.chosen) if t is not None and t not in rows]
    for trial in sorted(rows, key=lambda t: t.ratio or 0.0):
        table.add_row(
            mark(result, trial),
            f"{trial.quality:.4f}",
            "" if trial.held_out is None else f"{trial.held_out:.4f}",
            f"{result.ms(trial) or 0:.4g}",
            f"{100 * (trial.ratio or 0):.1f} %",
            Text(trial.text or "(as it came)"),
        )
    console.print(table)
    for line in lines(result):
        console.print(line, markup=False)


def mark(result: TuneResult, trial: Trial) -> str:
    """What a row of the table is."""
    if trial is result.chosen:
        return "chosen"
    if trial is result.constant:
        return "best constant"
    return "" if trial.kind != "original" else "original"


def lines(result: TuneResult) -> list[str]:
    """What a reader has to know beside the table."""
    found = [
        f"{len(result.trials) - 1} pipelines were tried in {result.seconds:.0f} s, on {_calls(result.searched)}; "
        f"{result.goal} was asked for",
        f"chosen: {result.pipeline}",
        f"it keeps the bound on {_calls(result.held_out)} that the search did not see "
        f"({result.goal.name} {result.chosen.held_out:.4f}; {result.judged} asked for that)",
    ]
    if result.constant is None:
        found.append("no constant keeps the bound")
    elif result.gain is None:
        found.append("no schedule is faster than the best constant")
    else:
        gain = result.gain
        found.append(
            f"{1 / gain.ratio:.3f} times as fast as the best constant, {result.constant.text} "
            f"(90 % interval {1 / gain.high:.3f} to {1 / gain.low:.3f}, {gain.rounds} rounds in turn)"
        )
    return found + result.notes


def _calls(count: int) -> str:
    return f"{count} call{'' if count == 1 else 's'}"


def plot(result: TuneResult, path: str | Path) -> Path:
    """Quality against time: everything that was tried, the front, constants and what was chosen; the bound as a line.

    What was not measured stands where its estimated cost would put it, hollow. Raises ElisionError."""
    file = Path(path)
    if file.suffix.lower() not in SUFFIXES:
        raise ElisionError(f"{file}: a picture is {', '.join(SUFFIXES)}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    best = min((t for t in result.trials if t.ratio is not None), key=lambda t: t.ratio or 1.0)

    def ms(trial: Trial) -> float:
        ratio = trial.ratio or (best.ratio or 1.0) * trial.cost / best.cost
        return ratio * result.original_ms

    for kind, marker, colour in (("schedule", "o", "#4477aa"), ("constant", "s", "#ee8866")):
        for timed in (False, True):
            group = [t for t in result.trials if t.kind == kind and (t.ratio is not None) == timed]
            axes.plot(
                [ms(t) for t in group],
                [t.quality for t in group],
                marker,
                color=colour,
                markersize=5 if timed else 4,
                fillstyle="full" if timed else "none",
                alpha=0.9 if timed else 0.4,
                linestyle="none",
                label=f"{kind}{'' if timed else ', time estimated'}" if group else None,
            )
    front = result.front
    axes.plot(
        [ms(t) for t in front], [t.quality for t in front], "-", color="#222222", linewidth=1, label="front"
    )
    for trial, name, marker in ((result.constant, "best constant", "D"), (result.chosen, "chosen", "*")):
        if trial is not None:
            label = f"{name}: {short(trial.text)}"
            axes.plot(
                ms(trial), trial.quality, marker, color="#cc3311", markersize=9, linestyle="none", label=label
            )
    axes.axhline(result.goal.bound, color="#777777", linewidth=1, linestyle="--", label=str(result.goal))
    _frame(result, axes, [ms(t) for t in result.trials])
    axes.set_xlabel("ms of a call")
    axes.set_ylabel(result.goal.name)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="best")
    form = file.suffix.lower()[1:]
    return write_atomically(file, lambda temporary: figure.savefig(temporary, format=form, dpi=150))


def _frame(result: TuneResult, axes: object, times: list[float]) -> None:
    """What lies far on the bad side of the bound is cut off: it would flatten the rest."""
    away = abs(result.perfect - result.goal.bound) or 1e-3
    values = [t.quality for t in result.trials]
    worst = result.goal.bound - result.goal.sign * 2.5 * away
    low = max(min(values), worst) if result.goal.sign > 0 else min(values)
    high = max(values) if result.goal.sign > 0 else min(max(values), worst)
    edge = 0.05 * (high - low or 1.0)
    axes.set_ylim(low - edge, high + edge)  # type: ignore[attr-defined]
    axes.set_xlim(0.95 * min(times), 1.03 * max(times))  # type: ignore[attr-defined]


def short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
