"""Rows that were folded for products which take matrices only."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from elision.passes.analysis.spaces import analyse
from elision.passes.ir.graph import Graph
from elision.passes.unfold import folds, unfold
from onnx import TensorProto, helper, numpy_helper

from elision.testing import capture, run

X = np.random.default_rng(0).standard_normal((2, 4, 8)).astype(np.float32)


def folded(**gemm: Any) -> Graph:
    """A block of attention over [B, 4, 8], and an MLP over [B * 4, 8] of two Gemm, one of them transposed."""
    draw = np.random.default_rng(1).standard_normal
    nodes = [
        helper.make_node("Unsqueeze", ["x", "one"], ["q"]),
        helper.make_node("Attention", ["q", "q", "q"], ["heads"]),
        helper.make_node("Squeeze", ["heads", "one"], ["seen"]),
        helper.make_node("Add", ["x", "seen"], ["stream"]),
        helper.make_node("Reshape", ["stream", "matrix"], ["rows"]),
        helper.make_node("Gemm", ["rows", "up", "bias"], ["wide"], transB=1, **gemm),
        helper.make_node("Relu", ["wide"], ["bent"]),
        helper.make_node("Gemm", ["bent", "down"], ["narrow"]),
        helper.make_node("Add", ["rows", "narrow"], ["sum"]),
        helper.make_node("Reshape", ["sum", "tokens"], ["y"]),
    ]
    arrays = {
        "one": np.array([1]),
        "matrix": np.array([-1, 8]),
        "tokens": np.array([-1, 4, 8]),
        "up": draw((16, 8)).astype(np.float32),
        "bias": draw(16).astype(np.float32),
        "down": draw((16, 8)).astype(np.float32),
    }
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4, 8]) for name in "xy")
    weights = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    made = helper.make_graph(nodes, "g", [x], [y], weights)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)])
    onnx.checker.check_model(model)
    return capture(model)


def test_gemm_on_folded_rows_becomes_a_product_of_any_rank() -> None:
    graph = folded()
    (before,) = run(graph, (X,))
    assert unfold(graph, analyse(graph)) == 1
    graph.verify()
    kinds = [op.target for op in graph.ops]
    assert "Gemm" not in kinds and kinds.count("MatMul") == 2
    assert not folds(graph, analyse(graph))
    np.testing.assert_allclose(run(graph, (X,))[0], before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factor", [{"alpha": 2.0}, {"beta": 0.5}])
def test_a_gemm_that_scales_stays(factor: dict[str, float]) -> None:
    graph = folded(**factor)
    text = graph.text()
    assert unfold(graph, analyse(graph)) == 0
    assert graph.text() == text
