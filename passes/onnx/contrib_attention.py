"""com.microsoft's attention operators as projections, a mask and the standard Attention over [b, h, n, d].

Their integer masks become an additive one with the operator's own fill value, so that even a row without any key
keeps its result.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from .plain import join_heads, split_heads
from .surgery import Declined, Editor, operand, used


def attention(ed: Editor, node: ir.Node) -> None:
    """Attention: one packed projection of x to queries, keys and values."""
    x, weight, bias, mask_index, past, pairwise = (operand(node, i) for i in range(6))
    attrs = node.attributes
    if past is not None or operand(node, 6) is not None or used(node, 1):
        raise Declined("it has a cache")
    if attrs.get_int("do_rotary", 0):
        raise Declined("it rotates queries and keys itself")
    heads = attrs["num_heads"].as_int()
    total = ed.env.need(weight)[1]
    sizes = list(attrs.get_ints("qkv_hidden_sizes", []))
    if not sizes:
        if not isinstance(total, int) or total % 3:
            raise Declined("the width of its projection is not known")
        sizes = [total // 3] * 3
    packed = ed.emit("MatMul", [x, weight], before=node)
    if bias is not None:
        packed = ed.emit("Add", [packed, bias], before=node)
    q, k, v = split_last(ed, node, packed, sizes)
    parts = [split_heads(ed, node, part, heads) for part in (q, k, v)]
    finish(ed, node, parts, padding_mask(ed, node, mask_index, parts[1]), pairwise)


def multi_head_attention(ed: Editor, node: ir.Node) -> None:
    """MultiHeadAttention: queries, keys and values after their projections, packed or not."""
    q, k, v, bias, padding, pairwise, past_key, past_value = (operand(node, i) for i in range(8))
    if past_key is not None or past_value is not None or used(node, 1) or used(node, 2) or used(node, 3):
        raise Declined("it has a cache, or its scores are used")
    if len(node.inputs) > 8 and any(value is not None for value in node.inputs[8:]):
        raise Declined("it has a cache")
    heads = node.attributes["num_heads"].as_int()
    assert q is not None
    shape = ed.env.need(q)
    if len(shape) == 5:  # [b, n, h, 3, d]
        if bias is not None:
            raise Declined("packed queries with a bias")
        parts = [pick(ed, node, q, i) for i in range(3)]
    else:
        assert k is not None
        if len(ed.env.need(k)) == 5:  # [b, m, h, 2, d]
            if bias is not None:
                raise Declined("packed keys with a bias")
            parts = [split_heads(ed, node, q, heads), *(pick(ed, node, k, i) for i in range(2))]
        else:
            operands = [q, k, v]
            if bias is not None:
                widths = bias_widths(ed, shape, v, bias)
                pieces = split_last(ed, node, bias, widths)
                operands = [with_bias(ed, node, x, b) for x, b in zip(operands, pieces)]
            parts = [
                x if x is not None and len(ed.env.need(x)) == 4 else split_heads(ed, node, x, heads)
                for x in operands
            ]
    finish(ed, node, [p for p in parts if p is not None], padding_mask(ed, node, padding, parts[1]), pairwise)


def bias_widths(ed: Editor, q: tuple, v: ir.Value | None, bias: ir.Value) -> list[int]:
    """The bias is that of queries, keys and values, one after the other."""
    width, total = q[2], ed.env.need(bias)[0]
    if not isinstance(width, int) or not isinstance(total, int):
        raise Declined("the width of its bias is not known")
    return [width, width, total - 2 * width]


def with_bias(ed: Editor, node: ir.Node, x: ir.Value | None, bias: ir.Value) -> ir.Value:
    """x + bias, where x is [b, n, h * d]; keys and values that come as heads have theirs added already."""
    assert x is not None
    return x if len(ed.env.need(x)) == 4 else ed.emit("Add", [x, bias], before=node)


def split_last(ed: Editor, node: ir.Node, value: ir.Value, sizes: list[int]) -> list[ir.Value]:
    """`value` in parts along its last axis."""
    axis = len(ed.env.need(value)) - 1
    first = ed.emit("Split", [value, ed.ints(sizes)], {"axis": axis}, before=node, outputs=len(sizes))
    split = first.producer()
    assert split is not None
    return list(split.outputs)


def pick(ed: Editor, node: ir.Node, packed: ir.Value, index: int) -> ir.Value:
    """[b, n, h, parts, d] -> part `index` as [b, h, n, d]."""
    part = ed.emit("Gather", [packed, ed.constant(np.asarray(index, np.int64))], {"axis": 3}, before=node)
    return ed.emit("Transpose", [part], {"perm": [0, 2, 1, 3]}, before=node)


def padding_mask(ed: Editor, node: ir.Node, mask: ir.Value | None, keys: ir.Value | None) -> ir.Value | None:
    """The additive mask of an integer one: [b] lengths, [b, m] or [b, n, m] with 1 for keys that count."""
    if mask is None or keys is None:
        return None
    shape, key_shape = ed.env.need(mask), ed.env.need(keys)
    if len(shape) == 1:
        if shape[0] != key_shape[0]:
            raise Declined("its mask is given as starts and ends")
        length = ed.emit("Shape", [keys], {"start": 2, "end": 3}, before=node)
        length = ed.emit("Squeeze", [length, ed.ints([0])], before=node)
        zero, one = (ed.constant(np.asarray(x, np.int64)) for x in (0, 1))
        positions = ed.emit("Range", [zero, length, one], before=node)
        ends = ed.emit("Cast", [mask], {"to": ir.DataType.INT64}, before=node)
        ends = ed.emit("Unsqueeze", [ends, ed.ints([1])], before=node)
        keep = ed.emit("Less", [positions, ends], before=node)
    elif len(shape) in (2, 3):
        zero = ed.constant(np.asarray(0, (mask.dtype or ir.DataType.INT32).numpy()))
        keep = ed.emit("Greater", [mask, zero], before=node)
    else:
        raise Declined(f"a mask of rank {len(shape)}")
    fill = node.attributes.get_float("mask_filter_value", -10000.0)
    added = ed.emit("Where", [keep, ed.like(0.0, keys), ed.like(fill, keys)], before=node)
    axes = [1] if len(shape) == 3 else [1, 2]
    return ed.emit("Unsqueeze", [added, ed.ints(axes)], before=node)


def finish(
    ed: Editor, node: ir.Node, parts: list[ir.Value], mask: ir.Value | None, pairwise: ir.Value | None
) -> None:
    """Attention over the parts, its heads joined again, in the node's place."""
    if mask is not None and pairwise is not None:
        mask = ed.emit("Add", [mask, pairwise], before=node)
    elif pairwise is not None:
        mask = pairwise
    width = ed.env.need(parts[0])[3]
    scale = node.attributes.get_float("scale", 0.0) or None
    if scale is None:
        if not isinstance(width, int):
            raise Declined("its head width is not known")
        scale = width**-0.5
    attrs: dict[str, object] = {"scale": float(scale)}
    if node.attributes.get_int("unidirectional", 0):
        attrs["is_causal"] = 1
    inputs = parts if mask is None else [*parts, mask]
    out = ed.emit("Attention", inputs, attrs, before=node, name=node.name)
    ed.replace(node.outputs[0], join_heads(ed, node, out))
    ed.count("Attention")


ATTENTIONS: dict[str, Callable[[Editor, ir.Node], None]] = {
    "Attention": attention,
    "MultiHeadAttention": multi_head_attention,
}
