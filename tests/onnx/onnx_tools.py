"""Helpers of the ONNX tests: a small builder of models, and the comparison with the original in onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from elision.passes.ir.onnx import OnnxGraph
from elision.passes.onnx.io import from_proto, to_proto
from elision.passes.onnx.normalise import NormaliseReport, normalise
from onnx import TensorProto, helper, numpy_helper

TYPES = {np.dtype("float32"): TensorProto.FLOAT, np.dtype("int64"): TensorProto.INT64}


class Builder:
    """Builds a model node by node: `b("MatMul", x, w)` returns the name of the new value."""

    def __init__(self, opset: int = 17, seed: int = 0) -> None:
        self.opset = opset
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.count = 0

    def name(self, base: str) -> str:
        self.count += 1
        return f"{base}_{self.count}"

    def input(self, name: str, shape: Sequence[int | str], dtype: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def const(self, value: Any, dtype: Any = np.float32) -> str:
        name = self.name("c")
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def ints(self, *values: int) -> str:
        return self.const(list(values), np.int64)

    def weight(self, *shape: int) -> str:
        return self.const(self.random.normal(0, 0.3, shape))

    def __call__(self, op_type: str, *inputs: str, outputs: int = 1, domain: str = "", **attrs: Any) -> Any:
        names = [self.name(op_type) for _ in range(outputs)]
        self.nodes.append(helper.make_node(op_type, inputs, names, domain=domain, name=names[0], **attrs))
        return names[0] if outputs == 1 else names

    # Operators whose axes moved from attribute to operand.
    def reduce(self, op_type: str, x: str, axes: list[int], keepdims: int = 1) -> str:
        operand_since = 13 if op_type == "ReduceSum" else 18
        if self.opset >= operand_since:
            return self(op_type, x, self.ints(*axes), keepdims=keepdims)
        return self(op_type, x, axes=axes, keepdims=keepdims)

    def unsqueeze(self, x: str, axes: list[int]) -> str:
        if self.opset >= 13:
            return self("Unsqueeze", x, self.ints(*axes))
        return self("Unsqueeze", x, axes=axes)

    def squeeze(self, x: str, axes: list[int]) -> str:
        if self.opset >= 13:
            return self("Squeeze", x, self.ints(*axes))
        return self("Squeeze", x, axes=axes)

    def split(self, x: str, parts: list[int], axis: int) -> list[str]:
        if self.opset >= 13:
            return self("Split", x, self.ints(*parts), axis=axis, outputs=len(parts))
        return self("Split", x, split=parts, axis=axis, outputs=len(parts))

    def output(self, name: str, dtype: int = TensorProto.FLOAT) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, dtype, None))

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "g", self.inputs, self.outputs, self.initializers)
        imports = [helper.make_opsetid("", self.opset)]
        if any(node.domain for node in self.nodes):
            imports.append(helper.make_opsetid("com.microsoft", 1))
        return helper.make_model(graph, opset_imports=imports, ir_version=8)


def run(
    model: onnx.ModelProto | ir.Model, feeds: dict[str, np.ndarray], plain: bool = False
) -> list[np.ndarray]:
    """The outputs in onnxruntime; `plain` without any of its graph optimisations."""
    proto = to_proto(model) if isinstance(model, ir.Model) else model
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [np.asarray(x) for x in session.run(None, feeds)]


def needs_lowering(model: ir.Model) -> bool:
    """onnxruntime's own Attention accepts fewer masks than the standard, and gives no zero rows."""
    return any(n.op_type == "Attention" and (len(n.inputs) > 3) for n in model.graph)


def check(
    model: onnx.ModelProto,
    feeds: dict[str, np.ndarray],
    *more: dict[str, np.ndarray],
    tolerance: float = 1e-4,
    **rules: int,
) -> tuple[OnnxGraph, NormaliseReport]:
    """Normalise a copy of `model`, compare it and its lowered form with the original, and count rules.

    `rules` are counts the report must hold, by rule name (`Attention=1`). Returns the view and the report.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    normal = from_proto(copy)
    report = normalise(normal)
    graph = OnnxGraph(normal)
    graph.verify()
    for feed in (feeds, *more):
        wanted = run(model, feed, plain=True)
        for target in ("onnxruntime",) if needs_lowering(normal) else ("onnxruntime", "standard"):
            found = run(to_proto(normal, target), feed)
            assert len(found) == len(wanted)
            for a, b in zip(wanted, found):
                assert a.shape == b.shape
                assert a.dtype == b.dtype
                np.testing.assert_allclose(
                    a.astype(np.float64), b.astype(np.float64), atol=tolerance, rtol=tolerance
                )
    for rule, times in rules.items():
        assert report.rules.get(rule, 0) == times, "\n".join(report.lines())
    return graph, report
