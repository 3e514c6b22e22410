"""`repeat` and `hoist`, in both hosts: an op once more over other operands, and ops moved to where they are needed."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from elision.passes.errors import ElisionError, VerificationError
from elision.passes.ir.fx import FxGraph
from elision.passes.ir.graph import Graph, Op, Value
from elision.passes.ir.onnx import OnnxGraph
from elision.passes.onnx.io import from_proto
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

SHAPE = (2, 6, 4)


class Form(nn.Module):
    """Two ways from x: one that is reshaped, and a late one that is only of use to the last op."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        early = x.abs()
        folded = early.reshape(2, 3, 8)
        late = y.neg().exp()
        more = late.sin()
        return torch.cat([folded.reshape(2, 6, 4), more], 1)


def fx_graph() -> FxGraph:
    return FxGraph.trace(Form().eval(), (torch.randn(SHAPE), torch.randn(SHAPE)))


def onnx_graph() -> OnnxGraph:
    shapes = [("to_wide", [2, 3, 8]), ("to_narrow", [2, 6, 4])]
    nodes = [
        helper.make_node("Abs", ["x"], ["early"]),
        helper.make_node("Reshape", ["early", "to_wide"], ["folded"]),
        helper.make_node("Neg", ["y"], ["minus"]),
        helper.make_node("Exp", ["minus"], ["late"]),
        helper.make_node("Sin", ["late"], ["more"]),
        helper.make_node("Reshape", ["folded", "to_narrow"], ["back"]),
        helper.make_node("Concat", ["back", "more"], ["out"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "form",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in "xy"],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [2, 12, 4])],
        [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in shapes],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return OnnxGraph(from_proto(onnx.shape_inference.infer_shapes(model)))


GRAPHS = {"fx": fx_graph, "onnx": onnx_graph}


@pytest.fixture(params=list(GRAPHS))
def graph(request: pytest.FixtureRequest) -> Graph:
    return GRAPHS[request.param]()


def kinds(graph: Graph) -> list[str]:
    return [op.target.split(".")[-1].lower() for op in graph.ops]


def find(graph: Graph, name: str, which: int = 0) -> Op:
    return [op for op in graph.ops if op.target.split(".")[-1].lower() == name][which]


def value_of(graph: Graph, value: Value, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.asarray(graph.evaluate([value], dict(zip(graph.inputs, (x, y))))[0])


def arrays() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x, y = (random.normal(size=SHAPE).astype(np.float32) for _ in range(2))
    return x, y


def test_repeat_does_the_same_to_another_value(graph: Graph) -> None:
    x, y = arrays()
    reshape, late = find(graph, "reshape"), find(graph, "sin")
    before = value_of(graph, graph.outputs[0], x, y)
    inputs = [late.output, *reshape.inputs[1:]]
    (made,) = graph.repeat(reshape, inputs, after=late)
    assert made.producer is not None
    assert graph.ops.index(made.producer) == graph.ops.index(late) + 1
    assert (made.shape, made.dtype, made.producer.kind) == ((2, 3, 8), "float32", "reshape")
    graph.verify()
    np.testing.assert_allclose(value_of(graph, made, x, y), np.sin(np.exp(-y)).reshape(2, 3, 8), rtol=1e-5)
    np.testing.assert_array_equal(value_of(graph, graph.outputs[0], x, y), before)
    assert reshape.inputs[0] is find(graph, "abs").output  # the first one reads what it read


def test_repeat_of_an_op_with_several_operands(graph: Graph) -> None:
    x, y = arrays()
    concat = graph.ops[-1]
    swapped = [concat.inputs[1], concat.inputs[0]]
    (made,) = graph.repeat(concat, swapped, after=concat)
    graph.replace_output(0, made)
    graph.verify()
    expected = np.concatenate([np.sin(np.exp(-y)), np.abs(x)], 1)
    np.testing.assert_allclose(value_of(graph, made, x, y), expected, rtol=1e-5)


def test_hoist_moves_all_that_a_value_is_made_of(graph: Graph) -> None:
    x, y = arrays()
    first, sin = find(graph, "abs"), find(graph, "sin")
    before = value_of(graph, graph.outputs[0], x, y)
    last = graph.hoist(sin.output, first)
    assert last is sin
    assert kinds(graph)[:5] == ["abs", "neg", "exp", "sin", "reshape"]
    graph.verify()
    np.testing.assert_array_equal(value_of(graph, graph.outputs[0], x, y), before)
    again = graph.copy()
    assert kinds(again) == kinds(graph)
    again.verify()


def test_hoist_to_the_beginning(graph: Graph) -> None:
    sin = find(graph, "sin")
    assert graph.hoist(sin.output, None) is sin
    assert kinds(graph)[:4] == ["neg", "exp", "sin", "abs"]
    graph.verify()


def test_hoist_of_what_is_there_already(graph: Graph) -> None:
    lines, first, reshape = graph.text(), find(graph, "abs"), find(graph, "reshape")
    assert graph.hoist(first.output, reshape) is reshape
    assert graph.hoist(graph.inputs[0], first) is first
    assert graph.hoist(find(graph, "sin").output, find(graph, "sin")) is find(graph, "sin")
    assert graph.text() == lines
    graph.verify()


def test_hoist_leaves_in_place_what_stands_there_already(graph: Graph) -> None:
    first, exp = find(graph, "neg"), find(graph, "exp")
    lines = graph.text()
    assert graph.hoist(exp.output, first) is exp
    assert graph.text() == lines
    graph.verify()


def test_what_was_hoisted_can_be_read_there(graph: Graph) -> None:
    first, exp = find(graph, "abs"), find(graph, "exp")
    last = graph.hoist(exp.output, first)
    (made,) = graph.repeat(first, [exp.output], after=last)
    assert made.producer is not None and graph.ops.index(made.producer) == 3
    graph.verify()
    x, y = arrays()
    np.testing.assert_allclose(value_of(graph, made, x, y), np.exp(-y), rtol=1e-6)


def test_fx_refuses_operands_that_an_op_cannot_take() -> None:
    graph = fx_graph()
    concat = graph.ops[-1]
    lines = graph.text()
    with pytest.raises(VerificationError, match=r"aten\.cat cannot take its operands"):
        graph.repeat(concat, [graph.inputs[0], find(graph, "reshape").output], after=concat)
    assert graph.text() == lines
    graph.verify()


def test_a_host_without_the_primitives_says_so() -> None:
    graph = fx_graph()
    for call in (Graph.repeat, Graph.hoist):
        with pytest.raises(ElisionError, match="a graph of fx cannot"):
            if call is Graph.repeat:
                Graph.repeat(graph, graph.ops[0], [], after=None)
            else:
                Graph.hoist(graph, graph.outputs[0], None)
