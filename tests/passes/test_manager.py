"""The manager: copies, verification, drift, declining, failures with a reproducer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import sympy
from elision.passes import manager as manager_module
from elision.passes.base import Outcome, Pass, PassContext
from elision.passes.cost import Machine
from elision.passes.errors import (
    ElisionError,
    NothingMatched,
    PipelineError,
    Refused,
    VerificationError,
)
from elision.passes.failures import PassFailed
from elision.passes.ir.graph import Graph
from elision.passes.manager import run_pipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from .memory_graph import MemoryGraph


def small() -> tuple[MemoryGraph, list[np.ndarray]]:
    """relu(x w) with w [4, 3]; inputs for it."""
    rng = np.random.default_rng(3)
    graph = MemoryGraph()
    x = graph.input(2, 4)
    hidden = graph.add("linear", x, graph.constant(rng.standard_normal((4, 3))), transposed=False)
    graph.outputs = [graph.add("relu", hidden)]
    return graph, [rng.standard_normal((2, 4)).astype(np.float32)]


class Scale(Pass):
    """Multiplies the first output by `by` and adds a row of zeros cost."""

    name = "scale"

    @dataclass(frozen=True)
    class Options:
        by: float = 1.0

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        assert isinstance(graph, MemoryGraph)
        factor = graph.insert_constant(np.array(self.options.by), "factor")
        graph.replace_output(0, graph.insert("mul", [graph.outputs[0], factor], after=graph.ops[-1])[0])
        return Outcome(True, notes=["scaled"], statistics={"multiplied": 1}, extra={"secret": object()})


class Exact(Scale):
    name = "exact-scale"
    exact = True


def custom(run: Callable[[Any, PassContext], Outcome], **attributes: Any) -> Pass:
    return type("Custom", (Pass,), {"name": "custom", "run": lambda s, g, c: run(g, c), **attributes})()


def go(graph: MemoryGraph, args: list[np.ndarray], passes: Any, **options: Any) -> Any:
    return run_pipeline(graph, passes, runner=lambda g: g.calculate(args), **options)


def test_report_of_a_pass_that_changes() -> None:
    graph, args = small()
    before = graph.text()
    report = go(graph, args, [Scale(by=2.0), Exact(by=1.0)])
    assert graph.text() == before
    assert [p.changed for p in report.passes] == [True, True]
    assert report.text == "scale{by=2.0},exact-scale{by=1.0}"
    first = report.passes[0]
    assert first.notes == ["scaled"] and first.statistics == {"multiplied": 1}
    assert first.changes == {"removed": 0, "added": 1, "resized": 0}
    assert first.cost_after.flops > first.cost_before.flops
    assert report.passes[1].drift[0].max_abs == 0
    reference = graph.calculate(args)[0]
    assert report.drift[0].max_abs == pytest.approx(np.abs(reference).max())
    assert report.drift[0].mean_relative == pytest.approx(1.0)
    assert report.drift[0].cosine == pytest.approx(1.0)
    assert len(report.snapshots) == 3 and report.snapshots[0] == before
    assert report.diff(0).splitlines() == [
        "...",
        "  %v3: float32[2, 3] = relu(%v2)",
        "+ %v5: float32[2, 3] = mul(%v3, %c4)",
        "- return %v3",
        "+ return %v5",
    ]
    assert "%v7" in report.diff(1) and "%c4" not in report.diff(1).split("\n")[-1]
    assert json.loads(json.dumps(report.to_json()))["passes"][0]["drift"][0]["output"] == "v3"


def test_empty_pipeline_returns_the_graph() -> None:
    graph, args = small()
    report = go(graph, args, "")
    assert report.graph is graph and report.passes == [] and not report.changed
    assert report.drift is None and report.cost_before == report.cost_after


def test_a_pass_that_changes_nothing_leaves_the_very_graph() -> None:
    graph, args = small()
    report = go(graph, args, custom(lambda g, c: Outcome(notes=["r is 0"])))
    assert report.graph is graph and not report.changed
    assert report.passes[0].snapshot is None and report.diff(0) == ""


def test_an_exact_pass_must_match() -> None:
    graph, args = small()
    with pytest.raises(VerificationError, match="exact-scale must preserve the function, but output v3"):
        go(graph, args, Exact(by=1.01))
    go(graph, args, Exact(by=1.00001))  # within the tolerance
    assert go(graph, args, Exact(by=1.01), verify=False).changed


def test_lossy_passes_must_stay_finite() -> None:
    graph, args = small()
    with np.errstate(all="ignore"), pytest.raises(VerificationError, match="NaN or infinite"):
        go(graph, args, Scale(by=1e39))


def test_dropout_is_not_compared() -> None:
    graph, args = small()
    graph.ops[-1].attrs.update(fn="dropout", train=True)
    report = go(graph, args, Exact(by=2.0))
    assert report.passes[0].drift is None
    assert "dropout is on" in report.passes[0].notes[-1]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda g: g.outputs.clear(), "removed an output"),
        (
            lambda g: setattr(g.outputs[0], "dtype", "float16"),
            r"v3: float32\[2, 3\] became v3: float16\[2, 3\]",
        ),
        (
            lambda g: g.replace_output(0, g.add("slice", g.outputs[0], axis=1, start=0, end=2)),
            r"changed an output of the graph: v3: float32\[2, 3\] became v4: float32\[2, 2\]",
        ),
        (lambda g: g.ops.reverse(), r"relu_3 reads %v2 before it is computed"),
        (lambda g: setattr(g.inputs[0], "shape", (3, 4)), "changed an input"),
        (lambda g: setattr(g.ops[0], "target", "nonsense"), "custom the graph does not run: 'nonsense'"),
    ],
)
def test_verifier(edit: Callable[[MemoryGraph], Any], message: str) -> None:
    graph, args = small()

    def run(trial: MemoryGraph, context: PassContext) -> Outcome:
        edit(trial)
        return Outcome(True)

    before = graph.text()
    with pytest.raises(VerificationError, match=message) as caught:
        go(graph, args, custom(run))
    assert graph.text() == before
    assert caught.value.reproducer["failing_pass"] == "custom"


def test_symbolic_output_shapes() -> None:
    n, m = sympy.symbols("n m", integer=True, positive=True)
    equal = manager_module._may_be_equal
    assert equal((n + n, 3), (2 * n, 3))
    assert not equal((n, 3), (n + 1, 3))
    assert equal((n,), (m,))  # cannot be told; numerics decide
    assert not equal((2,), (3,)) and not equal((2, 3), (2,)) and equal(None, (2,))


def test_more_outputs_are_allowed() -> None:
    graph, args = small()

    def run(trial: MemoryGraph, context: PassContext) -> Outcome:
        trial.add_output(trial.ops[0].output, "map")
        return Outcome(True)

    report = go(graph, args, custom(run, exact=True))
    assert len(report.graph.outputs) == 2 and len(report.drift) == 1


# ---- declining ----------------------------------------------------------------------------------------
class Reducing(Scale):
    name = "reducing"
    reduces = True


def test_a_pass_that_saves_nothing_declines_unless_forced() -> None:
    graph, args = small()
    report = go(graph, args, Reducing(by=2.0))
    assert report.graph is graph and not report.changed
    assert report.passes[0].declined.startswith("reducing would save nothing here: estimated ")
    assert "force applies it all the same" in report.passes[0].declined
    forced = go(graph, args, Reducing(by=2.0), context=PassContext(force=True))
    assert forced.changed and forced.passes[0].declined is None


def test_a_pass_may_decline_by_itself() -> None:
    graph, args = small()
    report = go(graph, args, custom(lambda g, c: Outcome(True, declined="too small")))
    assert report.graph is graph and report.passes[0].declined == "too small"


def test_the_machine_decides() -> None:
    graph, args = small()
    slow = Machine("slow", flops=1.0, bytes=1e30)

    def run(trial: MemoryGraph, context: PassContext) -> Outcome:
        trial.ops[-1].attrs["fn"] = "where"  # no operations, the same bytes
        return Outcome(True)

    assert go(graph, args, custom(run, reduces=True), machine=slow).changed
    assert not go(graph, args, custom(run, reduces=True)).changed


# ---- failures -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (NothingMatched("no attention found"), NothingMatched, "custom: no attention found"),
        (Refused("custom cannot pass relu_3 at %v3"), Refused, "custom cannot pass relu_3 at %v3"),
        (KeyError("axis"), PassFailed, "pass custom failed: KeyError: 'axis'"),
        (AssertionError(), PassFailed, "pass custom failed: AssertionError: AssertionError"),
        (ValueError("two\nlines"), PassFailed, "pass custom failed: ValueError: two lines"),
    ],
)
def test_a_failing_pass(error: Exception, kind: type[ElisionError], message: str) -> None:
    graph, args = small()
    before = graph.text()

    def run(trial: MemoryGraph, context: PassContext) -> Outcome:
        trial.ops.clear()
        raise error

    with pytest.raises(kind) as caught:
        go(graph, args, [Scale(by=2.0), custom(run), Scale()], context=PassContext(target="onnxruntime"))
    assert str(caught.value) == message
    assert graph.text() == before
    record = json.loads(json.dumps(caught.value.reproducer))
    assert record["pipeline"] == "custom,scale"
    assert record["whole_pipeline"] == "scale{by=2.0},custom,scale"
    assert record["error_type"] == type(error).__name__
    assert record["context"] == {"force": False, "target": "onnxruntime", "want_map": False}
    assert {"python", "torch", "onnxruntime", "elision"} <= record["versions"].keys()
    # The failing pass's own input: after the first pass, before the failing one, and whole.
    assert [op.target for op in caught.value.graph.ops] == ["linear", "relu", "mul"]


def test_reproducer_holds_options() -> None:
    graph, args = small()
    with pytest.raises(VerificationError) as caught:
        go(graph, args, Exact(by=3))
    assert caught.value.reproducer["options"] == {"by": "3.0"}
    assert caught.value.reproducer["failing_class"].endswith("test_manager.Exact")


def test_mistakes_in_the_text_come_before_any_work() -> None:
    graph, args = small()
    with pytest.raises(PipelineError, match="unknown pass"):
        go(graph, args, "no-such-pass")


def test_example_inputs_that_do_not_fit() -> None:
    graph, _ = small()
    with pytest.raises(ElisionError, match="does not run on the example inputs") as caught:
        go(graph, [np.zeros((2, 5), np.float32)], Scale(by=2.0))
    assert type(caught.value) is ElisionError


def clear(trial: MemoryGraph, context: PassContext) -> Outcome:
    trial.ops.clear()
    raise Refused("custom stops here")


steps = st.sampled_from([Scale(by=2.0), Scale(), Exact(), Exact(by=2.0), Reducing(by=3.0), custom(clear)])


@settings(deadline=None, max_examples=60)
@given(st.lists(steps, max_size=5), st.booleans())
def test_no_run_touches_its_input(passes: list[Pass], force: bool) -> None:
    graph, args = small()
    before, reference = graph.text(), graph.calculate(args)[0]
    factor = 1.0
    try:
        report = go(graph, args, passes, context=PassContext(force=force))
    except (Refused, VerificationError) as error:
        assert error.reproducer is not None and error.graph is not None
    else:
        for done, single in zip(report.passes, passes):
            factor *= single.options.by if done.changed else 1.0
        np.testing.assert_allclose(report.graph.calculate(args)[0], factor * reference, rtol=1e-5)
        assert len(report.snapshots) == 1 + sum(p.changed for p in report.passes)
    assert graph.text() == before
    np.testing.assert_array_equal(graph.calculate(args)[0], reference)


def test_progress_is_told_before_each_pass() -> None:
    graph, args = small()
    seen: list[tuple[int, int, str]] = []
    go(graph, args, [Scale(), Exact()], progress=lambda i, n, p: seen.append((i, n, p.name)))
    assert seen == [(0, 2, "scale"), (1, 2, "exact-scale")]
