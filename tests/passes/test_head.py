"""The head pass: the k largest logits are those of the sorted logits, in both hosts, and other outputs stay."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from elision.passes import testing
from elision.passes.errors import PipelineError, Refused
from elision.passes.head import Head
from elision.passes.keep_rows import KeepRows
from onnx import TensorProto, helper, numpy_helper


class Tail(torch.nn.Module):
    """The end of a language model."""

    def __init__(self, *, normed: bool = True, squashed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.RMSNorm(16, eps=1e-5) if normed else torch.nn.Identity()
        self.head = torch.nn.Linear(16, 50, bias=False)
        self.squashed = squashed
        if normed:
            torch.nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x * 2
        logits = self.head(self.norm(x))
        return (30 * torch.tanh(logits / 30) if self.squashed else logits), x


def largest(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    return np.take_along_axis(logits, order, -1), order


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("k", [1, 5])
def test_torch(normed: bool, k: int) -> None:
    x = torch.randn(1, 7, 16)
    graph = testing.capture(Tail(normed=normed).eval(), (x,))
    report = testing.report(graph, [Head(k=k)])
    logits, twice = testing.run(graph, (x,))
    values, same, indices = testing.run(report.graph, (x,))
    want, order = largest(logits, k)
    np.testing.assert_allclose(values, want, atol=1e-5)
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(same, twice)
    assert not [op for op in report.graph.ops if op.kind == "linear"]
    assert ("norms folded in" in report.passes[0].statistics) == normed


@pytest.mark.parametrize("k", [1, 4])
def test_onnx(k: int) -> None:
    weight = np.random.default_rng(0).normal(size=(16, 50)).astype(np.float32)
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["h"]),
        helper.make_node("MatMul", ["h", "w"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tail",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "rows", 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "rows", 50])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.float32(2), "two")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    before = testing.capture(model)
    with pytest.raises(Refused, match=r"\[in, out\]; fix-rows turns it"):
        testing.apply(before, [Head(k=k)])


def test_refuses_what_is_no_product() -> None:
    x = torch.randn(1, 3, 16)
    graph = testing.capture(Tail(squashed=True).eval(), (x,))
    with pytest.raises(Refused, match="makes output 0: it is no product with constant weights"):
        testing.apply(graph, [Head()])
    with pytest.raises(Refused, match="the graph has 2 outputs, and no output 3"):
        testing.apply(graph, [Head(output=3)])
    plain = testing.capture(Tail().eval(), (x,))
    with pytest.raises(Refused, match="has 50 logits a row, fewer than k=51"):
        testing.apply(plain, [Head(k=51)])


def test_options() -> None:
    with pytest.raises(PipelineError, match="k must be at least 1, not 0"):
        Head(k=0)
    with pytest.raises(PipelineError, match="output must be at least 0"):
        Head(output=-1)


@pytest.mark.parametrize("keep", [[6], [0, 3]])
def test_beside_the_logits(keep: list[int]) -> None:
    """With keep-rows before and after: the largest of the kept rows, all logits of those that are asked for."""
    x = torch.randn(1, 7, 16)
    graph = testing.capture(Tail().eval(), (x,), dynamic_shapes=({1: torch.export.Dim.AUTO},))
    logits, twice = testing.run(graph, (x,))
    passes = [KeepRows(), Head(k=3, beside=True), KeepRows(name="ask")]
    made = testing.report(graph, passes).graph
    assert made.input_names[-2:] == ["keep", "ask"]
    assert made.output_names[-2:] == ["values", "indices"]
    for ask in ([], [0], list(range(len(keep)))):
        some, same, values, indices = testing.run(made, (x, torch.tensor(keep), torch.tensor(ask).long()))
        want, order = largest(logits[:, keep], 3)
        np.testing.assert_allclose(values, want, atol=1e-5)
        np.testing.assert_array_equal(indices, order)
        np.testing.assert_allclose(some, logits[:, keep][:, ask], atol=1e-5)
        np.testing.assert_array_equal(same, twice)
