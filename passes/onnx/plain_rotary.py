"""Rotary positions written out: x * cos + turned(x) * sin, with both tables as wide as what they rotate.

Three operators have them inside: the standard RotaryEmbedding, the one of com.microsoft, and its GroupQueryAttention.
Their tables are half as wide, since both channels of a pair turn by one angle.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .surgery import Declined, Editor, operand

TO_THE_END = (1 << 63) - 1


def rotary(ed: Editor, node: ir.Node) -> None:
    """The standard operator: tables [positions, r / 2] with position_ids, or [b, n, r / 2] of the tokens themselves."""
    x, cos, sin, positions = (operand(node, i) for i in range(4))
    assert x is not None and cos is not None and sin is not None
    pairs = bool(node.attributes.get_int("interleaved", 0))
    write(ed, node, x, *(full(ed, node, table, positions, pairs) for table in (cos, sin)))


def contrib_rotary(ed: Editor, node: ir.Node) -> None:
    """The operator of com.microsoft: its position_ids come second, [b, n] or one offset."""
    x, positions, cos, sin = (operand(node, i) for i in range(4))
    assert x is not None and positions is not None and cos is not None and sin is not None
    if node.attributes.get_int("is_packed_batching", 0) or node.attributes.get_float("scale", 1.0) != 1.0:
        raise Declined("packed batches, or a scale of its own")
    if len(ed.env.need(positions)) == 1:
        axis = len(ed.env.need(x)) - 2
        positions = ed.emit("Add", [counted(ed, node, x, axis), positions], before=node)
    pairs = bool(node.attributes.get_int("interleaved", 0))
    write(ed, node, x, *(full(ed, node, table, positions, pairs) for table in (cos, sin)))


def write(ed: Editor, node: ir.Node, x: ir.Value, cos: ir.Value, sin: ir.Value) -> None:
    """In the node's place: x is [b, h, n, d], or [b, n, h * d]."""
    pairs = bool(node.attributes.get_int("interleaved", 0))
    shape = ed.env.need(x)
    flat = len(shape) == 3
    if flat:
        heads = node.attributes.get_int("num_heads", 0)
        width = ed.env.need(cos)[-1]
        total = shape[2]
        if not heads:
            if not isinstance(total, int) or not isinstance(width, int) or total % width:
                raise Declined("its number of heads is not known")
            heads = total // width
        last = total // heads if isinstance(total, int) else -1
        x = ed.emit("Reshape", [x, ed.ints([0, 0 if last > 0 else -1, heads, last])], before=node)
        x = ed.emit("Transpose", [x], {"perm": [0, 2, 1, 3]}, before=node)
    out = rotated(ed, node, x, cos, sin, pairs)
    if flat:
        out = ed.emit("Transpose", [out], {"perm": [0, 2, 1, 3]}, before=node)
        out = ed.emit("Reshape", [out, ed.ints([0, 0, -1])], before=node)
    ed.replace(node.outputs[0], out)
    ed.count("rotary positions written out")


def full(ed: Editor, node: ir.Node, table: ir.Value, positions: ir.Value | None, pairs: bool) -> ir.Value:
    """[.., r / 2] as [.., r], each half beside itself or, for `pairs`, each entry twice in a row; then its rows at
    `positions`. A constant table is widened before the run."""
    rank = len(ed.env.need(table))
    if pairs:
        single = ed.emit("Unsqueeze", [table, ed.ints([rank])], before=node)
        twice = ed.emit("Concat", [single, single], {"axis": rank}, before=node)
        wide = ed.emit("Reshape", [twice, ed.ints([0] * (rank - 1) + [-1])], before=node)
    else:
        wide = ed.emit("Concat", [table, table], {"axis": rank - 1}, before=node)
    return wide if positions is None else ed.emit("Gather", [wide, positions], {"axis": 0}, before=node)


def counted(ed: Editor, node: ir.Node, x: ir.Value, axis: int) -> ir.Value:
    """0, 1, ... as many as x is long along `axis`."""
    length = ed.emit("Shape", [x], {"start": axis, "end": axis + 1}, before=node)
    length = ed.emit("Squeeze", [length, ed.ints([0])], before=node)
    zero, one = (ed.constant(np.asarray(i, np.int64)) for i in (0, 1))
    return ed.emit("Range", [zero, length, one], before=node)


def rotated(ed: Editor, node: ir.Node, x: ir.Value, cos: ir.Value, sin: ir.Value, pairs: bool) -> ir.Value:
    """x [b, h, n, d] with its first r channels rotated, in front of `node`; cos, sin [n, r] or [b, n, r]."""
    width, part = ed.env.need(x)[3], ed.env.need(cos)[-1]
    if not isinstance(width, int) or not isinstance(part, int):
        raise Declined("its head width is not static")
    rest: ir.Value | None = None
    if part != width:
        split = ed.emit("Split", [x, ed.ints([part, width - part])], {"axis": 3}, before=node, outputs=2)
        producer = split.producer()
        assert producer is not None
        x, rest = producer.outputs
    if len(ed.env.need(cos)) == 3:
        axis = ed.ints([1])
        cos, sin = (ed.emit("Unsqueeze", [table, axis], before=node) for table in (cos, sin))
    turned = turned_pairs(ed, node, x) if pairs else turned_halves(ed, node, x, part)
    kept = ed.emit("Mul", [x, cos], before=node)
    moved = ed.emit("Mul", [turned, sin], before=node)
    out = ed.emit("Add", [kept, moved], before=node)
    return out if rest is None else ed.emit("Concat", [out, rest], {"axis": 3}, before=node)


def turned_halves(ed: Editor, node: ir.Node, x: ir.Value, width: int) -> ir.Value:
    """(-second half, first half)."""
    axis, one, middle = ed.ints([3]), ed.ints([1]), ed.ints([width // 2])
    first = ed.emit("Slice", [x, ed.ints([0]), middle, axis, one], before=node)
    second = ed.emit("Slice", [x, middle, ed.ints([TO_THE_END]), axis, one], before=node)
    return ed.emit("Concat", [ed.emit("Neg", [second], before=node), first], {"axis": 3}, before=node)


def turned_pairs(ed: Editor, node: ir.Node, x: ir.Value) -> ir.Value:
    """(-x1, x0, -x3, x2, ...)."""
    axis, two, end, last = ed.ints([3]), ed.ints([2]), ed.ints([TO_THE_END]), ed.ints([4])
    even, odd = (ed.emit("Slice", [x, ed.ints([start]), end, axis, two], before=node) for start in (0, 1))
    parts = [ed.emit("Neg", [odd], before=node), even]
    stack = [ed.emit("Unsqueeze", [part, last], before=node) for part in parts]
    joined = ed.emit("Concat", stack, {"axis": 4}, before=node)
    return ed.emit("Reshape", [joined, ed.ints([0, 0, 0, -1])], before=node)
