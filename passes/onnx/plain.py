"""Plain spellings: operators with several meanings at once are split into ones with one meaning each.

A Slice along several axes becomes one per axis; an Einsum that is a matrix product becomes Transpose and MatMul; a Gemm
with a transposed first operand or factors loses them; Attention over packed heads gets its heads as an axis;
a GatherND that only picks every position of some axes becomes a reshape (mask functions traced by torch
produce these).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..ir.onnx_shapes import MALFORMED
from .surgery import Editor


def simplify(ed: Editor) -> None:
    rules = {
        "Slice": split_slice,
        "Einsum": plain_einsum,
        "Gemm": plain_gemm,
        "Attention": heads_as_axis,
        "GatherND": plain_gather_nd,
    }
    for node in list(ed.graph):
        if node.domain == "" and node.op_type in rules and node.graph is ed.graph:
            try:
                rules[node.op_type](ed, node)
            except MALFORMED as error:
                ed.near_misses.append(f"{ed.label(node)}: {error}")
    ed.sweep()


def split_slice(ed: Editor, node: ir.Node) -> None:
    """x[a:b, c:d] as two slices."""
    x = node.inputs[0]
    starts, ends = ed.env.known_ints(node.inputs[1]), ed.env.known_ints(node.inputs[2])
    axes = ed.env.known_ints(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    steps = ed.env.known_ints(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else None
    if x is None or starts is None or ends is None or len(starts) < 2:
        return
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    for start, end, axis, step in zip(starts, ends, axes, steps):
        operands = [ed.ints([n], "slice") for n in (start, end, axis, step)]
        x = ed.emit("Slice", [x, *operands], before=node)
    ed.replace(node.outputs[0], x)
    ed.count("slices split by axis")


def plain_einsum(ed: Editor, node: ir.Node) -> None:
    """A product of two operands with at most one letter each of rows, columns and sums."""
    equation = node.attributes["equation"].as_string().replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != 2 or not arrow or "." in equation or any(len(set(t)) != len(t) for t in (*terms, right)):
        return
    a, b = terms
    batch = [c for c in a if c in b and c in right]
    rows = [c for c in a if c not in b and c in right]
    columns = [c for c in b if c not in a and c in right]
    sums = [c for c in a if c in b and c not in right]
    if (
        len(sums) != 1
        or len(rows) > 1
        or len(columns) > 1
        or len(a) + len(b) != 2 * len(batch) + len(rows) + len(columns) + 2
    ):
        return
    if not rows or not columns:
        return
    x = ordered(ed, node, node.inputs[0], a, [*batch, *rows, *sums])
    y = ordered(ed, node, node.inputs[1], b, [*batch, *sums, *columns])
    out = ed.emit("MatMul", [x, y], before=node)
    made = [*batch, *rows, *columns]
    ed.replace(node.outputs[0], ordered(ed, node, out, "".join(made), list(right)))
    ed.count("Einsum made MatMul")


def ordered(ed: Editor, before: ir.Node, value: ir.Value | None, have: str, want: list[str]) -> ir.Value:
    """`value` with its axes, named by letters, in the wanted order."""
    assert value is not None
    perm = [have.index(letter) for letter in want]
    return (
        value
        if perm == list(range(len(perm)))
        else ed.emit("Transpose", [value], {"perm": perm}, before=before)
    )


def plain_gemm(ed: Editor, node: ir.Node) -> None:
    """Gemm with alpha and beta 1 and its first operand as it stands."""
    attrs = node.attributes
    x, weight = node.inputs[0], node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    alpha, beta = attrs.get_float("alpha", 1.0), attrs.get_float("beta", 1.0)
    if not attrs.get_int("transA", 0) and alpha == 1.0 and beta == 1.0:
        return
    if x is None or weight is None or x.dtype != ir.DataType.FLOAT:
        return
    if attrs.get_int("transA", 0):
        x = ed.emit("Transpose", [x], {"perm": [1, 0]}, before=node)
    if alpha != 1.0:
        array = ed.array(weight)
        if array is not None and len(weight.uses()) == 1:
            weight = ed.constant((array * np.float32(alpha)).astype(array.dtype), f"{weight.name}_scaled")
        else:
            x = ed.emit("Mul", [x, ed.like(alpha, x)], before=node)
    if bias is not None and beta != 1.0:
        bias = None if beta == 0.0 else ed.emit("Mul", [bias, ed.like(beta, bias)], before=node)
    inputs = [x, weight] if bias is None else [x, weight, bias]
    ed.replace(node.outputs[0], ed.emit("Gemm", inputs, {"transB": attrs.get_int("transB", 0)}, before=node))
    ed.count("Gemm made plain")


def heads_as_axis(ed: Editor, node: ir.Node) -> None:
    """Attention over [b, n, h * d] as Attention over [b, h, n, d]."""
    q, k, v = node.inputs[:3]
    shape = ed.shape(q)
    if shape is None or len(shape) != 3 or any(x is not None for x in node.inputs[4:]):
        return
    if any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
        return
    heads = node.attributes["q_num_heads"].as_int()
    shared = node.attributes["kv_num_heads"].as_int()
    parts = [split_heads(ed, node, x, h) for x, h in ((q, heads), (k, shared), (v, shared))]
    attrs = {a.name: a.value for a in node.attributes.values() if a.name in ("scale", "is_causal", "softcap")}
    inputs = [*parts, node.inputs[3]] if len(node.inputs) > 3 and node.inputs[3] is not None else parts
    out = ed.emit("Attention", inputs, attrs, before=node, name=node.name)
    ed.replace(node.outputs[0], join_heads(ed, node, out))
    ed.count("Attention with its heads as an axis")


def split_heads(ed: Editor, before: ir.Node, value: ir.Value | None, heads: int) -> ir.Value:
    """[b, n, h * d] -> [b, h, n, d]."""
    assert value is not None
    shape = ed.env.need(value)
    width = shape[2]
    length = shape[1] if isinstance(shape[1], int) else 0
    last = width // heads if isinstance(width, int) else -1
    target = ed.ints([0, length, heads, last])
    split = ed.emit("Reshape", [value, target], before=before)
    return ed.emit("Transpose", [split], {"perm": [0, 2, 1, 3]}, before=before)


def join_heads(ed: Editor, before: ir.Node, value: ir.Value) -> ir.Value:
    """[b, h, n, e] -> [b, n, h * e]."""
    swapped = ed.emit("Transpose", [value], {"perm": [0, 2, 1, 3]}, before=before)
    shape = ed.env.need(swapped)
    heads, width = shape[2], shape[3]
    total = heads * width if isinstance(heads, int) and isinstance(width, int) else -1
    target = ed.ints([0, shape[1] if isinstance(shape[1], int) else 0, total])
    return ed.emit("Reshape", [swapped, target], before=before)


# ---- picking every position --------------------------------------------------------------------------
def plain_gather_nd(ed: Editor, node: ir.Node) -> None:
    """x[arange(n0)[:, None, ..], arange(n1), ..]: every position of the leading axes, in a new layout."""
    x, indices = node.inputs[0], node.inputs[1]
    shape, target = ed.shape(x), ed.shape(node.outputs[0])
    parts = components(ed, indices)
    if (
        x is None
        or shape is None
        or target is None
        or parts is None
        or node.attributes.get_int("batch_dims", 0)
    ):
        return
    rank = len(ed.env.need(indices)) - 1
    axes: list[int] = []
    for position, part in enumerate(parts):
        axis = counts_along(ed, part, rank, shape[position])
        if axis is None:
            return
        axes.append(axis)
    if axes != sorted(set(axes)):
        return
    gaps = [i for i in range(rank) if i not in axes]
    if any(target[i] != 1 for i in gaps):
        return
    out = ed.emit("Unsqueeze", [x, ed.ints(gaps)], before=node) if gaps else x
    if ed.shape(out) == target:
        ed.replace(node.outputs[0], out)
        ed.count("GatherND made a reshape")


def components(ed: Editor, value: ir.Value | None) -> list[ir.Value] | None:
    """The values whose stack along a new last axis is `value`."""
    node = ed.made_by(value, "Concat")
    if (
        node is None
        or value is None
        or node.attributes.get_int("axis", 0) not in (-1, len(ed.env.need(value)) - 1)
    ):
        return None
    found: list[ir.Value] = []
    for part in node.inputs:
        inner = ed.made_by(part, "Unsqueeze")
        shape = ed.shape(part)
        if inner is None or inner.inputs[0] is None or shape is None or shape[-1] != 1:
            return None
        found.append(inner.inputs[0])
    return found


def counts_along(ed: Editor, value: ir.Value, rank: int, length: object) -> int | None:
    """The axis along which `value` counts 0, 1, ..., length - 1, when it is constant along all others."""
    for _ in range(8):
        shape = ed.shape(value)
        node = value.producer()
        if shape is None or node is None or node.domain != "":
            return None
        if node.op_type == "Range":
            if ed.number(node.inputs[0]) != 0.0 or ed.number(node.inputs[2]) != 1.0 or shape[0] != length:
                return None
            return None  # a bare Range has lost its place among the axes
        inner = node.inputs[0]
        if inner is None:
            return None
        if node.op_type == "Expand":
            value = inner
            continue
        if node.op_type in ("Unsqueeze", "Reshape"):
            long = [i for i, d in enumerate(shape) if d != 1]
            if len(long) != 1 or shape[long[0]] != length:
                return None
            source = inner
            while (step := ed.made_by(source, "Unsqueeze", "Reshape")) is not None and step.inputs[
                0
            ] is not None:
                source = step.inputs[0]
            start = ed.made_by(source, "Range")
            if start is None or ed.number(start.inputs[0]) != 0.0 or ed.number(start.inputs[2]) != 1.0:
                return None
            return rank - len(shape) + long[0]
        return None
    return None
