"""A dialect op alone in an ONNX model, run by plain ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from elision.kernels import OPS
from onnx import helper
from torch import Tensor


def model(op: str, operands: list[Tensor | None], attrs: dict[str, Any], opset: int = 20) -> onnx.ModelProto:
    """A checked model of one node; every axis of every input is dynamic."""
    definition = OPS[op]
    attrs = definition.pin([None if t is None else tuple(t.shape) for t in operands], attrs)
    names = [n.removesuffix("?") for n in definition.inputs]
    types = [None if t is None else helper.np_dtype_to_tensor_dtype(t.numpy().dtype) for t in operands]
    signature = [None if t is None else (t.dim(), d) for t, d in zip(operands, types)]
    function = definition.onnx_function(signature, attrs, opset)  # type: ignore[arg-type]
    inputs = [
        helper.make_tensor_value_info(name, dtype, [f"{name}{axis}" for axis in range(t.dim())])
        for name, t, dtype in zip(names, operands, types)
        if t is not None and dtype is not None
    ]
    dtypes = definition.output_dtypes([None if t is None else str(t.numpy().dtype) for t in operands], attrs)
    shapes = definition.output_shapes([None if t is None else tuple(t.shape) for t in operands], attrs)
    outputs = [
        helper.make_tensor_value_info(
            name,
            helper.np_dtype_to_tensor_dtype(np.dtype(dtype)),
            [f"{name}{axis}" for axis in range(len(shape))],
        )
        for name, dtype, shape in zip(definition.outputs, dtypes, shapes)
    ]
    given = ["" if t is None else name for name, t in zip(names, operands)]
    values = {k: int(v) if isinstance(v, bool) else v for k, v in definition.complete(attrs).items()}
    node = helper.make_node(function.name, given, list(definition.outputs), domain="elision", **values)
    node.overload = function.overload
    graph = helper.make_graph([node], "one", inputs, outputs)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("elision", 1)]
    made = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made


def session(made: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(op: str, operands: list[Tensor | None], attrs: dict[str, Any], opset: int = 20) -> list[Tensor]:
    """The op in ONNX Runtime."""
    names = [n.removesuffix("?") for n in OPS[op].inputs]
    feeds = {name: t.numpy() for name, t in zip(names, operands) if t is not None}
    found = session(model(op, operands, attrs, opset)).run(None, feeds)
    return [torch.from_numpy(np.asarray(array)) for array in found]
