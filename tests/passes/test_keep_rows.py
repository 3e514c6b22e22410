"""keep-rows: the rows that are asked for are those of the whole output, in both hosts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from elision.passes import testing
from elision.passes.errors import Refused
from elision.passes.ir.onnx import OnnxGraph
from elision.passes.keep_rows import KeepRows
from elision.passes.onnx import io
from onnx import TensorProto, helper, numpy_helper


class Tail(torch.nn.Module):
    """The end of a language model: a norm, the head, scores that are capped."""

    def __init__(self, capped: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.LayerNorm(16)
        self.head = torch.nn.Linear(16, 50)
        self.capped = capped

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.norm(x)
        scores = self.head(x)
        return (30 * torch.tanh(scores / 30) if self.capped else scores), x * 2


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("keep", [[6], [0, 3], [4, 4, 1]])
def test_torch(capped, keep):
    x = torch.randn(1, 7, 16)
    graph = testing.capture(Tail(capped).eval(), (x,), dynamic_shapes=({1: torch.export.Dim.AUTO},))
    whole, twice = testing.run(graph, (x,))
    report = testing.report(graph, [KeepRows()])
    assert report.graph.input_names[-1] == "keep"
    some, same = testing.run(report.graph, (x, torch.tensor(keep)))
    np.testing.assert_allclose(some, whole[:, keep], atol=1e-6)
    np.testing.assert_array_equal(same, twice)


def onnx_tail(*, rows_mix: bool = False) -> OnnxGraph:
    weight = np.random.default_rng(0).normal(size=(16, 50)).astype(np.float32)
    bias = np.arange(50, dtype=np.float32)
    nodes = [
        helper.make_node("Relu", ["x"], ["h"]),
        helper.make_node("MatMul", ["h", "w"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["scores"]),
    ]
    if rows_mix:
        nodes.append(helper.make_node("Softmax", ["scores"], ["out"], axis=1))
    name = "out" if rows_mix else "scores"
    made = helper.make_graph(
        nodes,
        "tail",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "m", 16])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "m", 50])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return OnnxGraph(io.from_proto(model))


def test_onnx():
    from elision.runtime.runners import run_model

    graph = onnx_tail()
    x = np.random.default_rng(1).normal(size=(1, 9, 16)).astype(np.float32)
    (whole,) = run_model(graph.model, {"x": x})
    report = testing.report(graph, [KeepRows()])
    (some,) = run_model(report.graph.model, {"x": x, "keep": np.array([8, 2])})
    np.testing.assert_allclose(some, whole[:, [8, 2]], atol=1e-6)


def test_rows_that_meet_are_refused():
    with pytest.raises(Refused, match="Softmax"):
        testing.report(onnx_tail(rows_mix=True), [KeepRows()])
    with pytest.raises(Refused, match="Add"):
        testing.report(onnx_tail(), [KeepRows(axis=2)])
    with pytest.raises(Refused, match="1 outputs"):
        testing.report(onnx_tail(), [KeepRows(output=1)])
