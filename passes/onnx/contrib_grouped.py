"""com.microsoft's GroupQueryAttention without a past as projections cut into heads, rotary positions and the standard
Attention."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from .contrib_attention import split_last
from .plain import join_heads, split_heads
from .plain_rotary import counted, full, rotated
from .surgery import Declined, Editor, operand, used

POSITIONS, BIAS, SINK, KEY_NORM = 9, 10, 11, 15


def grouped_attention(ed: Editor, node: ir.Node) -> None:
    """Causal attention of a text that is not padded, in the node's place.

    Operands: query [b, n, h * d] (or packed with keys and values), key, value, past (none), counts (not needed
    without padding), tables of rotary positions, position ids, a bias, and norms of the heads."""
    attrs = node.attributes
    if any(operand(node, i) is not None for i in (3, 4, SINK, 12, 13, 16)):
        raise Declined("it has a past, a sink or a cache of few bits")
    if attrs.get_int("smooth_softmax", 0) > 0 or attrs.get_int("qk_output", 0) or used(node, 3):
        raise Declined("its softmax is smoothed, or its scores are used")
    if any(used(node, i) for i in (1, 2)):
        raise Declined("its keys and values are used elsewhere")
    parts = heads_of(ed, node)
    norms = [operand(node, i) for i in (KEY_NORM - 1, KEY_NORM)]
    for i, (weight, name) in enumerate(zip(norms, ("q_norm_epsilon", "k_norm_epsilon"))):
        if weight is not None:
            epsilon = attrs.get_float(name, attrs.get_float("qk_norm_epsilon", 1e-6))
            given = {"axis": -1, "epsilon": epsilon}
            parts[i] = ed.emit("RMSNormalization", [parts[i], weight], given, before=node)
    if attrs.get_int("do_rotary", 0):
        parts[:2] = turned(ed, node, parts[:2])
    mask = operand(node, BIAS)
    window = attrs.get_int("local_window_size", -1)
    if window >= 0:
        mask = windowed(ed, node, parts[0], mask, window)
    width = ed.env.need(parts[0])[3]
    scale = attrs.get_float("scale", 0.0) or (width**-0.5 if isinstance(width, int) else 0.0)
    if not scale:
        raise Declined("its head width is not known")
    asked: dict[str, object] = {"scale": float(scale), "is_causal": attrs.get_int("causal", 1)}
    if attrs.get_float("softcap", 0.0) > 0:
        asked["softcap"] = attrs.get_float("softcap", 0.0)
    inputs = parts if mask is None else [*parts, mask]
    out = ed.emit("Attention", inputs, asked, before=node, name=node.name)
    ed.replace(node.outputs[0], join_heads(ed, node, out))
    ed.count("Attention")


def heads_of(ed: Editor, node: ir.Node) -> list[ir.Value]:
    """Queries, keys and values as [b, h, n, d]."""
    heads, shared = node.attributes["num_heads"].as_int(), node.attributes["kv_num_heads"].as_int()
    packed, key, value = (operand(node, i) for i in range(3))
    assert packed is not None
    if key is None:
        total = ed.env.need(packed)[2]
        if not isinstance(total, int) or total % (heads + 2 * shared):
            raise Declined("the width of its heads is not known")
        width = total // (heads + 2 * shared)
        flat = split_last(ed, node, packed, [heads * width, shared * width, shared * width])
    else:
        assert value is not None
        flat = [packed, key, value]
    return [split_heads(ed, node, x, count) for x, count in zip(flat, (heads, shared, shared))]


def turned(ed: Editor, node: ir.Node, parts: list[ir.Value]) -> list[ir.Value]:
    """Queries and keys with rotary positions: those given, else 0, 1, 2, ..."""
    cos, sin, positions = operand(node, 7), operand(node, 8), operand(node, POSITIONS)
    if cos is None or sin is None:
        raise Declined("rotary positions without tables")
    if positions is None:
        positions = counted(ed, node, parts[0], 2)
    pairs = bool(node.attributes.get_int("rotary_interleaved", 0))
    tables = [full(ed, node, table, positions, pairs) for table in (cos, sin)]
    return [rotated(ed, node, x, tables[0], tables[1], pairs) for x in parts]


def windowed(ed: Editor, node: ir.Node, q: ir.Value, bias: ir.Value | None, window: int) -> ir.Value:
    """A mask that lets a query see the last `window` keys, itself among them, with the bias where there is one."""
    steps = counted(ed, node, q, 2)
    rows, columns = (ed.emit("Unsqueeze", [steps, ed.ints([axis])], before=node) for axis in (1, 0))
    distance = ed.emit("Sub", [rows, columns], before=node)
    most = ed.constant(np.asarray(window, np.int64), "window")
    keep = ed.emit("Less", [distance, most], before=node)
    if bias is None:
        return keep
    return ed.emit("Where", [keep, bias, ed.like(-math.inf, bias)], before=node)
