"""Graphs that choose: an exact pass may turn a choice between equals by rounding, and nothing else."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from elision.passes.base import Outcome, Pass, PassContext
from elision.passes.ir.graph import Graph
from elision.passes.manager import PipelineReport
from onnx import TensorProto, helper
from torch import Tensor, nn

import elision
from elision.testing import capture
from elision.testing import report as run_passes

HOSTS = ["torch", "onnx"]
WEIGHTS = np.ones(4, np.float32)
X = np.array([[2.0, 2.00002, 0.5, 0.25]], np.float32)
"""The second token has the best score, by little."""


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.from_numpy(WEIGHTS))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.weights) * x


def chooser(host: str) -> Graph:
    """x [1, 4] times 1 where its score, tanh(x * weights), is the best, else times 0."""
    if host == "torch":
        graph = capture(Scaled(), (torch.from_numpy(X),))
    else:
        nodes = [
            helper.make_node("Mul", ["x", "weights"], ["scaled"]),
            helper.make_node("Tanh", ["scaled"], ["score"]),
            helper.make_node("Mul", ["score", "x"], ["out"]),
        ]
        x, out = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in ("x", "out"))
        weights = onnx.numpy_helper.from_array(WEIGHTS, "weights")
        opset = [helper.make_opsetid("", 23)]
        graph = capture(
            helper.make_model(helper.make_graph(nodes, "g", [x], [out], [weights]), opset_imports=opset)
        )
    _, tanh, times = graph.ops
    flags = graph.insert("top_tokens", [tanh.output, None, None], {"count": 1}, after=tanh)[0]
    graph.set_operand(times, 0, flags)
    return graph


class Exact(Pass):
    """Claims to preserve the function."""

    exact = True
    name = "claims-exact"

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        self.change(graph)
        return Outcome(changed=True)

    def change(self, graph: Graph) -> None:
        raise NotImplementedError


class Nudge(Exact):
    """Scores of the first token are a little larger, by so much."""

    by = 3e-5

    def change(self, graph: Graph) -> None:
        weights = WEIGHTS.copy()
        weights[0] += self.by
        first = graph.ops[0]
        graph.set_operand(first, 1, graph.insert_constant(weights, "nudged"))


class Push(Nudge):
    by = 3e-2


class Two(Exact):
    """Chooses two where one is to be chosen."""

    def change(self, graph: Graph) -> None:
        top = next(op for op in graph.ops if op.kind == "elision")
        made = graph.insert("top_tokens", [top.inputs[0], None, None], {"count": 2}, after=top)[0]
        graph.replace_uses(top.output, made)
        graph.remove_dead()


class NudgeAndSquare(Nudge):
    """What is chosen comes out squared, too."""

    def change(self, graph: Graph) -> None:
        super().change(graph)
        times = graph.ops[-1]
        x = times.inputs[1]
        assert x is not None
        graph.set_operand(times, 1, graph.repeat(graph.ops[0], [x, x], after=None)[0])


def after(host: str, single: Pass) -> PipelineReport:
    return run_passes(chooser(host), [single], (X,))


@pytest.mark.parametrize("host", HOSTS)
def test_a_choice_between_equals_may_turn(host: str) -> None:
    (report,) = after(host, Nudge()).passes
    assert report.drift is not None
    assert report.drift[0].max_abs == pytest.approx(X[0, 1])  # the outputs do differ, and the report says so
    (note,) = report.notes
    assert note.endswith(
        "chooses otherwise in 2 places, where what it chooses by is equal up to rounding; "
        "outputs were compared under equal choices"
    )


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("wrong", [Push, Two, NudgeAndSquare])
def test_other_scores_other_choices_and_other_values_are_found(host: str, wrong: type[Exact]) -> None:
    with pytest.raises(elision.VerificationError, match="must preserve the function, but output"):
        after(host, wrong())
