"""Toy passes and models: what the runtime does must not depend on any real pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import torch
from elision.passes.base import Outcome, Pass, PassContext, register
from elision.passes.errors import NothingMatched, Refused
from elision.passes.ir.graph import Graph


@register
class DropRelu(Pass):
    """Replaces the first relus by their inputs: a lossy pass whose effect is easy to compute by hand."""

    name = "toy-drop-relu"
    summary = "Removes relus, for tests."

    @dataclass(frozen=True)
    class Options:
        times: int = 1

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        found = [op for op in graph.ops if op.kind == "elementwise" and op.attrs.get("fn") == "relu"]
        if not found:
            raise NothingMatched("toy-drop-relu found no relu")
        if self.options.times < 0:
            raise Refused("toy-drop-relu cannot put relus back")
        for op in found[: self.options.times]:
            source = op.inputs[0]
            assert source is not None
            for user, index in list(op.output.users):
                graph.set_operand(user, index, source)
            for index, value in enumerate(graph.outputs):
                if value is op.output:
                    graph.replace_output(index, source)
        graph.remove_dead()
        return Outcome(
            changed=self.options.times > 0, statistics={"relus": min(len(found), self.options.times)}
        )


@register
class Crash(Pass):
    """Fails in a way nobody foresaw."""

    name = "toy-crash"
    summary = "Fails, for tests."

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        raise KeyError("left")


def two_relus(width: int = 8, out: int = 4) -> torch.nn.Module:
    """linear, relu, linear, relu"""
    layers = torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, out), torch.nn.ReLU()
    return torch.nn.Sequential(*layers).eval()


def without_relus(model: torch.nn.Module, x: torch.Tensor, times: int) -> torch.Tensor:
    """What `two_relus` gives after its first `times` relus are gone."""
    for layer in model:  # type: ignore[attr-defined]
        if isinstance(layer, torch.nn.ReLU) and times > 0:
            times -= 1
            continue
        x = layer(x)
    return x


def onnx_model() -> onnx.ModelProto:
    """x[b, 8] -> Gemm, Relu, Gemm, Relu -> y[b, 4], opset 18."""
    generator = np.random.default_rng(0)
    weights = {
        "w0": generator.standard_normal((8, 8)),
        "b0": generator.standard_normal(8),
        "w1": generator.standard_normal((8, 4)),
        "b1": generator.standard_normal(4),
    }
    nodes = [
        onnx.helper.make_node("Gemm", ["x", "w0", "b0"], ["h0"], "first"),
        onnx.helper.make_node("Relu", ["h0"], ["h1"], "first_relu"),
        onnx.helper.make_node("Gemm", ["h1", "w1", "b1"], ["h2"], "second"),
        onnx.helper.make_node("Relu", ["h2"], ["y"], "second_relu"),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "toy",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["b", 8])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["b", 4])],
        [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)


@register
class Map(Pass):
    """Puts out a made-up token map: a 4 x 4 grid after one other token, the first two columns merged row by row."""

    name = "toy-map"
    summary = "Adds a token map, for tests."

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        grid = np.arange(16).reshape(4, 4) + 1
        grid[:, 1] = grid[:, 0]
        grid[3, 3] = -1
        slot = np.concatenate([[0], grid.ravel()]).astype(np.int32)
        value = graph.insert_constant(np.stack([slot, slot]), "toy_map")
        if context.want_map:
            graph.add_output(value, "elision_token_map")
        return Outcome(changed=True, extra={"token_map": {"prefix": 1, "suffix": 0}})


class ImageModel(torch.nn.Module):
    """x[2, 3, 32, 32] -> [2, 4]"""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 8, stride=8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x)).mean((2, 3))
