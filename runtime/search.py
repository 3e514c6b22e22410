"""`elision.tune`: the fastest pipeline that keeps a bound on quality, found by measuring on example data."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..passes.errors import ElisionError
from ..passes.pipeline import Passes, parse
from ..passes.tunable import sketches
from .api import Notify, Result, is_onnx, optimize
from .files import check_target, write_text
from .inputs import split_inputs
from .search_bench import Race, Stopwatch, Workbench
from .search_data import BATCH, Goal, Metric, calls_of, read_data, split
from .search_run import Judged, Search, Tell, Trial
from .search_space import Space

PASSES = "token-merge"
SECONDS = 300.0


@dataclass
class TuneResult:
    """A finished search.

    chosen: the pipeline; constant: the fastest one with one value everywhere, judged in the same way. gain: chosen
    against constant, raced on measured time, None where they are one. front: what no other trial beats in both quality
    (on the search's calls) and measured time, from the fastest on. original_ms: of one call of the model as it came.
    perfect: what the measure gives for equal outputs. searched, held_out: numbers of calls."""

    goal: Goal
    chosen: Trial
    constant: Trial | None
    gain: Race | None
    trials: list[Trial]
    original_ms: float
    perfect: float
    searched: int
    held_out: int
    judged: int
    seconds: float
    refused: int = 0
    notes: list[str] = field(default_factory=list)
    result: Result | None = field(default=None, repr=False)

    @property
    def pipeline(self) -> str:
        """The chosen pipeline as text, which `optimize` takes."""
        return self.chosen.text

    @property
    def front(self) -> list[Trial]:
        timed = {(t.ratio, t.quality): t for t in reversed(self.trials) if t.ratio is not None}
        best = [t for t in timed.values() if not any(self._beats(other, t) for other in timed.values())]
        return sorted(best, key=lambda t: t.ratio or 0.0)

    def _beats(self, a: Trial, b: Trial) -> bool:
        if a.ratio is None or b.ratio is None:
            return False
        better = self.goal.sign * (a.quality - b.quality)
        return a.ratio <= b.ratio and better >= 0 and (a.ratio < b.ratio or better > 0)

    def ms(self, trial: Trial) -> float | None:
        """Milliseconds of a call, from the ratio to the original."""
        return None if trial.ratio is None else trial.ratio * self.original_ms

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return {
            "goal": {
                "quality": self.goal.name,
                "bound": self.goal.bound,
                "more_is_better": self.goal.sign > 0,
            },
            "pipeline": self.pipeline,
            "chosen": self.chosen.to_json(),
            "constant": None if self.constant is None else self.constant.to_json(),
            "gain": None if self.gain is None else {**vars(self.gain), "times_faster": 1 / self.gain.ratio},
            "original_ms": self.original_ms,
            "perfect": self.perfect,
            "calls": {"searched": self.searched, "held_out": self.held_out},
            "judged": self.judged,
            "refused": self.refused,
            "seconds": self.seconds,
            "notes": self.notes,
            "front": [trial.text for trial in self.front],
            "trials": [trial.to_json() for trial in self.trials],
        }

    def plot(self, path: str | Path) -> Path:
        """A picture of quality against time, by the suffix of `path` .png, .svg or .pdf. Raises ElisionError."""
        from .search_report import plot

        return plot(self, path)

    def save(self, path: str | Path) -> Path:
        """Write the optimised model, see Result.save. Raises ElisionError."""
        if self.result is None:
            raise ElisionError("the search was told not to build the chosen pipeline (build=False)")
        return self.result.save(path)

    def write_pipeline(self, path: str | Path) -> Path:
        """Write the chosen pipeline as text, whole or not at all. Raises ElisionError."""
        return write_text(path, self.pipeline + "\n")


def tune(
    target: Any,
    data: Any,
    *,
    quality: str | Metric = "correlation",
    at_least: float | None = None,
    at_most: float | None = None,
    passes: Passes = PASSES,
    held_out: Any = None,
    batch: int | None = None,
    seconds: float = SECONDS,
    tries: int | None = None,
    seed: int = 0,
    library: bool = True,
    threads: int = 0,
    build: bool = True,
    notify: Notify | None = None,
    watch: Stopwatch | None = None,
) -> TuneResult:
    """Search the open options of `passes` for the fastest pipeline that keeps a bound on quality.

    target: as in `optimize`: an ONNX file or model, or a torch module, which runs eagerly. data: example inputs. A
        mapping of arrays by input name, one sample for each entry of the first axis, or one array; a list of calls; the
        path of an .npz file or of a folder of them, each a call. The last third of the calls is held out: the search
        does not see it, and what is chosen keeps the bound on it too. held_out: other data for that.
    quality: "correlation", "cosine" (of every sample, averaged), "agreement" (of the largest entry along the last
        axis), "error" (mean relative), or a callable (original's outputs, outputs), lists of arrays of one call -> a
        number. at_least, at_most: its bound, the mean over the calls.
    passes: a pipeline whose passes may lack options: those that they declare as tunable (`Pass.tunable`) are searched,
        all others are taken as they stand. seconds: how long to search; tries: the most pipelines to try.
    library: whether ONNX Runtime runs with our kernels. threads: of ONNX Runtime, 0: its own choice. batch: samples
        of a call, where the model leaves that open. build: optimise with the chosen pipeline at the end, with all
        checks. seed: the same one proposes the same, as far as measured times are the same. watch: measures time.

    Raises ElisionError: data that does not fit, nothing to tune (Refused), no pipeline that keeps the bound."""
    tell: Tell = notify or (lambda _step: None)
    goal = Goal.of(quality, at_least, at_most)
    if seconds <= 0 or (tries is not None and tries < 1):
        raise ElisionError("seconds and tries must be above 0")
    watch = watch or Stopwatch()
    started = watch.now()
    tell("reading the model and the data")
    data = read_data(Path(data)) if isinstance(data, str | Path) else data
    held_out = read_data(Path(held_out)) if isinstance(held_out, str | Path) else held_out
    added = {name for sketch in sketches(passes) for name in sketch.new_inputs()}
    example = None if is_onnx(target) else first_call(data, batch, added)
    bench = Workbench(target, example, library=library, threads=threads)
    searched, judged_on = split(
        calls_of(bench.graph, data, batch),
        None if held_out is None else calls_of(bench.graph, held_out, batch),
    )
    bench.begin(searched[0])
    space = Space(passes, bench.graph)
    search = Search(space, bench, goal, searched, judged_on, watch, seconds, tries, seed, tell)
    original_ms = 1e3 * min(watch.seconds(bench.original(), searched[0]) for _ in range(3))
    judged: Judged = search.judge(search.schedules(search.constants()))
    result = None
    if build:
        tell("building the chosen pipeline, with all checks")
        unused = added - {name for single in parse(judged.chosen.text) for name in single.new_inputs()}
        if bench.host == "fx":
            example = first_call(data, batch, unused)
        else:
            names = {*bench.source.input_names, *added} - unused
            example = {name: array for name, array in searched[0].items() if name in names}
        result = optimize(target, judged.chosen.text, example)
    refused = list(dict.fromkeys(search.refusals.values()))
    notes = list(space.notes)
    if refused:
        notes.append(f"{len(search.refusals)} pipelines were refused, for example: {refused[0]}")
    return TuneResult(
        goal,
        judged.chosen,
        judged.constant,
        judged.race,
        list(search.trials.values()),
        original_ms,
        search.perfect,
        len(searched),
        len(judged_on),
        judged.judged,
        watch.now() - started,
        len(search.refusals),
        notes,
        result,
    )


def first_call(data: Any, batch: int | None, without: Collection[str] = ()) -> Any:
    """The first call of `data`, in the form that a torch module is called with; arrays of the names `without` are for
    passes. Raises ElisionError."""
    import torch

    def tensor(item: Any) -> Any:
        return item if isinstance(item, torch.Tensor) else torch.as_tensor(item)

    size = batch or BATCH
    if isinstance(data, Mapping):
        return {str(name): tensor(item)[:size] for name, item in data.items() if str(name) not in without}
    if hasattr(data, "shape"):
        return (tensor(data)[:size],)
    if not isinstance(data, Sequence) or isinstance(data, str | bytes) or not data:
        raise ElisionError(f"data is a mapping of arrays or a list of calls, not a {type(data).__name__}")
    first = data[0]
    if hasattr(first, "shape"):
        return (tensor(first),)
    args, kwargs = split_inputs(first)
    kwargs = {name: item for name, item in kwargs.items() if name not in without}
    return {name: tensor(item) for name, item in kwargs.items()} if kwargs else tuple(tensor(a) for a in args)


def check_targets(*paths: Path | None) -> None:
    """Raises ElisionError where one cannot be written, before minutes of search."""
    for path in paths:
        if path is not None:
            check_target(path)
