"""How far two sets of outputs lie apart, and how far an exact pass may move them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .ir.graph import Graph

TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""The largest allowed difference of an exact pass, relative to the largest magnitude of the output. It is
chosen by the least precise float of the graph, because that is where re-association shows."""

ROUNDED_INPUTS = 0.1
"""The same where products have weights of few bits: their kernels round inputs to 8 bits, which moves every layer by
half a percent, and similar tokens may then match otherwise."""

_COARSE = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class Drift:
    """The distance of one output from its reference.

    `max_abs`: largest difference. `mean_relative`: mean |a - b| over mean |a|. `cosine` and `correlation`
    (Pearson): over all elements; 1.0 where both sides are constant and equal. Integers and booleans count as
    numbers. `finite`: no NaN or infinity where the reference has none.
    """

    output: str
    max_abs: float
    mean_relative: float
    cosine: float
    correlation: float
    finite: bool = True

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.output}: max abs {self.max_abs:.3g}, mean relative {self.mean_relative:.3g}, "
            f"cosine {self.cosine:.5f}, correlation {self.correlation:.5f}"
        )


def measure(output: str, reference: Any, actual: Any) -> Drift:
    """The drift of `actual` from `reference`, two arrays of one shape (ValueError otherwise)."""
    a = np.asarray(reference).astype(np.float64).ravel()
    b = np.asarray(actual).astype(np.float64).ravel()
    if np.shape(reference) != np.shape(actual):
        raise ValueError(f"shapes {np.shape(reference)} and {np.shape(actual)} differ")
    # Positions where the reference is not a number carry no information beyond whether both agree.
    usable = np.isfinite(a)
    finite = bool(np.isfinite(b[usable]).all())
    same = bool(np.array_equal(a[~usable], b[~usable], equal_nan=True))
    a, b = a[usable], b[usable]
    if not (finite and same):
        return Drift(output, float("inf"), float("inf"), 0.0, 0.0, finite=finite)
    if a.size == 0:
        return Drift(output, 0.0, 0.0, 1.0, 1.0)
    gap = np.abs(a - b)
    scale = float(np.abs(a).mean())
    relative = float(gap.mean()) / scale if scale else (float("inf") if gap.any() else 0.0)
    equal = not gap.any()
    return Drift(
        output,
        float(gap.max()),
        relative,
        1.0 if equal else _cosine(a, b),
        1.0 if equal else _cosine(a - a.mean(), b - b.mean()),
    )


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm > 0 else 0.0


def compare(names: Sequence[str], reference: Sequence[Any], actual: Sequence[Any]) -> list[Drift]:
    """`measure` for each output."""
    return [measure(n, a, b) for n, a, b in zip(names, reference, actual)]


def within(reference: Any, drift: Drift, tolerance: float) -> bool:
    """Whether a drift is small enough for an exact pass. Integers and booleans must be equal."""
    reference = np.asarray(reference)
    if reference.dtype.kind in "biu":
        return drift.max_abs == 0.0
    magnitudes = np.abs(reference.astype(np.float64))
    magnitudes = magnitudes[np.isfinite(magnitudes)]
    scale = float(magnitudes.max()) if magnitudes.size else 0.0
    return drift.max_abs <= tolerance * (scale or 1.0)


def beyond(reference: Sequence[Any], found: Sequence[Drift], tolerance: float) -> Drift | None:
    """The first of the drifts that is too large for an exact pass."""
    return next((d for old, d in zip(reference, found) if not within(old, d, tolerance)), None)


def tolerance(graph: Graph) -> float:
    """The tolerance for exact passes on this graph, see TOLERANCE."""
    if any(
        op.target in ("elision.linear_nbits", "elision.linear_topk", "elision.linear_spread")
        for op in graph.ops_of("elision")
    ):
        return ROUNDED_INPUTS
    present = {value.dtype for value in graph.values()}
    return next((TOLERANCE[name] for name in _COARSE if name in present), TOLERANCE["float32"])
