"""The report of one canvas: an HTML file that needs nothing else. Its text coloured by the step that decided each
token, what was computed at which step, and a PNG of that beside the page."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..passes.errors import ElisionError
from .canvas_pictures import map_picture, order_picture, png_bytes, prompt_of, step_colours, time_picture
from .canvas_result import Result, Trace
from .files import check_target, write_atomically, write_text
from .generation_report import Labels

LEVELS = 16
"""Colours of the text; of more steps, neighbours share one."""


def write_canvas_report(
    path: str | os.PathLike[str],
    *,
    result: Result,
    prompt_text: str,
    tokens: Sequence[str],
    settings: Mapping[str, Any],
) -> Path:
    """Writes the report of `result`, which was sampled with trace=True, as one HTML file, and the map of its steps as
    a PNG with the same stem beside it.

    tokens: the text of each position of the canvas, or its id as text; what an early stop has cut need not be there.
    settings: what the run was asked for, by name. Raises ElisionError where the result has no trace, texts are missing,
    or a file cannot be written."""
    page = check_target(path)
    if page.suffix.lower() == ".png":
        raise ElisionError(f"{page}: the report is a page, and the PNG is written beside it; name it .html")
    picture = check_target(page.with_suffix(".png"))
    drawn = _drawn(result)
    html = _page(result, prompt_text, tokens, settings, drawn)
    write_atomically(picture, lambda temporary: temporary.write_bytes(drawn["map"]))
    return write_text(page, html)


def render_canvas(
    *, result: Result, prompt_text: str, tokens: Sequence[str], settings: Mapping[str, Any]
) -> str:
    """The page as HTML text. Raises ElisionError as `write_canvas_report` does."""
    return _page(result, prompt_text, tokens, settings, _drawn(result))


def _traced(result: Result) -> Trace:
    if result.trace is None:
        raise ElisionError("this result has no trace to report: sample with trace=True")
    return result.trace


def _drawn(result: Result) -> dict[str, bytes]:
    """PNG files by name."""
    trace = _traced(result)
    end = len(result.token_ids) if result.finish == "eos" else None
    return {
        "map": png_bytes(map_picture(trace, end=end)),
        "order": png_bytes(order_picture(trace)),
        "time": png_bytes(time_picture(result)),
    }


def _page(
    result: Result,
    prompt_text: str,
    tokens: Sequence[str],
    settings: Mapping[str, Any],
    drawn: Mapping[str, bytes],
) -> str:
    from jinja2 import Environment, PackageLoader, select_autoescape

    if len(tokens) < len(result.token_ids):
        raise ElisionError(f"{len(tokens)} texts for the {len(result.token_ids)} positions of the canvas")
    environment = Environment(
        loader=PackageLoader("elision.runtime", "."),
        autoescape=select_autoescape(default=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plain = Labels(None).plain
    return environment.get_template("canvas.html.j2").render(
        figures=_figures(result),
        finish=result.finish,
        prompt=plain(prompt_text),
        tokens=_tokens(result, tokens),
        ids=all(text == str(token) for text, token in zip(tokens, result.token_ids)),
        colours=step_colours(LEVELS),
        pictures={
            name: "data:image/png;base64," + base64.b64encode(data).decode("ascii")
            for name, data in drawn.items()
        },
        settings=[(plain(str(name)), plain(_said(value))) for name, value in settings.items()],
    )


def _figures(result: Result) -> dict[str, Any]:
    seconds = {"refresh": result.refresh_seconds, "step": result.step_seconds, "rest": result.rest_seconds}
    whole, new = result.seconds or 1.0, len(result.new_tokens)
    return {
        "steps": result.steps,
        "refreshes": result.refreshes,
        "prompt": prompt_of(_traced(result)),
        "new": new,
        "each": new / result.steps if result.steps else 0.0,
        "computed": result.computed,
        "computed_each": result.computed / result.steps if result.steps else 0.0,
        "refreshed": result.refreshed,
        "stepped": result.stepped,
        "full": result.full,
        "ratio": result.full / result.computed if result.computed else None,
        "seconds": result.seconds,
        "speed": new / result.seconds if result.seconds else None,
        "shares": [
            {"name": name, "share": 100 * value / whole, "seconds": value} for name, value in seconds.items()
        ],
    }


def _tokens(result: Result, texts: Sequence[str]) -> list[dict[str, Any]]:
    """The canvas in order. level: the group of steps that decided the token, None for one that was given."""
    trace, plain = _traced(result), Labels(None).plain
    decided = dict(zip(trace.positions, zip(trace.when, trace.confidence)))
    steps = max(1, len(trace.states))
    shown = []
    for position, (token, text) in enumerate(zip(result.token_ids, texts)):
        piece, level = plain(text), None
        title = f"position {position}, id {token}"
        if position in decided:
            step, confidence = decided[position]
            level = step * LEVELS // steps
            title += f", step {step + 1}, confidence {confidence:.3f}"
        else:
            title += ", given"
        kind = "part" if not piece else "line" if not piece.strip("\n") else ""
        shown.append({"position": position, "piece": piece, "title": title, "level": level, "kind": kind})
    return shown


def _said(value: Any) -> str:
    """A setting as a reader writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_said(item)}" for name, item in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_said(item) for item in value) or "none"
    return str(value)
