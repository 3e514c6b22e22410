"""Normalisations for onnxruntime.

A residual sum that only a LayerNormalization reads, onnxruntime joins with it to a SkipLayerNormalization. In version
1.32 that kernel is three to eight times slower on a CPU than the two it replaces, so there the sum is written as `Sum`,
which it leaves alone. RMSNormalization, which came with operator set 23, is written out: onnxruntime of every version
finds it again.
"""

from __future__ import annotations

import onnx_ir as ir

from ..ir.onnx_shapes import MALFORMED, numpy_dtype
from ..lowering import ONNXRUNTIME, Table, rows_class
from .surgery import Declined, Editor, used

FUSED, APART = "fused", "apart"


def lower_norms(ed: Editor, table: Table) -> None:
    for node in list(ed.graph):
        if node.domain != "" or node.graph is not ed.graph:
            continue
        try:
            if node.op_type == "RMSNormalization":
                write_out(ed, node)
            elif node.op_type == "LayerNormalization":
                keep_apart(ed, node, table)
        except (Declined, *MALFORMED) as why:
            ed.near_misses.append(f"{ed.label(node)}: {why}")


def keep_apart(ed: Editor, node: ir.Node, table: Table) -> None:
    """`Sum` for the addition in front of a norm."""
    add = ed.made_by(node.inputs[0], "Add")
    if add is None or not ed.used_once(add.outputs[0]):
        return
    shape = ed.env.need(add.outputs[0])
    # What onnxruntime joins: operands of one shape, of two axes or three.
    if len(shape) not in (2, 3) or any(ed.shape(v) != shape for v in add.inputs):
        return
    wanted = rows_class(numpy_dtype(add.outputs[0].dtype), shape)
    choice = table.choose("add_norm", ONNXRUNTIME, wanted)
    if choice is None or choice.form != APART:
        return
    ed.replace(add.outputs[0], ed.emit("Sum", list(add.inputs), before=add, name=add.name))
    ed.count("residual sums kept apart from norms")


def write_out(ed: Editor, node: ir.Node) -> None:
    """x / sqrt(mean(x^2) + epsilon) * scale, in the spelling that onnxruntime knows."""
    if used(node, 1):
        raise Declined("its deviation is used")
    x, scale = node.inputs[0], node.inputs[1]
    assert x is not None and scale is not None
    rank, axis = len(ed.env.need(x)), node.attributes.get_int("axis", -1)
    axes = list(range(axis % rank - rank, 0))
    wide = x
    half = x.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    if half and node.attributes.get_int("stash_type", 1) == 1:
        wide = ed.emit("Cast", [x], {"to": ir.DataType.FLOAT}, before=node)
    square = ed.emit("Pow", [wide, ed.like(2.0, wide)], before=node)
    mean = ed.emit("ReduceMean", [square, ed.ints(axes)], {"keepdims": 1}, before=node)
    epsilon = ed.like(node.attributes.get_float("epsilon", 1e-5), wide)
    root = ed.emit("Sqrt", [ed.emit("Add", [mean, epsilon], before=node)], before=node)
    unit = ed.emit("Div", [wide, root], before=node)
    if wide is not x:
        unit = ed.emit("Cast", [unit], {"to": x.dtype}, before=node)
    ed.replace(node.outputs[0], ed.emit("Mul", [unit, scale], before=node))
    ed.count("RMSNormalization written out")
