"""com.microsoft's operators over weights of few bits as ops of the dialect; the packed weights stay as they are."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..ir.onnx_dialect import make_node
from ..ir.onnx_shapes import numpy_dtype
from .surgery import Declined, Editor, operand


def matmul_nbits(ed: Editor, node: ir.Node) -> None:
    """MatMulNBits: its layout is that of linear_nbits; scales are given flat in older files, zero points packed."""
    x, weight, scales, zeros, order, bias = (operand(node, i) for i in range(6))
    attrs = node.attributes
    bits, group = attrs.get_int("bits", 4), attrs.get_int("block_size", 32)
    width, channels = attrs.get_int("K", 0), attrs.get_int("N", 0)
    if order is not None or attrs.get_int("weight_prepacked", 0):
        raise Declined("its weights are in an order of their own")
    if bits not in (4, 8):
        raise Declined(f"weights of {bits} bits")
    assert x is not None and weight is not None and scales is not None
    groups = -(-width // group)
    if ed.env.need(weight) != (channels, groups, group * bits // 8):
        raise Declined(f"weights of the shape {ed.env.need(weight)}")
    inputs = [
        x,
        weight,
        as_table(ed, scales, channels, groups),
        zero_points(ed, zeros, scales, bits, channels, groups),
        bias,
    ]
    while inputs[-1] is None:
        inputs.pop()
    made = make_node(ed.model, "linear_nbits", inputs, {"bits": bits, "group": group})
    ed.replace(node.outputs[0], ed.adopt(made, before=node))


def gather_nbits(ed: Editor, node: ir.Node) -> None:
    """GatherBlockQuantized over rows of bytes: the layout of embedding_nbits, but for the axis of the groups."""
    data, ids, scales, zeros = (operand(node, i) for i in range(4))
    attrs = node.attributes
    bits, group = attrs.get_int("bits", 4), attrs.get_int("block_size", 128)
    assert data is not None and ids is not None and scales is not None
    shape = ed.env.need(data)
    if data.dtype != ir.DataType.UINT8 or bits not in (4, 8) or len(shape) != 2:
        raise Declined(f"a table of {data.dtype} and rank {len(shape)}, {bits} bits")
    if attrs.get_int("gather_axis", 0) % 2 != 0 or attrs.get_int("quantize_axis", 1) % 2 != 1:
        raise Declined("its groups run across the rows")
    rows, groups = ed.env.need(scales)
    if not isinstance(rows, int) or not isinstance(groups, int) or not isinstance(shape[1], int):
        raise Declined("a table whose size is not static")
    width, blob = shape[1] * 8 // bits, group * bits // 8
    weight = grouped(ed, data, rows, groups, blob)
    inputs = [ids, weight, scales, zero_points(ed, zeros, scales, bits, rows, groups)]
    while inputs[-1] is None:
        inputs.pop()
    given = {"bits": bits, "group": group, "width": width, "dtype": numpy_dtype(scales.dtype)}
    ed.replace(node.outputs[0], ed.adopt(make_node(ed.model, "embedding_nbits", inputs, given), before=node))


def grouped(ed: Editor, data: ir.Value, rows: int, groups: int, blob: int) -> ir.Value:
    """A table [rows, bytes] as [rows, groups, blob]; where it is the weight of a product, reshaped, that weight."""
    reshape = ed.made_by(data, "Reshape")
    source = data if reshape is None else reshape.inputs[0]
    table = ed.array(source)
    if source is None or table is None:
        raise Declined("a table that is computed")
    if table.shape == (rows, groups, blob):
        return source
    table = table.reshape(rows, -1)
    table = np.pad(table, ((0, 0), (0, groups * blob - table.shape[1])))
    return ed.constant(table.reshape(rows, groups, blob), f"{data.name}_groups")


def as_table(ed: Editor, value: ir.Value, rows: int, groups: int) -> ir.Value:
    """[rows * groups] or [rows, groups] as the latter."""
    if ed.env.need(value) == (rows, groups):
        return value
    array = ed.array(value)
    if array is None or array.size != rows * groups:
        raise Declined(f"%{value.name} of the shape {ed.env.need(value)}")
    return ed.constant(array.reshape(rows, groups), f"{value.name}_table")


def zero_points(
    ed: Editor, zeros: ir.Value | None, scales: ir.Value, bits: int, rows: int, groups: int
) -> ir.Value | None:
    """Zero points as bytes [rows, groups]; floating ones, which stand in steps, as offsets."""
    if zeros is None:
        return None
    array = ed.array(zeros)
    if array is None:
        raise Declined("zero points that are computed")
    if array.dtype != np.uint8:
        scale = ed.array(scales)
        if scale is None:
            raise Declined("scales that are computed")
        steps = array.astype(np.float32).reshape(rows, groups)
        offsets = -steps * scale.astype(np.float32).reshape(rows, groups)
        return ed.constant(offsets.astype(array.dtype), f"{zeros.name}_offsets")
    if bits == 4:
        packed = array.reshape(rows, -1)
        array = np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, -1)[:, :groups]
    return ed.constant(np.ascontiguousarray(array).reshape(rows, groups), f"{zeros.name}_bytes")


ROWS = {"MatMulNBits": matmul_nbits, "GatherBlockQuantized": gather_nbits}
