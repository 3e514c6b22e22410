"""Fair timing of two things: interleaved runs, medians, spread, ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..passes.base import PassContext
from ..passes.errors import ElisionError
from ..passes.ir.graph import Graph
from .inputs import feeds_for, first_line, made_up_feeds
from .session import session
from .tensors import read_tensors


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one side: median, quartiles, fastest, and how many runs."""

    name: str
    median_ms: float
    low_ms: float
    high_ms: float
    best_ms: float
    runs: int

    @property
    def spread(self) -> float:
        """The distance of the quartiles relative to the median."""
        return (self.high_ms - self.low_ms) / self.median_ms if self.median_ms else 0.0


@dataclass(frozen=True)
class Comparison:
    """Two sides. `ratio` is how many times faster the second is: the median over the rounds, in each of
    which both sides ran next to each other; `ratio_low` and `ratio_high` are its quartiles."""

    first: Timing
    second: Timing
    ratio: float
    ratio_low: float
    ratio_high: float
    drift: list[dict[str, Any]] | None = None

    def to_json(self) -> dict[str, Any]:
        sides = [{**asdict(side), "spread": side.spread} for side in (self.first, self.second)]
        return {
            "sides": sides,
            "ratio": self.ratio,
            "ratio_low": self.ratio_low,
            "ratio_high": self.ratio_high,
            "drift": self.drift,
        }


def interleave(
    sides: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    warm_up: int = 2,
    seconds: float = 60.0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every run of every side. Each round runs every side once, in one order, so that a busy moment of the
    machine hits all of them. Turning round at the end of a round would run one side twice in a row, and the second time
    its weights lie in the cache: that was 13 % of a call here. Stops after `seconds`, but not before three rounds."""
    names = list(sides)
    for name in names:
        for _ in range(warm_up):
            sides[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for index in range(rounds):
        if progress is not None:
            progress(index, rounds)
        for name in names:
            begun = time.perf_counter()
            sides[name]()
            times[name].append(time.perf_counter() - begun)
        if index >= 2 and time.perf_counter() - started > seconds:
            break
    return times


def timing(name: str, times: list[float]) -> Timing:
    """The summary of one side's runs (seconds in, milliseconds out)."""
    low, high = np.percentile(times, [25, 75])
    scale = 1e3
    return Timing(
        name,
        statistics.median(times) * scale,
        float(low) * scale,
        float(high) * scale,
        min(times) * scale,
        len(times),
    )


def compare(times: Mapping[str, list[float]]) -> Comparison:
    """The comparison of exactly two sides."""
    (first, a), (second, b) = times.items()
    ratios = [x / y for x, y in zip(a, b)]
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return Comparison(timing(first, a), timing(second, b), float(middle), float(low), float(high))


def compare_models(
    first: tuple[str, bytes | str],
    second: tuple[str, bytes | str],
    feeds: Mapping[str, np.ndarray],
    *,
    rounds: int = 20,
    seconds: float = 60.0,
    threads: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Time two models, each (name, path or bytes), on the same inputs in ONNX Runtime; their outputs are
    compared.

    Raises ElisionError when one does not load or run."""
    import onnxruntime

    from ..passes import drift

    sides: dict[str, Callable[[], object]] = {}
    outputs: list[list[Any]] = []
    names: list[str] = []
    for name, model in _distinct(first, second):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        loaded = session(model, options, ["CPUExecutionProvider"])
        inputs = {item.name: feeds[item.name] for item in loaded.get_inputs() if item.name in feeds}
        try:
            outputs.append(loaded.run(None, inputs))
        except Exception as error:
            raise ElisionError(f"{name}: onnxruntime does not run it ({first_line(error)})") from error
        names = names or [item.name for item in loaded.get_outputs()]
        sides[name] = lambda loaded=loaded, inputs=inputs: loaded.run(None, inputs)
    times = interleave(sides, rounds=rounds, seconds=seconds, progress=progress)
    result = compare(times)
    pairs = [
        drift.measure(name, a, b).to_json()
        for name, a, b in zip(names, *outputs)
        if isinstance(a, np.ndarray) and a.dtype.kind in "fiub" and np.shape(a) == np.shape(b)
    ]
    return Comparison(result.first, result.second, result.ratio, result.ratio_low, result.ratio_high, pairs)


def _distinct(
    first: tuple[str, bytes | str], second: tuple[str, bytes | str]
) -> list[tuple[str, bytes | str]]:
    if first[0] != second[0]:
        return [first, second]
    return [(f"{first[0]} (first)", first[1]), (f"{second[0]} (second)", second[1])]


def feeds_or_error(graph: Graph, given: Any, batch: int | None = None) -> dict[str, np.ndarray]:
    """Inputs for a benchmark: what the user gave, or made-up ones; ElisionError when neither is possible."""
    if given is not None:
        return feeds_for(graph, given)
    feeds = made_up_feeds(graph, batch)
    if feeds is None:
        shown = "; ".join(repr(value)[1:] for value in graph.inputs)
        raise ElisionError(f"no inputs can be made up for {shown}: give an .npz file with --inputs")
    return feeds


def context_for(feeds: Mapping[str, np.ndarray], *, force: bool) -> PassContext:
    """What passes are told when a pipeline is only run to be timed."""
    return PassContext(
        force=force,
        target="onnxruntime",
        example_inputs=list(feeds.values()),
        read_arrays=read_tensors,
    )
