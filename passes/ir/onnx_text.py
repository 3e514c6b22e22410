"""The text form of an ONNX graph: one stable line per operation."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .graph import Op, Value
from .onnx_shapes import constant_tensor

SHORT = 8
"""Constants of at most this many elements are written out."""


def literal(array: np.ndarray) -> str:
    """A constant as short text: its elements when they are few."""
    if array.ndim == 0:
        return number(array.item())
    if array.size <= SHORT and array.ndim == 1:
        return "[" + ", ".join(number(x) for x in array.tolist()) + "]"
    return f"{array.dtype}{list(array.shape)}"


def number(x: object) -> str:
    return f"{x:.6g}" if isinstance(x, float) else str(x)


def attribute(attr: ir.Attr) -> str:
    value = attr.value
    if attr.type == ir.AttributeType.FLOAT:
        text = number(float(value))
    elif attr.type == ir.AttributeType.TENSOR:
        text = literal(value.numpy()) if value.size <= SHORT else f"tensor{[int(d) for d in value.shape]}"
    elif attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        text = "<graph>"
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(number(x) for x in value) + "]"
    else:
        text = str(value)
    return f"{attr.name}={text}"


def operand(value: ir.Value | None) -> str:
    """An operand: `-` when absent, the elements of a small nameless constant, the name of anything else."""
    if value is None:
        return "-"
    tensor = constant_tensor(value)
    if tensor is not None and tensor.size <= SHORT and len(tensor.shape) <= 1:
        return literal(tensor.numpy())
    return f"%{value.name}"


def line(op: Op) -> str:
    """`%y: float32[b, 257, 384] = MatMul(%x, %w) {attrs}`."""
    node: ir.Node = op.raw
    outs = ", ".join(result(v) for v in op.outputs)
    attrs = ", ".join(attribute(a) for _, a in sorted(node.attributes.items()) if isinstance(a, ir.Attr))
    if op.kind == "elision":
        attrs = ", ".join(f"{k}={v}" for k, v in sorted(op.attrs.items()) if k != "op")
    tail = f" {{{attrs}}}" if attrs else ""
    return f"{outs} = {op.target}({', '.join(operand(v) for v in node.inputs)}){tail}"


def result(value: Value) -> str:
    dims = "?" if value.shape is None else ", ".join(str(d) for d in value.shape)
    return f"%{value.name}: {value.dtype}[{dims}]"
