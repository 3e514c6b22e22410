"""Measuring the lowering table on the machine at hand: every form of every operation, at sizes that models have.

Forms of one case run in turn (see `bench.interleave`), so that a busy moment of the machine hits all of them. What
counts is the median of the ratios to the first form. A form other than the first must win clearly: by 2 % in that, and
in the fastest quarter of the runs, which a busy machine disturbs least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..passes.errors import ElisionError
from ..passes.lowering import ONNXRUNTIME, TORCH_CPU, TORCH_CUDA, Choice, ShapeClass, Table
from ..passes.options import nearest
from .bench import interleave
from .table import PACKAGES, conditions, save

CLEAR = 1.02
"""How much faster than the first form another one must be."""


@dataclass(frozen=True)
class Case:
    """One class of shapes of one operation. `make` builds what runs each form, the first one first."""

    op: str
    shape: ShapeClass
    make: Callable[[], dict[str, Callable[[], object]]]


@dataclass(frozen=True)
class Measured:
    """A case with its times: form -> median milliseconds, and what was chosen."""

    op: str
    shape: ShapeClass
    choice: Choice
    milliseconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return {
            "operation": self.op,
            "class": str(self.shape),
            "form": self.choice.form,
            "gain": round(self.choice.gain, 3),
            "milliseconds": {form: round(ms, 4) for form, ms in self.milliseconds.items()},
        }


def targets(wanted: str | None = None) -> list[str]:
    """The targets to measure: all that can be used here, or the one wanted. Raises ElisionError for one that cannot."""
    import torch

    here = [ONNXRUNTIME, TORCH_CPU] + ([TORCH_CUDA] if torch.cuda.is_available() else [])
    if wanted is None:
        return here
    if wanted not in PACKAGES:
        raise ElisionError(f"nothing is measured for the target {wanted!r}{nearest(wanted, PACKAGES)}")
    if wanted not in here:
        raise ElisionError(f"{wanted} cannot be measured here: torch sees no GPU")
    return [wanted]


def cases_of(target: str, *, quick: bool = False) -> list[Case]:
    """What is measured for a target; `quick`: a few sizes only."""
    if target == ONNXRUNTIME:
        from .tune_onnx import cases
    else:
        from .tune_torch import cases
    return cases(target, quick=quick)


def measure(
    cases: Iterable[Case],
    *,
    rounds: int = 25,
    seconds: float = 4.0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Measured]:
    """Run every case for about `seconds`."""
    todo, found = list(cases), []
    for index, case in enumerate(todo):
        if progress is not None:
            progress(index, len(todo))
        times = interleave(case.make(), rounds=rounds, seconds=seconds)
        found.append(chosen(case.op, case.shape, times))
    return found


def chosen(op: str, shape: ShapeClass, times: dict[str, list[float]]) -> Measured:
    """The form that won, from the seconds of every run of every form."""
    first, *others = times
    form, gain = first, 1.0
    for other in others:
        ratio = float(np.median([a / b for a, b in zip(times[first], times[other])]))
        fastest = float(np.percentile(times[first], 25) / np.percentile(times[other], 25))
        if min(ratio, fastest) > CLEAR and ratio > gain:
            form, gain = other, ratio
    medians = {name: float(np.median(runs)) * 1e3 for name, runs in times.items()}
    return Measured(op, shape, Choice(form, gain), medians)


def table_of(target: str, measured: Iterable[Measured], source: str) -> Table:
    entries: dict[tuple[str, str], dict[ShapeClass, Choice]] = {}
    for item in measured:
        entries.setdefault((item.op, target), {})[item.shape] = item.choice
    return Table(entries, source)


@dataclass(frozen=True)
class Tuned:
    """What was measured for a target, and the file that holds the table now."""

    target: str
    measured: list[Measured]
    file: Path

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "file": str(self.file),
            "conditions": conditions(self.target),
            "measured": [item.to_json() for item in self.measured],
        }


def tune(
    target: str | None = None, *, quick: bool = False, progress: Callable[[int, int], None] | None = None
) -> list[Tuned]:
    """Measure one target, or all that can be used here, and keep the tables. Raises ElisionError.

    A target without kernels here is left out unless it is the one asked for."""
    found = []
    for name in targets(target):
        try:
            cases = cases_of(name, quick=quick)
        except ElisionError:
            if target is not None:
                raise
            continue
        measured = measure(cases, seconds=1.0 if quick else 4.0, progress=progress)
        found.append(Tuned(name, measured, save(name, table_of(name, measured, "measured here"))))
    return found
