"""A product with weights of few bits as ONNX Runtime's own operator, which has the same layout but for zero points."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import Refused
from ..formats.layout import Quantized
from ..ir.graph import Graph, Op, Value
from ..ir.onnx import OnnxGraph

_INT8 = 4  # accuracy_level: inputs rounded to 8 bits, sums of integers


def refuses(made: Quantized, dtype: str) -> str:
    """Why the operator does not take this weight; "" where it does."""
    if dtype != "float32":
        return f"inputs of type {dtype}"
    if made.group < 16 or made.group & made.group - 1:
        return f"groups of {made.group}, which is no power of two"
    if made.zeros is not None and made.zeros.dtype != np.uint8:
        return "offsets"
    return ""


def insert_matmulnbits(
    graph: Graph, made: Quantized, x: Value, weight: Value, bias: Value | None, after: Op
) -> Value:
    """x [..., K] float32 -> [..., N]. Raises Refused for a form that the operator does not take."""
    assert isinstance(graph, OnnxGraph)
    reason = refuses(made, x.dtype)
    if reason:
        raise Refused(f"quantize: com.microsoft.MatMulNBits takes no {reason} (%{x.name})")
    inputs: list[Any] = [
        x.raw,
        weight.raw,
        graph.insert_constant(made.scales.astype(np.float32), f"{weight.name}.steps").raw,
    ]
    if made.zeros is not None:
        zeros = made.zeros
        if made.bits == 4:
            zeros = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))
            zeros = zeros[:, 0::2] | zeros[:, 1::2] << 4
        inputs.append(graph.insert_constant(np.ascontiguousarray(zeros), f"{weight.name}.points").raw)
    attrs = {
        "K": made.width,
        "N": made.rows,
        "bits": made.bits,
        "block_size": made.group,
        "accuracy_level": _INT8,
    }
    out = graph.insert_node("MatMulNBits", inputs, attrs, after=after, domain="com.microsoft")[0]
    graph.model.opset_imports.setdefault("com.microsoft", 1)
    if bias is None:
        return out
    return graph.insert_node("Add", [out.raw, bias.raw], after=out.producer)[0]
