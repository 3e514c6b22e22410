"""Plain spellings: operators with several meanings at once are split into ones with one meaning each.

A Slice along several axes becomes one per axis; an Einsum that is a matrix product becomes Transpose and MatMul;
a Gemm with a transposed first operand or factors loses them; Attention over packed heads gets its heads as an
axis; a GatherND along one axis is a Gather.
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
        "GatherND": plain_gather,
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


def plain_gather(ed: Editor, node: ir.Node) -> None:
    """GatherND with indices [.., 1], which pick along the first axis."""
    x, indices = node.inputs[0], node.inputs[1]
    shape = ed.env.need(indices)
    if indices is None or node.attributes.get_int("batch_dims", 0) or shape[-1] != 1:
        return
    array = ed.array(indices)
    if array is not None:
        flat = ed.constant(array[..., 0], f"{indices.name}_flat")
    else:
        flat = ed.emit("Squeeze", [indices, ed.ints([len(shape) - 1])], before=node)
    ed.replace(node.outputs[0], ed.emit("Gather", [x, flat], {"axis": 0}, before=node))
    ed.count("GatherND made Gather")


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
