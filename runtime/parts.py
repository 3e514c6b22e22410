"""Optimising a model that comes in parts: a vision tower, a projector, a language model, each a graph of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..passes.base import Pass
from ..passes.errors import ElisionError, NothingMatched, Refused
from ..passes.parts import Parts
from ..passes.pipeline import Passes, parse
from .api import Notify, Result, is_onnx, open_onnx, open_torch, optimize
from .commands import normalised
from .files import write_together


@dataclass
class PartsResult:
    """The results by part, in the order given, and what is to be known of them together: which part's outputs go
    where, and what the caller must feed otherwise than before."""

    parts: dict[str, Result]
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Result:
        return self.parts[name]

    def save(self, folder: str | os.PathLike[str]) -> dict[str, Path]:
        """Write `<part>.onnx` or, of torch parts, `<part>.pt2` into `folder`, all of them or none. The folder is made
        where it is missing. Raises ElisionError when it cannot be written."""
        files = {name: f"{name}.{_suffix(result)}" for name, result in self.parts.items()}

        def write(workplace: Path) -> None:
            for name, result in self.parts.items():
                result.save(workplace / files[name])

        place = write_together(folder, write)
        return {name: place / file for name, file in files.items()}


def optimize_parts(
    parts: Mapping[str, Any],
    passes: Passes = "",
    example_inputs: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
    verify: bool = True,
    dynamic_shapes: Mapping[str, Any] | None = None,
    notify: Notify | None = None,
) -> PartsResult:
    """Run `passes` over a model that comes in parts. Arguments as in `optimize`, those of a part by its name.

    `token-drop` runs where the tower is, and the parts behind it take fewer tokens; another pass runs on every part
    that it fits. Which output of a part goes into which input of another is told by equal names, else by shapes that
    fit no other. Raises ElisionError as `optimize` does: nothing comes back unless every part is done."""
    tell = notify or (lambda _step: None)
    given = parse(passes)
    _check(parts, example_inputs, dynamic_shapes)
    examples, dynamic = dict(example_inputs or {}), dict(dynamic_shapes or {})
    opened = {}
    for name, target in parts.items():
        tell(f"reading part {name}")
        if is_onnx(target):
            opened[name] = normalised(open_onnx(target), lambda _step: None)
        else:
            opened[name] = open_torch(target, examples.get(name), dynamic.get(name))[0]
    pipelines, notes = _planned(given, Parts(opened))
    results = {}
    matched: set[str] = set()
    for name, target in parts.items():

        def told(step: str, name: str = name) -> None:
            tell(f"part {name}: {step}")

        results[name], done = _one(
            name,
            target,
            pipelines[name],
            {
                "example_inputs": examples.get(name),
                "dynamic_shapes": dynamic.get(name),
                "force": force,
                "verify": verify,
                "notify": told,
            },
        )
        matched |= {single.name for single in done}
    for single in given:
        if single.name not in matched:
            raise NothingMatched(f"{single.name} fits none of the parts {', '.join(parts)}")
    return PartsResult(results, notes)


def _suffix(result: Result) -> str:
    return "onnx" if result.graph.host == "onnx" else "pt2"


def _check(parts: Mapping[str, Any], *by_part: Mapping[str, Any] | None) -> None:
    if not parts:
        raise ElisionError("no parts were given")
    for name in parts:
        if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
            raise ElisionError(f"a part is named by letters, digits, - and _, not {name!r}")
    for given in by_part:
        if given is not None and not isinstance(given, Mapping):
            raise ElisionError(
                "example inputs and dynamic shapes of parts are given by the names of the parts"
            )
        for name in given or ():
            if name not in parts:
                raise ElisionError(f"there is no part {name!r}; the model has {', '.join(parts)}")


def _planned(given: Sequence[Pass], parts: Parts) -> tuple[dict[str, list[Pass]], list[str]]:
    """The pipeline of each part."""
    pipelines: dict[str, list[Pass]] = {name: [] for name in parts.graphs}
    notes: list[str] = []
    for single in given:
        try:
            plan = single.for_parts(parts)
        except Refused as error:
            raise Refused(f"{single.name}: {error}") from None
        notes += [] if plan is None else [f"{single.name}: {note}" for note in plan.notes]
        for name, line in pipelines.items():
            if plan is None:
                line.append(single)
            elif name in plan.passes:
                line.append(plan.passes[name])
    return pipelines, notes


def _one(name: str, target: Any, pipeline: list[Pass], options: dict[str, Any]) -> tuple[Result, list[Pass]]:
    """One part, without the passes that find nothing in it; and those that it was run with."""
    todo = list(pipeline)
    while True:
        try:
            return optimize(target, todo, **options), todo
        except NothingMatched as error:
            if error.failed not in todo:
                raise
            todo.remove(error.failed)
        except ElisionError as error:
            error.args = (f"part {name}: {error}",)
            raise
