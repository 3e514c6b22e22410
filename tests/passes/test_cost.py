"""Costs against counts by hand, on both hosts and with symbolic lengths."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir
import pytest
import sympy
import torch
from elision.kernels import OPS
from elision.passes.cost import DEFAULT_LENGTH, MACHINES, Cost, Machine, estimate
from elision.passes.ir.fx import FxGraph
from elision.passes.ir.graph import Op, Value
from elision.passes.ir.onnx import OnnxGraph
from onnx import TensorProto, helper
from torch import nn

from .memory_graph import MemoryGraph


class Block(nn.Module):
    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(b, n, c))


def test_block_by_hand() -> None:
    graph = FxGraph.trace(Block().eval(), (torch.randn(3, 5, 8),))
    cost = estimate(graph)
    flops = {name: part.flops for name, part in cost.by_op.items()}
    assert flops["linear"] == 2 * 15 * 8 * 24 + 15 * 24 + 2 * 15 * 8 * 8
    assert flops["attention"] == 3 * 2 * 5 * 5 * (2 * 4 + 2 * 4 + 5)
    assert flops["norm"] == 8 * 15 * 8
    assert flops["elementwise"] == 15 * 8
    assert cost.by_op["elementwise"].bytes == 3 * 4 * 15 * 8
    assert cost.by_op["linear"].count == 2
    assert cost.tokens_per_block == [5]
    assert cost.flops == sum(flops.values())
    assert cost.seconds == pytest.approx(sum(p.seconds for p in cost.by_op.values()))
    assert "transpose" not in flops  # a view in torch


def test_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4, groups=1), nn.ConvTranspose2d(8, 2, 2, 2)).eval()
    cost = estimate(FxGraph.trace(model, (torch.randn(1, 3, 8, 8),)))
    assert cost.flops == 2 * 3 * 16 * (8 * 4) + 2 * (2 * 4) * (8 * 4)


def test_bfloat16_moves_half_the_bytes() -> None:
    x = torch.randn(2, 4, 8)
    wide = estimate(FxGraph.trace(Block().eval(), (x,)))
    half = estimate(FxGraph.trace(Block().bfloat16().eval(), (x.bfloat16(),)))
    assert half.bytes == wide.bytes / 2 and half.flops == wide.flops


def test_cross_attention_is_no_block() -> None:
    class Cross(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, k)

    graph = FxGraph.trace(Cross(), (torch.randn(1, 2, 3, 4), torch.randn(1, 2, 7, 4)))
    cost = estimate(graph)
    assert cost.tokens_per_block == [] and cost.flops == 2 * 3 * 7 * (8 + 8 + 5)


def test_symbolic_lengths() -> None:
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    x = torch.randn(3, 5, 8)
    graph = FxGraph.trace(Block().eval(), (x,), dynamic_shapes=({0: batch, 1: length},))
    static = estimate(FxGraph.trace(Block().eval(), (x,)))
    assert estimate(graph, example_inputs=(x,)).to_json() == static.to_json()
    assert estimate(graph).tokens_per_block == [DEFAULT_LENGTH]
    assert graph.inputs[0].shape is not None
    hints = {str(graph.inputs[0].shape[0]): 3, str(graph.inputs[0].shape[1]): 5}
    assert estimate(graph, hints=hints).to_json() == static.to_json()


def test_lengths_that_are_expressions() -> None:
    n = sympy.Symbol("n", integer=True, positive=True)
    graph = MemoryGraph()
    x = graph.input(2 * n, 3)
    graph.outputs = [graph.add("relu", x, shape=(2 * n, 3))]
    assert estimate(graph, example_inputs=[np.zeros((8, 3))]).flops == 24
    assert estimate(graph, hints={"n": 5}).flops == 30
    assert estimate(graph, hints={"n": 5}, example_inputs=[np.zeros((8, 3))]).flops == 30
    assert estimate(graph, example_inputs=[3.0]).flops == 2 * DEFAULT_LENGTH * 3


def test_unknown_shapes_count_as_nothing() -> None:
    graph = MemoryGraph()
    x = graph.input(2, 3)
    op = Op("linear", "strange", "strange", [x, None], [Value("y", None, "float32")])
    graph.ops.append(op)
    assert estimate(graph).flops == 0


def test_onnx_gemm_and_copies() -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1),
        helper.make_node("Transpose", ["h"], ["y"], perm=[1, 0]),
    ]
    weights = [
        helper.make_tensor("w", TensorProto.FLOAT, [5, 3], np.zeros(15)),
        helper.make_tensor("b", TensorProto.FLOAT, [5], np.zeros(5)),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 2])],
        weights,
    )
    cost = estimate(OnnxGraph(onnx_ir.from_proto(helper.make_model(graph))))
    assert cost.flops == 2 * 2 * 3 * 5 + 10
    assert cost.by_op["transpose"].bytes == 2 * 4 * 10  # onnxruntime copies


@pytest.mark.parametrize("machine", [*MACHINES.values(), Machine("launch", 1e30, 1e30, overhead=1.0)])
def test_roofline(machine: Machine) -> None:
    cost = estimate(FxGraph.trace(Block().eval(), (torch.randn(1, 4, 8),)), machine=machine)
    floor = max(cost.flops / machine.flops, cost.bytes / max(machine.bytes, machine.near))
    assert cost.seconds >= floor
    if machine.overhead:
        assert cost.seconds == pytest.approx(sum(p.count for p in cost.by_op.values()))


def test_small_operations_stay_in_the_cache() -> None:
    machine = Machine("cached", flops=1e30, bytes=1.0, cache=100, near=10.0)
    assert machine.seconds(0, 100) == 10 and machine.seconds(0, 101) == 101
    assert Machine("plain", flops=1e30, bytes=1.0).seconds(0, 100) == 100


def test_dialect_ops_are_costed_by_their_definitions() -> None:
    class Merge(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            slot, keep, source = torch.ops.elision.match_tokens(x, r=3)
            return torch.ops.elision.merge_tokens(x, None, slot, keep, source, axis=1, batch_axis=0)[0]

    graph = FxGraph.trace(Merge(), (torch.randn(2, 9, 4),))
    cost = estimate(graph)
    assert list(cost.by_op) and set(cost.by_op) == {"match_tokens", "merge_tokens"}
    shapes = [(2, 9, 4), None, (2, 9), (2, 6), (2, 3)]
    by_hand = OPS["merge_tokens"].flops(shapes, {"axis": 1, "batch_axis": 0})
    assert cost.by_op["merge_tokens"].flops == by_hand > 0
    assert cost.by_op["match_tokens"].flops >= 2 * 2 * 5 * 4 * 4


def test_fewer_tokens_cost_less() -> None:
    costs = [estimate(FxGraph.trace(Block().eval(), (torch.randn(1, n, 8),))) for n in (4, 8, 16)]
    for smaller, larger in itertools.pairwise(costs):
        assert smaller.flops < larger.flops
        assert smaller.bytes < larger.bytes
        assert smaller.seconds < larger.seconds


def test_json() -> None:
    record: dict[str, Any] = Cost().to_json()
    assert record == {"flops": 0.0, "bytes": 0.0, "seconds": 0.0, "by_op": {}, "tokens_per_block": []}
