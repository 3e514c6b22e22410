"""Rewriting the shape arguments of ONNX nodes: a new length for one output axis.

Static lengths become constants. A symbolic one is said in the cheapest way that stays right at run time: 0 (copy
the operand's axis), -1 (the only unknown axis of a Reshape), else a Shape node in front of the op. The old
shape operand is never edited, because other nodes may share it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..errors import Refused
from .graph import Dim, Op, Value
from .onnx_shapes import dim

if TYPE_CHECKING:
    from .onnx import OnnxGraph


def set_length(graph: OnnxGraph, op: Op, axis: int, like: Value, like_axis: int) -> None:
    """See `Graph.set_length`. Raises Refused for an op that has no length to set."""
    if like.shape is None:
        raise Refused(f"the length of %{like.name} is not known, so {op.target} '{op.name}' cannot follow it")
    node: ir.Node = op.raw
    handlers = {
        "Reshape": _reshape,
        "Expand": _expand,
        "ConstantOfShape": _full,
        "Slice": _slice,
        "Range": _range,
        "Tile": _tile,
        "Split": _split,
    }
    if node.domain == "" and node.op_type in ("Squeeze", "Unsqueeze", "Flatten"):
        return  # their lengths follow from the operand's; refreshing is all they need
    if node.domain != "" or node.op_type not in handlers:
        raise Refused(f"{op.target} '{op.name}' has no shape argument for axis {axis}")
    handlers[node.op_type](graph, op, axis, like, like_axis)


def previous(graph: OnnxGraph, op: Op) -> Op | None:
    """The op before `op`: helpers are inserted after it."""
    index = graph.ops.index(op)
    return graph.ops[index - 1] if index else None


def length_node(graph: OnnxGraph, op: Op, like: Value, like_axis: int) -> ir.Value:
    """A one-element int64 value that holds the length of `like`'s axis, computed before `op`."""
    attrs = {"start": like_axis, "end": like_axis + 1}
    return graph.insert_node("Shape", [like.raw], attrs, after=previous(graph, op))[0].raw


def vector(graph: OnnxGraph, op: Op, parts: list[int | ir.Value], slot: int) -> None:
    """Let the node's input `slot` be the int64 vector of `parts` (ints, and one-element values)."""
    name = f"{op.name}_shape"
    if all(isinstance(p, int) for p in parts):
        constant = graph.insert_constant(np.asarray(parts, np.int64), name)
        graph.set_shape_operand(op, slot, constant.raw)
        return
    pieces: list[ir.Value] = []
    run: list[int] = []
    for part in [*parts, None]:
        if isinstance(part, int):
            run.append(part)
            continue
        if run:
            pieces.append(graph.insert_constant(np.asarray(run, np.int64), f"{name}_part").raw)
            run = []
        if part is not None:
            pieces.append(part)
    whole = pieces[0]
    if len(pieces) > 1:
        whole = graph.insert_node("Concat", pieces, {"axis": 0}, after=previous(graph, op))[0].raw
    graph.set_shape_operand(op, slot, whole)


def element(graph: OnnxGraph, op: Op, slot: int, index: int) -> ir.Value:
    """Element `index` of the shape operand the node has now, as a one-element value."""
    raw = op.raw.inputs[slot]
    position = graph.insert_constant(np.asarray([index], np.int64), f"{op.name}_index").raw
    return graph.insert_node("Gather", [raw, position], {"axis": 0}, after=previous(graph, op))[0].raw


def wanted(op: Op, axis: int, like: Value, like_axis: int) -> list[Dim]:
    """The op's output lengths with the new one in place."""
    if op.output.shape is None or like.shape is None:
        raise Refused(f"the shape of {op.target} '{op.name}' is not known")
    dims = list(op.output.shape)
    dims[axis] = like.shape[like_axis]
    return dims


def _reshape(graph: OnnxGraph, op: Op, axis: int, like: Value, like_axis: int) -> None:
    node: ir.Node = op.raw
    dims = wanted(op, axis, like, like_axis)
    x = graph.env.need(node.inputs[0])
    zero = not node.attributes.get_int("allowzero", 0)
    if not zero and 0 not in dims:
        node.attributes.pop("allowzero", None)
        zero = True
    parts: list[Any] = [
        d if isinstance(d, int) else 0 if zero and i < len(x) and x[i] == d else None
        for i, d in enumerate(dims)
    ]
    old = graph.env.ints(node.inputs[1])
    open_axes = [i for i, p in enumerate(parts) if p is None]
    if len(open_axes) == 1:
        parts[open_axes[0]] = -1
    else:
        for i in open_axes:
            if i == axis:
                parts[i] = length_node(graph, op, like, like_axis)
            elif old is not None and old[i] == -1:
                parts[i] = -1
            else:
                parts[i] = element(graph, op, 1, i)
    vector(graph, op, parts, 1)


def _expand(graph: OnnxGraph, op: Op, axis: int, like: Value, like_axis: int) -> None:
    dims = wanted(op, axis, like, like_axis)
    x = graph.env.need(op.raw.inputs[0])
    rank = len(dims)
    target_rank = graph.env.need(op.raw.inputs[1])[0]
    parts: list[Any] = []
    for i, length in enumerate(dims):
        position = i - rank + len(x)
        if position >= 0 and x[position] == length:
            parts.append(1)
        elif isinstance(length, int):
            parts.append(length)
        elif i == axis:
            parts.append(length_node(graph, op, like, like_axis))
        elif isinstance(target_rank, int):
            parts.append(element(graph, op, 1, i - rank + target_rank))
        else:
            raise Refused(f"Expand '{op.name}' has a target shape of unknown rank")
    vector(graph, op, parts, 1)


def _full(graph: OnnxGraph, op: Op, axis: int, like: Value, like_axis: int) -> None:
    dims = wanted(op, axis, like, like_axis)
    parts: list[Any] = [
        d
        if isinstance(d, int)
        else length_node(graph, op, like, like_axis)
        if i == axis
        else element(graph, op, 0, i)
        for i, d in enumerate(dims)
    ]
    vector(graph, op, parts, 0)


def _slice(graph: OnnxGraph, op: Op, axis: int, like: Value, like_axis: int) -> None:
    """The slice keeps its start; its end becomes start + step * length."""
    if op.kind != "slice" or op.attrs["axis"] != axis:
        raise Refused(f"Slice '{op.name}' does not cut axis {axis} alone")
    start, step = op.attrs["start"], op.attrs["step"]
    if not isinstance(start, int) or start < 0:
        raise Refused(f"Slice '{op.name}' starts at {start}, which a new length cannot follow")
    if like.shape is None:
        raise Refused(f"the length of %{like.name} is not known")
    length = like.shape[like_axis]
    if isinstance(length, int):
        vector(graph, op, [start + step * length], 2)
        return
    graph.set_shape_operand(op, 2, affine(graph, op, length_node(graph, op, like, like_axis), step, start))


def affine(graph: OnnxGraph, op: Op, raw: ir.Value, factor: int, offset: int) -> ir.Value:
    """factor * raw + offset, computed before `op`."""
    for op_type, amount, neutral in (("Mul", factor, 1), ("Add", offset, 0)):
        if amount != neutral:
            shape = graph.env.need(raw)
            number = np.full([int(d) for d in shape], amount, np.int64)
            constant = graph.insert_constant(number, f"{op.name}_{op_type.lower()}").raw
            raw = graph.insert_node(op_type, [raw, constant], after=previous(graph, op))[0].raw
    return raw


def _range(graph: OnnxGraph, op: Op, axis: int, like: Value, like_axis: int) -> None:
    start, step = graph.env.known_ints(op.raw.inputs[0]), graph.env.known_ints(op.raw.inputs[2])
    if not start or not step or op.output.dtype != "int64":
        raise Refused(f"Range '{op.name}' starts at a value known only at run time")
    if like.shape is None:
        raise Refused(f"the length of %{like.name} is not known")
    length = dim(like.shape[like_axis])
    if isinstance(length, int):
        limit = np.asarray(start[0] + step[0] * length, np.int64)
        graph.set_shape_operand(op, 1, graph.insert_constant(limit, f"{op.name}_limit").raw)
        return
    raw = affine(graph, op, length_node(graph, op, like, like_axis), step[0], start[0])
    zero = graph.insert_constant(np.asarray([0], np.int64), f"{op.name}_axes").raw
    limit = graph.insert_node("Squeeze", [raw, zero], after=previous(graph, op))[0].raw
    graph.set_shape_operand(op, 1, limit)


def _tile(graph: OnnxGraph, op: Op, axis: int, like: Value, like_axis: int) -> None:
    """Only where the operand has length 1: then the repeat is the length."""
    x = graph.env.need(op.raw.inputs[0])
    if x[axis] != 1:
        raise Refused(f"Tile '{op.name}' repeats axis {axis}, which has length {x[axis]}")
    dims = wanted(op, axis, like, like_axis)
    parts: list[Any] = []
    for i, length in enumerate(dims):
        if x[i] == length:
            parts.append(1)
        elif i == axis:
            parts.append(length if isinstance(length, int) else length_node(graph, op, like, like_axis))
        elif isinstance(length, int) and isinstance(x[i], int):
            parts.append(length // int(x[i]))
        else:
            parts.append(element(graph, op, 1, i))
    vector(graph, op, parts, 1)


def _split(graph: OnnxGraph, op: Op, axis: int, like: Value, like_axis: int) -> None:
    raise Refused(
        f"Split '{op.name}' cuts axis {axis} into parts of {op.attrs.get('sizes')}; their new lengths are not known"
    )
