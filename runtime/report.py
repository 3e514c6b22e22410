"""The report: one HTML file that needs nothing else. Pass by pass what changed, cost, drift, tokens per
block, and a picture of which patches became one token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..passes.errors import ElisionError
from ..passes.failures import versions
from . import pictures
from .api import MAP_OUTPUT, Result
from .bench import Comparison
from .costs import cost_ends
from .inputs import feeds_for
from .runners import run_model

IMAGES = 8
"""Images of a batch that a report shows."""

COLOURS = {"-": "removed", "+": "added", "~": "resized"}


def render(
    result: Result,
    example_inputs: Any = None,
    *,
    title: str = "",
    comparison: Comparison | None = None,
    remarks: Sequence[str] = (),
) -> str:
    """The report of a result as HTML text.

    With `example_inputs` that hold images, and a result made with `token_map=True`, it shows the merged
    tokens over them. `comparison` adds measured times, `remarks` lines of text. Raises ElisionError when
    the result does not run on the inputs."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    report = result.report
    environment = Environment(
        loader=PackageLoader("elision.runtime", "."),
        autoescape=select_autoescape(default=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["big"] = _big
    before, after = cost_ends(report)
    return environment.get_template("report.html.j2").render(
        title=title or f"Elision: {result.source}",
        source=result.source,
        pipeline=report.text,
        remarks=list(remarks),
        passes=[_pass(report, index) for index in range(len(report.passes))],
        before=before,
        after=after,
        chart=pictures.tokens_chart(_numbers(before.tokens_per_block), _numbers(after.tokens_per_block)),
        drift=report.drift or [],
        comparison=comparison,
        images=token_pictures(result, example_inputs) if example_inputs is not None else [],
        versions=versions(),
    )


def _pass(report: Any, index: int) -> dict[str, Any]:
    single = report.passes[index]
    lines = [
        {"text": line, "kind": COLOURS.get(line[:1], "same")}
        for line in report.diff(index, lengths=True).splitlines()
    ]
    return {
        "text": single.text,
        "kind": "exact" if single.exact else "lossy",
        "changed": single.changed,
        "declined": single.declined,
        "seconds": single.seconds,
        "verify_seconds": single.verify_seconds,
        "notes": single.notes,
        "statistics": single.statistics,
        "changes": single.changes,
        "before": single.cost_before,
        "after": single.cost_after,
        "drift": single.drift or [],
        "diff": lines,
    }


def _numbers(lengths: Sequence[Any]) -> list[float]:
    """Token counts as numbers; a symbolic one shows as zero."""
    numbers = []
    for length in lengths:
        try:
            numbers.append(float(length))
        except TypeError:
            numbers.append(0.0)
    return numbers


def _big(value: float) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} "


# ---- the picture ---------------------------------------------------------------------------------------
def token_pictures(result: Result, example_inputs: Any) -> list[dict[str, Any]]:
    """For each image of the first batch: the image and the merged tokens over it, as data URIs. Empty when
    the result has no token map, or no input is an image whose patches the map can be laid over."""
    found = token_map(result, example_inputs)
    if found is None:
        return []
    slots, arrays = found
    images = next((a for a in arrays if a.ndim == 4 and a.shape[0] == slots.shape[0]), None)
    if images is None:
        return []
    known: dict[str, Any] = {}
    for single in result.report.passes:
        known = single.extra.get("token_map", known)
    shown = []
    for array, slot in list(zip(images, slots))[:IMAGES]:
        image = pictures.as_image(array)
        if image is None:
            continue
        height, width = image.shape[:2]
        place = pictures.place_patches(len(slot), height, width, known.get("prefix"), known.get("suffix", 0))
        place = place or pictures.place_patches(len(slot), height, width)
        if place is None:
            continue
        first, grid = place
        patches = slot[first : first + grid[0] * grid[1]]
        left = len(np.unique(patches[patches >= 0]))
        shown.append(
            {
                "before": pictures.png(pictures.enlarged(image)),
                "after": pictures.png(pictures.merged_picture(image, patches, grid)),
                "caption": f"{grid[0]} x {grid[1]} = {len(patches)} patches became {left} tokens",
            }
        )
    return shown


def token_map(result: Result, example_inputs: Any) -> tuple[np.ndarray, list[np.ndarray]] | None:
    """(slot [B, N] of every input token, the input arrays), or None when the result carries no map."""
    graph: Any = result.graph
    if graph.host == "onnx":
        names = [value.name for value in graph.outputs]
        if MAP_OUTPUT not in names:
            return None
        feeds = feeds_for(graph, example_inputs)
        try:
            slots = run_model(graph.model, feeds)[names.index(MAP_OUTPUT)]
        except ElisionError:
            raise
        except Exception as error:
            raise ElisionError(f"the result does not run: {str(error).splitlines()[0]}") from error
        return np.asarray(slots), list(feeds.values())
    if MAP_OUTPUT not in getattr(graph, "extra_outputs", []):
        return None
    import torch
    from torch.utils import _pytree as pytree

    from .inputs import split_inputs

    args, kwargs = split_inputs(example_inputs)
    with torch.no_grad():
        outputs = result.module(*args, **kwargs)
    # Extra outputs follow the model's own, in the order in which they were added.
    extra = outputs[len(outputs) - len(graph.extra_outputs) + graph.extra_outputs.index(MAP_OUTPUT)]
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    return extra.cpu().numpy(), [leaf.detach().float().cpu().numpy() for leaf in leaves]
