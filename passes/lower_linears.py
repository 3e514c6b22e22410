"""Products that read the same rows as one product, whose results lie side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .ir.graph import Graph, Op, Value
from .lower_match import Piece, asked, last, piece, source

JOINED = ("linear_nbits", "linear_rows")
"""Ops with a weight (and its scales and zeros) whose rows are the channels that they put out, and a bias behind."""


def side_by_side(graph: Graph, values: Sequence[Value]) -> Value | None:
    """A value [..., sum of widths] with these values in this order along its last axis, of which they are pieces or
    which one product in the place of several gives; None where there is neither."""
    found = _cut_from_one(values)
    return found if found is not None else _one_product(graph, values)


def _cut_from_one(values: Sequence[Value]) -> Value | None:
    start, pieces = 0, [piece(v) for v in values]
    for found in pieces:
        if found != Piece(pieces[0].base, start, found.end) or found.base in values:
            return None
        start = found.end
    return pieces[0].base if start == last(pieces[0].base) else None


def _one_product(graph: Graph, values: Sequence[Value]) -> Value | None:
    ops = [source(v).producer for v in values]
    if any(op is None or not _joinable(graph, op) for op in ops) or len(set(map(id, ops))) != len(ops):
        return None
    products: list[Op] = [op for op in ops if op is not None]
    first = products[0]
    x = first.inputs[0]
    name = first.target.rpartition(".")[2]
    if x is None or any(op.target != first.target or _how(op, name) != _how(first, name) for op in products):
        return None
    if any(op.inputs[0] is None or source(op.inputs[0]) is not source(x) for op in products):
        return None
    operands: list[Value | None] = [x]
    slots = 4 if name == "linear_nbits" else 2
    for slot in range(1, slots):
        parts = [op.operand(slot) for op in products]
        if all(p is None for p in parts):
            operands.append(None)
            continue
        arrays = [None if p is None else graph.constant_value(p) for p in parts]
        if (
            any(a is None for a in arrays)
            or len({(a.dtype, a.shape[1:]) for a in arrays if a is not None}) != 1
        ):
            return None  # one with zero points and one without, say
        assert parts[0] is not None
        joined = np.concatenate([a for a in arrays if a is not None])
        operands.append(graph.insert_constant(joined, f"{parts[0].name}_joined"))
    biases = [op.operand(slots) for op in products]
    if any(b is not None for b in biases):
        arrays = [
            np.zeros(last(op.output), np.float32) if b is None else graph.constant_value(b)
            for op, b in zip(products, biases)
        ]
        if any(a is None for a in arrays):
            return None
        named = next(b for b in biases if b is not None)
        operands.append(
            graph.insert_constant(
                np.concatenate([np.float32(a) for a in arrays if a is not None]), f"{named.name}_joined"
            )
        )
    while operands[-1] is None:
        operands.pop()
    behind = max(products, key=graph.ops.index)
    return graph.insert(name, operands, _how(first, name), after=behind)[0]


def with_columns(graph: Graph, value: Value, columns: np.ndarray) -> Value | None:
    """value[..., columns] as a product that puts out just these; None where `value` is no product of our own."""
    op = source(value).producer
    if op is None or not _ours(graph, op):
        return None
    given: list[Value | None] = [op.inputs[0]]
    for part in op.inputs[1:]:
        array = None if part is None else graph.constant_value(part)
        if part is None or array is None:
            given.append(None)
        else:
            given.append(graph.insert_constant(np.ascontiguousarray(array[columns]), f"{part.name}_chosen"))
    name = op.target.rpartition(".")[2]
    return graph.insert(name, given, _how(op, name), after=op)[0]


def _how(op: Op, name: str) -> dict[str, Any]:
    """The attributes of a product but for its number of channels, which the weight has."""
    return {key: value for key, value in asked(op, name).items() if key != "channels"}


def _joinable(graph: Graph, op: Op) -> bool:
    return _ours(graph, op) and len(op.output.users) == 1 and op.output not in graph.outputs


def _ours(graph: Graph, op: Op) -> bool:
    """A product of the dialect with constant weights."""
    known = op.kind == "elision" and op.target in [f"elision.{name}" for name in JOINED]
    return known and all(v is None or graph.is_constant(v) for v in op.inputs[1:])
