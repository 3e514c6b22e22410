"""Attention whose scores are capped, written out in products: the operator has the attribute only from opset 23 on, and
what onnxruntime makes of it depends on its version."""

from __future__ import annotations

import math

import onnx_ir as ir

from .surgery import Declined, Editor


def write_out(
    ed: Editor, node: ir.Node, parts: list[ir.Value], mask: ir.Value | None, scale: float, cap: float
) -> ir.Value:
    """softmax(cap * tanh(scale / cap * q k^T) + mask) v in front of `node`; mask has four axes."""
    q, k, v = parts
    heads, shared = ed.env.need(q)[1], ed.env.need(k)[1]
    if heads != shared:
        if not isinstance(heads, int) or not isinstance(shared, int):
            raise Declined("a number of heads that is not static")
        k, v = (repeated(ed, node, x, heads // shared) for x in (k, v))
    turned = ed.emit("Transpose", [k], {"perm": [0, 1, 3, 2]}, before=node)
    scores = ed.emit(
        "MatMul", [ed.emit("Mul", [q, ed.like(scale / cap, q)], before=node), turned], before=node
    )
    scores = ed.emit("Mul", [ed.emit("Tanh", [scores], before=node), ed.like(cap, q)], before=node)
    if node.attributes.get_int("is_causal", 0):
        one = ir.tensor([1.0], dtype=ir.DataType.FLOAT)
        shape = ed.emit("Shape", [scores], {"start": 2, "end": 4}, before=node)
        ones = ed.emit("ConstantOfShape", [shape], {"value": one}, before=node)
        past = ed.emit("Trilu", [ones], {"upper": 0}, before=node)
        keep = ed.emit("Cast", [past], {"to": ir.DataType.BOOL}, before=node)
        scores = ed.emit("Where", [keep, scores, ed.like(-math.inf, q)], before=node)
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        scores = ed.emit("Where", [mask, scores, ed.like(-math.inf, q)], before=node)
    elif mask is not None:
        scores = ed.emit("Add", [scores, mask], before=node)
    weights = ed.emit("Softmax", [scores], {"axis": -1}, before=node)
    return ed.emit("MatMul", [weights, v], before=node)


def repeated(ed: Editor, node: ir.Node, x: ir.Value, times: int) -> ir.Value:
    """[b, g, m, d] -> [b, g * times, m, d], each head `times` times in a row."""
    shape = ed.env.need(x)
    single = ed.emit("Unsqueeze", [x, ed.ints([2])], before=node)
    grown = ed.emit("Expand", [single, ed.ints([1, 1, times, 1, 1])], before=node)
    heads, width = shape[1], shape[3]
    if not isinstance(heads, int) or not isinstance(width, int):
        raise Declined("a number or width of heads that is not static")
    return ed.emit("Reshape", [grown, ed.ints([0, heads * times, -1, width])], before=node)
