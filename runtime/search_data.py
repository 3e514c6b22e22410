"""Example data of a search, and how like the outputs of a cheaper model are to the original's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..passes.errors import ElisionError
from ..passes.ir.graph import Graph
from ..passes.options import nearest
from .inputs import feeds_for, split_inputs, to_array
from .shell import read_arrays

Outputs = list[np.ndarray]
Metric = Callable[[Outputs, Outputs], float]
"""(the original's outputs, the cheaper model's) of one call -> a number. More is better, unless `at_most` is asked."""

BATCH = 4
"""Samples of a call, where neither the model nor the user says how many."""

HELD_OUT = 1 / 3
"""The share of the calls, the last ones, that the search does not see."""


# ---- measures -----------------------------------------------------------------------------------------
def correlation(reference: Outputs, found: Outputs) -> float:
    """Pearson's correlation of every sample of every output, averaged."""
    return _by_sample(reference, found, lambda a, b: _cosine(a - a.mean(), b - b.mean()))


def cosine(reference: Outputs, found: Outputs) -> float:
    """Cosine of every sample of every output, averaged."""
    return _by_sample(reference, found, _cosine)


def agreement(reference: Outputs, found: Outputs) -> float:
    """How often the largest entry along the last axis is the same one, averaged over the outputs of floats."""
    shares = [
        float(np.mean(a.argmax(-1) == b.argmax(-1))) if a.shape == b.shape else 0.0
        for a, b in _floats(reference, found)
    ]
    return float(np.mean(shares))


def error(reference: Outputs, found: Outputs) -> float:
    """Mean absolute difference over mean magnitude, averaged over the outputs of floats: less is better."""
    errors = [
        float(np.abs(a - b).mean() / max(float(np.abs(a).mean()), 1e-30)) if a.shape == b.shape else np.inf
        for a, b in _floats(reference, found)
    ]
    return float(np.mean(errors))


METRICS: dict[str, Metric] = {
    "correlation": correlation,
    "agreement": agreement,
    "cosine": cosine,
    "error": error,
}


def _floats(reference: Outputs, found: Outputs) -> list[tuple[np.ndarray, np.ndarray]]:
    pairs = [
        (a.astype(np.float64), b.astype(np.float64))
        for a, b in zip(reference, found)
        if a.dtype.kind not in "iub" and a.size
    ]
    if not pairs:
        raise ElisionError("the model has no output of floats to compare: give a metric of your own")
    return pairs


def _by_sample(reference: Outputs, found: Outputs, of: Callable[[np.ndarray, np.ndarray], float]) -> float:
    values = []
    for a, b in _floats(reference, found):
        if a.shape != b.shape:
            return 0.0
        rows = a.reshape(len(a), -1) if a.ndim > 1 else a.reshape(1, -1)
        values += [of(x, y) for x, y in zip(rows, b.reshape(rows.shape))]
    return float(np.mean(values))


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    if size == 0:  # a constant has no direction: equal ones are alike, others are not
        return float(np.array_equal(a, b))
    return float(a @ b) / size


@dataclass(frozen=True)
class Goal:
    """A measure and the bound on it. Inside a search more is always better: `sign` is -1 where less is."""

    name: str
    metric: Metric
    bound: float
    sign: float

    @classmethod
    def of(cls, quality: str | Metric, at_least: float | None, at_most: float | None) -> Goal:
        """Raises ElisionError for an unknown name, no bound or two."""
        if (at_least is None) == (at_most is None):
            raise ElisionError("give one bound of the quality, at_least or at_most")
        bound = at_least if at_most is None else at_most
        if bound is None or not np.isfinite(bound):
            raise ElisionError(f"the bound of the quality is a number, not {bound}")
        if callable(quality):
            name, metric = getattr(quality, "__name__", "metric"), quality
        elif quality in METRICS:
            name, metric = quality, METRICS[quality]
            if (quality == "error") == (at_most is None):
                raise ElisionError(
                    "an error has a bound at_most"
                    if quality == "error"
                    else f"{quality} has a bound at_least"
                )
        else:
            raise ElisionError(f"no quality is called {quality!r}{nearest(str(quality), METRICS)}")
        return cls(name, metric, float(bound), 1.0 if at_most is None else -1.0)

    def __call__(self, reference: Sequence[Outputs], found: Sequence[Outputs]) -> list[float]:
        """The measure of every call. Raises ElisionError where a metric gives no number."""
        values = []
        for a, b in zip(reference, found):
            value = self.metric(a, b)
            try:
                number = float(value)
            except (TypeError, ValueError):
                raise ElisionError(
                    f"the metric {self.name} gave a {type(value).__name__}, not a number"
                ) from None
            values.append(number if np.isfinite(number) else -np.inf * self.sign)
        return values

    def kept(self, quality: float) -> bool:
        return self.sign * quality >= self.sign * self.bound

    def loss(self, quality: float, perfect: float) -> float:
        """How far below the original's own quality, at least 0."""
        return max(self.sign * (perfect - quality), 0.0)

    def __str__(self) -> str:
        return f"{self.name} at {'least' if self.sign > 0 else 'most'} {self.bound:g}"


# ---- data ---------------------------------------------------------------------------------------------
Call = dict[str, np.ndarray]


def read_data(path: Path) -> Any:
    """What `calls_of` takes: the arrays of an .npz file, or a list of these for a folder, in the order of the names.

    Raises ElisionError for a missing or broken file and for a folder without any."""
    if not path.is_dir():
        return read_arrays(path)
    files = sorted(path.glob("*.npz"))
    if not files:
        raise ElisionError(f"{path}: there is no .npz file in this folder")
    return [read_arrays(file) for file in files]


def calls_of(graph: Graph, data: Any, batch: int | None) -> list[Call]:
    """Feeds by input name for every call, from example data.

    A mapping of arrays is cut along its first axis into calls of `batch` samples (the model's own length where that is
    fixed); what is left over is not used. A list has one entry a call: a mapping, a tuple or an array. Names that the
    model does not have are kept, for passes that add inputs. Raises ElisionError where something does not fit."""
    if isinstance(data, Mapping):
        named = {str(name): to_array(item, str(name)) for name, item in data.items()}
        calls = _cut(graph, named, batch)
    elif isinstance(data, Sequence) and not isinstance(data, str | bytes):
        calls = [_named(graph, entry) for entry in data]
    elif hasattr(data, "shape"):
        only = graph.input_names
        if len(only) != 1:
            raise ElisionError(f"data is one array, and the model has {len(only)} inputs: give them by name")
        calls = _cut(graph, {only[0]: to_array(data, only[0])}, batch)
    else:
        raise ElisionError(f"data is a mapping of arrays or a list of calls, not a {type(data).__name__}")
    names = set(graph.input_names)
    for call in calls:
        feeds_for(graph, {name: array for name, array in call.items() if name in names})
    return calls


def _named(graph: Graph, entry: Any) -> Call:
    if isinstance(entry, Mapping):
        return {str(name): to_array(item, str(name)) for name, item in entry.items()}
    items = [entry] if isinstance(entry, np.ndarray) else list(split_inputs(entry)[0])
    if len(items) != len(graph.inputs):
        raise ElisionError(f"a call has {len(items)} inputs, and the model {len(graph.inputs)}")
    return {name: to_array(item, name) for name, item in zip(graph.input_names, items)}


def _cut(graph: Graph, named: Mapping[str, np.ndarray], batch: int | None) -> list[Call]:
    lengths = {name: len(array) if array.ndim else 0 for name, array in named.items()}
    if not lengths or len(set(lengths.values())) > 1 or not min(lengths.values()):
        shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ElisionError(
            f"data has one sample for each entry of the first axis, alike in all arrays: {shown}"
        )
    missing = [name for name in graph.input_names if name not in named]
    if missing:
        raise ElisionError(
            f"data has no array {missing[0]!r}; the model takes {', '.join(graph.input_names)}"
        )
    fixed = {int(v.shape[0]) for v in graph.inputs if v.shape and isinstance(v.shape[0], int)}
    if len(fixed) > 1:
        raise ElisionError(
            "the model's inputs have no common batch axis: give data as one file for each call"
        )
    samples = next(iter(lengths.values()))
    size = fixed.pop() if fixed else min(batch or BATCH, samples)
    if samples < size:
        raise ElisionError(f"data has {samples} samples, and the model takes {size} at once")
    return [
        {name: array[start : start + size] for name, array in named.items()}
        for start in range(0, samples - size + 1, size)
    ]


def split(calls: list[Call], held_out: list[Call] | None) -> tuple[list[Call], list[Call]]:
    """What the search sees, and what it is judged on: the last third of the calls, unless data was given for it.

    Raises ElisionError where there are not two calls."""
    if held_out is not None:
        return calls, held_out
    if len(calls) < 2:
        raise ElisionError(
            f"data makes {len(calls)} call: at least 2 are needed, one to search on and one to judge on "
            "(give more samples, or a smaller batch)"
        )
    kept = len(calls) - max(1, round(len(calls) * HELD_OUT))
    return calls[:kept], calls[kept:]
