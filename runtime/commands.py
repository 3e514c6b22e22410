"""What the commands compute and how they show it; `cli.py` holds the arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..passes.base import known_passes
from ..passes.errors import ElisionError, PipelineError
from ..passes.options import default_text, describe, nearest, option_help
from ..passes.pipeline import parse
from .api import Result, open_onnx, optimize
from .bench import Comparison, feeds_or_error
from .costs import cost_ends
from .doctor import Finding
from .inputs import set_apart

STATES = {"ok": "green", "absent": "yellow", "broken": "red"}


def normalised(graph: Any, tell: Callable[[str], None]) -> Any:
    """An ONNX graph view in the one form that analyses are written for."""
    from ..passes.ir.onnx import OnnxGraph
    from ..passes.onnx.normalise import normalise

    tell("bringing the file to one form")
    model = graph.model.clone()
    normalise(model)
    return OnnxGraph(model)


# ---- optimize ------------------------------------------------------------------------------------------
def result_json(result: Result, written: Path | None) -> dict[str, Any]:
    return {"source": result.source, "written": None if written is None else str(written)} | (
        result.report.to_json()
    )


def show_report(console: Console, result: Result, written: Path | None) -> None:
    """Pass by pass, then the cost and the drift of the whole."""
    report = result.report
    table = Table(box=None, pad_edge=False)
    for title in ("pass", "changed", "operations", "time", "drift"):
        table.add_column(title)
    for single in report.passes:
        changes = single.changes or {}
        operations = f"+{changes.get('added', 0)} -{changes.get('removed', 0)} ~{changes.get('resized', 0)}"
        table.add_row(
            Text(single.text),
            "yes" if single.changed else "no",
            operations if single.changed else "",
            f"{single.seconds + single.verify_seconds:.2f} s",
            Text(worst(single.drift)),
        )
    console.print(table)
    for single in report.passes:
        if single.declined:
            console.print(f"{single.name} did nothing: {single.declined}", markup=False)
        for key, value in single.statistics.items():
            console.print(f"{single.name}: {key} {value}", markup=False)
        for note in single.notes:
            console.print(f"{single.name}: {note}", markup=False)
    for line in cost_lines(report):
        console.print(line, markup=False)
    if report.drift:
        console.print(f"drift of the outputs: {worst(report.drift)}", markup=False)
    console.print(f"wrote {written}" if written is not None else "nothing was written", markup=False)


def cost_lines(report: Any) -> list[str]:
    """Estimated operations, bytes and tokens per block, before and after."""
    before, after = cost_ends(report)
    lines = [
        f"{name}: {_big(a)}{unit} -> {_big(b)}{unit}{_less(a, b)}"
        for name, unit, a, b in (
            ("operations", "FLOP", before.flops, after.flops),
            ("memory traffic", "B", before.bytes, after.bytes),
        )
    ]
    if after.tokens_per_block:
        lines.append(f"tokens per block: {_series(before)} -> {_series(after)}")
    return lines


def _series(cost: Any) -> str:
    lengths = [str(length) for length in cost.tokens_per_block]
    if len(set(lengths)) == 1:
        return f"{lengths[0]} in each of {len(lengths)}"
    return " ".join(lengths) or "no attention"


def _less(before: float, after: float) -> str:
    return f" ({1 - after / before:.1%} less)" if before and after < before else ""


def _big(value: float) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} "


def worst(drift: Any) -> str:
    """The output that moved furthest, in words."""
    if not drift:
        return "not measured"
    item = max(drift, key=lambda d: d.mean_relative)
    if item.max_abs == 0:
        return "none"
    return f"{item.output}: correlation {item.correlation:.5f}, max abs {item.max_abs:.2g}"


# ---- diff ----------------------------------------------------------------------------------------------
def show_diff(console: Console, text: str, changes: dict[str, int]) -> None:
    colours = {"-": "red", "+": "green", "~": "cyan"}
    for line in text.splitlines():
        console.print(Text(line, style=colours.get(line[:1], "")))
    total = "the same" if not text else ", ".join(f"{count} {what}" for what, count in changes.items())
    console.print(total, markup=False)


# ---- bench ---------------------------------------------------------------------------------------------
Side = tuple[str, "bytes | str"]


def bench_sides(
    first: Path,
    second: Path | None,
    passes: str,
    against: str,
    example: Any,
    batch: int | None,
    force: bool,
    tell: Callable[[str], None],
) -> tuple[tuple[Side, Side], dict[str, Any]]:
    """The two models to compare and their inputs. Raises ElisionError when it is not clear what is asked."""
    if second is not None and (passes or against):
        raise ElisionError("give two files, or one file with --passes, not both")
    if second is None and not passes:
        raise ElisionError("nothing to compare with: give a second file, or --passes")
    graph = open_onnx(first)
    if second is not None:
        own = {value.name for value in graph.inputs}
        more = {value.name for value in open_onnx(second).inputs} - own
        added = {name: array for name, array in (example or {}).items() if name in more}
        given = None if example is None else {n: array for n, array in example.items() if n not in added}
        feeds = feeds_or_error(graph, given, batch)
        return ((str(first), str(first)), (str(second), str(second))), {**feeds, **added}
    pipelines = [parse(text) for text in (against, passes)]
    given, added = set_apart(example, [single for pipeline in pipelines for single in pipeline])
    feeds = feeds_or_error(graph, given, batch)
    sides: list[Side] = []
    found: dict[str, Any] = {}
    for text, pipeline in zip((against, passes), pipelines):
        if not text:
            sides.append((str(first), str(first)))
            continue
        names = {name for single in pipeline for name in single.new_inputs()}
        examples = {**feeds, **{name: array for name, array in added.items() if name in names}}
        result = optimize(first, pipeline, examples, force=force, verify=False, notify=tell)
        for report in result.report.passes:
            found.update(report.added)
        sides.append((text, result.model.SerializeToString()))
    return (sides[0], sides[1]), {**feeds, **found}


def show_comparison(console: Console, result: Comparison) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("", "median", "quartiles", "fastest", "runs"):
        table.add_column(title)
    for side in (result.first, result.second):
        table.add_row(
            Text(side.name),
            f"{side.median_ms:.2f} ms",
            f"{side.low_ms:.2f} to {side.high_ms:.2f} ms",
            f"{side.best_ms:.2f} ms",
            str(side.runs),
        )
    console.print(table)
    range_text = f"quartiles {result.ratio_low:.3f} to {result.ratio_high:.3f}"
    console.print(f"the second is {result.ratio:.3f} times as fast as the first ({range_text})", markup=False)
    for item in result.drift or []:
        console.print(
            f"output {item['output']}: correlation {item['correlation']:.5f}, max abs {item['max_abs']:.3g}",
            markup=False,
        )


# ---- passes, doctor ------------------------------------------------------------------------------------
def describe_passes(name: str | None) -> list[dict[str, Any]]:
    """Every pass (or the named one) with its options, as plain data. Raises PipelineError for unknown
    names."""
    known = known_passes()
    if name is not None and name not in known:
        raise PipelineError(f"unknown pass {name!r}{nearest(name, known)}")
    return [_describe(known[key]) for key in known if name in (None, key)]


def _describe(cls: Any) -> dict[str, Any]:
    import typing

    hints, told = typing.get_type_hints(cls.Options), option_help(cls.Options)
    options = [
        {
            "name": entry.name,
            "type": describe(hints[entry.name]),
            "default": default_text(entry),
            "help": told[entry.name],
        }
        for entry in fields(cls.Options)
    ]
    return {"name": cls.name, "exact": cls.exact, "summary": cls.summary, "options": options}


def show_passes(console: Console, found: list[dict[str, Any]]) -> None:
    """Passes and options; what an option means is shown of a single pass, where there is room."""
    for item in found:
        kind = "exact" if item["exact"] else "lossy"
        console.print(Text.assemble((item["name"], "bold"), f" ({kind}): {item['summary']}"))
        for option in item["options"]:
            default = "required" if option["default"] is None else f"default {option['default']}"
            told = f": {option['help']}" if option["help"] and len(found) == 1 else ""
            console.print(f"    {option['name']} = {option['type']} ({default}){told}", markup=False)


def show_findings(console: Console, findings: list[Finding]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        state = Text(finding.state, style=STATES[finding.state])
        detail = finding.detail + (f" ({finding.advice})" if finding.advice else "")
        table.add_row(Text(finding.subject), state, Text(detail))
    console.print(table)


def show_measured(console: Console, results: list[Any]) -> None:
    """Every class with the form that won, and how much faster it is than the first one."""
    for result in results:
        table = Table(box=None, pad_edge=False)
        for title in ("operation", "class", "form", "gain", "milliseconds"):
            table.add_column(title)
        for item in result.measured:
            times = ", ".join(f"{form} {ms:.3g}" for form, ms in item.milliseconds.items())
            gain = f"{item.choice.gain:.2f}x" if item.choice.gain != 1 else ""
            table.add_row(item.op, str(item.shape), item.choice.form, gain, times)
        console.print(result.target, style="bold")
        console.print(table)
        console.print(f"wrote {result.file}", markup=False)
