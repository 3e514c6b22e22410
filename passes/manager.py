"""Runs a pipeline over a graph: a copy for each pass, verification after it, cost, drift and snapshots.

The input graph is never touched. A pass that fails leaves nothing behind; the error says which pass, and
carries what is needed to run that pass again (`error.reproducer`, `error.graph`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import sympy

from . import cost as cost_model
from . import drift as drifts
from .base import NewSignature, Pass, PassContext
from .choices import Agreement, under_equal_choices
from .cost import Cost, Machine
from .diff import counts, diff_graphs, diff_texts
from .drift import Drift
from .errors import ElisionError, VerificationError
from .failures import explained, one_line
from .ir.graph import Graph, Shape, Value
from .order import Step
from .order import check as check_order
from .origin import Origin, last_rows
from .pipeline import Passes, format, parse

Runner = Callable[[Graph], Sequence[Any]]
"""Runs a graph on the example inputs; its outputs as arrays, in the order of `graph.outputs`."""


@dataclass
class PassReport:
    """What one pass did. `drift` compares with the graph before this pass; None when nothing was run.

    `snapshot` is the text after the pass, only if it changed the graph. `added`: examples for inputs that it has added,
    by name.
    """

    name: str
    text: str
    exact: bool
    changed: bool = False
    declined: str | None = None
    notes: list[str] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    verify_seconds: float = 0.0
    cost_before: Cost = field(default_factory=Cost)
    cost_after: Cost = field(default_factory=Cost)
    drift: list[Drift] | None = None
    snapshot: list[str] | None = None
    changes: dict[str, int] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    added: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "text": self.text,
            "exact": self.exact,
            "changed": self.changed,
            "declined": self.declined,
            "notes": self.notes,
            "statistics": self.statistics,
            "seconds": self.seconds,
            "verify_seconds": self.verify_seconds,
            "cost_before": self.cost_before.to_json(),
            "cost_after": self.cost_after.to_json(),
            "drift": None if self.drift is None else [d.to_json() for d in self.drift],
            "changes": self.changes,
        }


@dataclass
class PipelineReport:
    """A finished run. `graph` is the result (a graph of its own unless nothing changed); `drift` compares it
    with the input; `snapshots[0]` is the text of the input, one more for each pass that changed something."""

    graph: Graph
    text: str
    passes: list[PassReport]
    cost_before: Cost
    cost_after: Cost
    seconds: float = 0.0
    drift: list[Drift] | None = None
    before: list[str] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        return any(p.changed for p in self.passes)

    @property
    def snapshots(self) -> list[list[str]]:
        return [self.before, *(p.snapshot for p in self.passes if p.snapshot is not None)]

    def diff(self, index: int, context: int = 1, lengths: bool = False) -> str:
        """What pass number `index` changed, as text; "" if nothing."""
        after = self.passes[index].snapshot
        if after is None:
            return ""
        earlier = [p.snapshot for p in self.passes[:index] if p.snapshot is not None]
        return diff_graphs(earlier[-1] if earlier else self.before, after, context, lengths)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`, without snapshots."""
        return {
            "pipeline": self.text,
            "changed": self.changed,
            "seconds": self.seconds,
            "passes": [p.to_json() for p in self.passes],
            "cost_before": self.cost_before.to_json(),
            "cost_after": self.cost_after.to_json(),
            "drift": None if self.drift is None else [d.to_json() for d in self.drift],
        }


def run_pipeline(
    graph: Graph,
    passes: Passes,
    *,
    context: PassContext | None = None,
    runner: Runner | None = None,
    verify: bool = True,
    machine: Machine | None = None,
    progress: Callable[[int, int, Pass], None] | None = None,
) -> PipelineReport:
    """Run `passes` over `graph` and report.

    With `verify`, each result is checked: `graph.verify()`, shapes and dtypes of the outputs, and, given a
    `runner`, numerics on the example inputs. An exact pass must stay within `drift.TOLERANCE`; of a lossy one
    the drift is recorded. `machine` is what costs are estimated for. `progress(i, n, pass)` is called before
    each pass.

    Raises PipelineError, NothingMatched, Refused, VerificationError or PassFailed; all but the first carry
    `reproducer` (plain data) and `graph` (the input of the failing pass). `graph` itself is left as it was.
    """
    todo = parse(passes)
    manager = _Manager(context or PassContext(), runner if verify else None, verify, machine)
    started = time.perf_counter()
    before = graph.text()
    first = current = manager.begin(graph)
    reports: list[PassReport] = []
    done: list[Step] = []
    for index, single in enumerate(todo):
        if progress is not None:
            progress(index, len(todo), single)
        now = Step(single, current.graph, manager.context, False)
        try:
            current, report = manager.step(current, single)
        except Exception as error:
            raise explained(error, todo, index, now, done) from error
        done.append(replace(now, changed=report.changed))
        if report.snapshot is not None:
            older = [r.snapshot for r in reports if r.snapshot is not None]
            report.changes = counts(diff_texts(older[-1] if older else before, report.snapshot))
        reports.append(report)
    return PipelineReport(
        graph=current.graph,
        text=format(todo),
        passes=reports,
        cost_before=first.cost,
        cost_after=current.cost,
        seconds=time.perf_counter() - started,
        drift=manager.drift(first, current),
        before=before,
    )


@dataclass
class _State:
    """A graph between two passes, with what is known of it. `inputs`: what it runs on where that is not what the
    runner has, because a pass let it take others. `origin`: how it is compared with the graph that the pipeline began
    with."""

    graph: Graph
    cost: Cost
    outputs: list[np.ndarray] | None = None
    inputs: list[Any] | None = None
    origin: Origin = field(default_factory=Origin)


class _Manager:
    def __init__(
        self, context: PassContext, runner: Runner | None, verify: bool, machine: Machine | None
    ) -> None:
        self.context = context
        self.runner = runner
        self.verify = verify
        self.machine = machine or cost_model.MACHINES["cpu"]
        self.notes: list[str] = []  # of all passes from here on
        self.remarks: list[str] = []  # of the pass at work

    def begin(self, graph: Graph) -> _State:
        if self.runner is not None and _is_random(graph):
            self.notes.append("dropout is on in this graph, so its outputs were not compared")
            self.runner = None
        return _State(graph, self.cost(graph))

    def cost(self, graph: Graph) -> Cost:
        return cost_model.estimate(graph, example_inputs=self.context.example_inputs, machine=self.machine)

    def step(self, state: _State, single: Pass) -> tuple[_State, PassReport]:
        """One pass on a copy. Returns the new state, or the old one when the pass did or won nothing."""
        report = PassReport(
            single.name, str(single), single.exact, cost_before=state.cost, cost_after=state.cost
        )
        started = time.perf_counter()
        trial = state.graph.copy()
        outcome = single.run(trial, self.context)
        report.seconds = time.perf_counter() - started
        report.notes = [*outcome.notes, *self.notes]
        report.statistics, report.extra = dict(outcome.statistics), outcome.extra
        report.declined = outcome.declined
        if not outcome.changed or outcome.declined:
            return state, report
        check_order(single, state.graph)
        signature, context = outcome.signature, self.context
        after = _State(trial, state.cost, inputs=state.inputs, origin=state.origin)
        if signature is not None:
            self.context = replace(self.context, example_inputs=signature.after)
            report.added = dict(signature.added or {})
            after.inputs = None if self.adds(signature, state) else signature.after
            after.origin = state.origin.behind(signature, state.graph)
        after.cost = self.cost(trial)
        report.declined = self.not_worth_it(single, state.cost, after.cost)
        if report.declined:
            self.context, report.added = context, {}
            return state, report
        started = time.perf_counter()
        if self.verify:
            trial.verify()
            if outcome.signature is None:
                _check_outputs(single, state.graph, trial)
                report.drift = self.check_numerics(single, state, after)
            else:
                report.drift = self.check_signature(single, state, after, outcome.signature)
            report.notes += [note for note in self.notes + self.remarks if note not in report.notes]
            self.remarks = []
        report.verify_seconds = time.perf_counter() - started
        report.changed, report.cost_after, report.snapshot = True, after.cost, trial.text()
        return after, report

    def not_worth_it(self, single: Pass, before: Cost, after: Cost) -> str | None:
        if not single.reduces or self.context.force or after.seconds < before.seconds:
            return None
        return (
            f"{single.name} would save nothing here: estimated {_seconds(after.seconds)} after it, "
            f"{_seconds(before.seconds)} before ({_big(after.flops)}FLOP and {_big(after.bytes)}B, "
            f"{_big(before.flops)}FLOP and {_big(before.bytes)}B before); force applies it all the same"
        )

    def run(self, state: _State) -> list[np.ndarray]:
        assert self.runner is not None
        if state.outputs is None:
            if state.inputs is not None:
                feeds = dict(zip(state.graph.inputs, state.inputs))
                state.outputs = state.graph.evaluate(state.graph.outputs, feeds)
            else:
                state.outputs = [np.asarray(array) for array in self.runner(state.graph)]
        return state.outputs

    def run_like(self, state: _State, graph: Graph) -> list[np.ndarray]:
        """The outputs of `graph`, which takes the inputs of the state's."""
        return self.run(_State(graph, state.cost, inputs=state.inputs))

    def reference(self, state: _State) -> list[np.ndarray]:
        try:
            return self.run(state)
        except ElisionError:
            raise
        except Exception as error:
            raise ElisionError(f"the graph does not run on the example inputs: {one_line(error)}") from error

    def check_numerics(self, single: Pass, before: _State, after: _State) -> list[Drift] | None:
        if self.runner is None:
            return None
        reference = self.reference(before)
        try:
            actual = self.run(after)
        except ElisionError:
            raise
        except Exception as error:
            raise VerificationError(
                f"after {single.name} the graph does not run: {one_line(error)}"
            ) from error
        allowed = drifts.tolerance(before.graph)
        runs = (partial(self.run_like, before), partial(self.run_like, after))

        def agreed() -> Agreement | None:
            return under_equal_choices(before.graph, after.graph, runs, allowed)

        return self.compare(single, before.graph, before.graph.outputs, reference, actual, agreed)

    def adds(self, signature: NewSignature, before: _State) -> bool:
        """Whether a graph of this signature is run as the one before, with inputs more."""
        able = signature.added is not None and hasattr(self.runner, "with_inputs")
        return able and before.inputs is None

    def check_signature(
        self, single: Pass, before: _State, after: _State, signature: NewSignature
    ) -> list[Drift] | None:
        """Numerics across a pass after which the graph takes other inputs."""
        if self.runner is None:
            return None
        if signature.before is None or signature.after is None:
            self.notes.append("the graph takes other inputs now, so its outputs were not compared")
            self.runner = None
            return None
        given = _State(before.graph, before.cost, inputs=signature.before)
        if before.inputs is not None and signature.added is not None:
            given = before
        if self.adds(signature, before):
            given = before
            self.reference(given)
            self.runner = self.runner.with_inputs(signature.added or {})  # type: ignore[attr-defined]
        reference = signature.expect(self.reference(given))
        try:
            actual = self.run(after)
        except Exception as error:
            raise VerificationError(
                f"after {single.name} the graph does not run: {one_line(error)}"
            ) from error
        if signature.last_rows:
            actual = [last_rows(new, old) for old, new in zip(reference, actual)]
        return self.compare(single, before.graph, after.graph.outputs, reference, actual)

    def compare(
        self,
        single: Pass,
        graph: Graph,
        outputs: Sequence[Value],
        reference: Sequence[np.ndarray | None],
        actual: Sequence[np.ndarray],
        agreed: Callable[[], Agreement | None] = lambda: None,
    ) -> list[Drift]:
        """The drift of each output that has a reference; outputs that were added have none. `agreed`: what an exact
        pass put out where the graphs choose alike."""
        pairs = _pairs(outputs, reference, actual)
        for name, old, new in pairs:
            if old.shape != new.shape:
                raise VerificationError(
                    f"after {single.name} output {name} has shape {list(new.shape)}, before {list(old.shape)}"
                )
        found = [drifts.measure(*pair) for pair in pairs]
        allowed = drifts.tolerance(graph)
        for drift in found:
            if not drift.finite:
                raise VerificationError(
                    f"after {single.name} output {drift.output} has NaN or infinite values"
                )
        known = [old for _, old, _ in pairs]
        wrong = drifts.beyond(known, found, allowed) if single.exact else None
        if wrong is not None and (same := agreed()) is not None:
            self.remarks += same.notes
            alike = [drifts.measure(*pair) for pair in _pairs(outputs, reference, same.outputs)]
            wrong = drifts.beyond(known, alike, allowed)
        if wrong is not None:
            raise VerificationError(
                f"{single.name} must preserve the function, but output {wrong.output} differs by "
                f"{wrong.max_abs:.3g} (allowed: {allowed:g} of its largest magnitude)"
            )
        return found

    def drift(self, first: _State, last: _State) -> list[Drift] | None:
        """How far the last graph lies from the first, over the outputs that both have."""
        if self.runner is None or last.outputs is None:
            return None
        origin = last.origin
        given = first
        if not origin.same_examples or first.outputs is None:
            if origin.inputs is None:
                return None
            given = _State(first.graph, first.cost, inputs=origin.inputs)
        names: list[str | None] = [value.name for value in first.graph.outputs]
        reference, names = origin.expected(self.run(given), names)
        found = []
        for name, old, new in zip(names, reference, last.outputs):
            if old is not None:
                new = last_rows(new, old) if origin.last_rows else new
                found.append(drifts.measure(name or "", old, new))
        return found


def _pairs(
    outputs: Sequence[Value], reference: Sequence[np.ndarray | None], actual: Sequence[np.ndarray]
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Name, reference and array of each output that has a reference."""
    return [(v.name, a, b) for v, a, b in zip(outputs, reference, actual) if a is not None]


# ---- checks -------------------------------------------------------------------------------------------
def _is_random(graph: Graph) -> bool:
    return any(op.attrs.get("fn") == "dropout" and op.attrs.get("train") for op in graph.ops)


def _check_outputs(single: Pass, before: Graph, after: Graph) -> None:
    """No pass may change the shapes or dtypes of the graph's outputs; it may add outputs at the end."""
    if len(after.outputs) < len(before.outputs):
        raise VerificationError(
            f"{single.name} removed an output of the graph ({len(before.outputs)} before, "
            f"{len(after.outputs)} after)"
        )
    for old, new in zip(before.outputs, after.outputs):
        if old.dtype != new.dtype or not _may_be_equal(old.shape, new.shape):
            raise VerificationError(
                f"{single.name} changed an output of the graph: {_typed(old)} became {_typed(new)}"
            )
    for old, new in zip(before.inputs, after.inputs):
        if old.dtype != new.dtype or not _may_be_equal(old.shape, new.shape):
            raise VerificationError(
                f"{single.name} changed an input of the graph: {_typed(old)} became {_typed(new)}"
            )


def _may_be_equal(a: Shape | None, b: Shape | None) -> bool:
    """False only if both shapes are known and certainly differ."""
    if a is None or b is None:
        return True
    if len(a) != len(b):
        return False
    return all(m == n or sympy.simplify(sympy.sympify(m) - n).is_zero in (True, None) for m, n in zip(a, b))


def _typed(value: Value) -> str:
    return repr(value).removeprefix("%")


# ---- numbers in sentences ------------------------------------------------------------------------------
def _seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def _big(value: float) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} "
