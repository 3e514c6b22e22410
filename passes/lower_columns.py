"""Which channels of a product become which heads, however they are moved there: queries, keys and values that lie mixed
in one projection (head by head, or group by group) are read off by moving the channels' numbers the same way."""

from __future__ import annotations

import numpy as np
import sympy

from .ir.graph import Dim, Graph, Op, Value
from .lower_match import operands, source

MOVES = ("reshape", "transpose", "slice", "split", "select", "expand", "tie", "gather")
ROWS = 2
"""Rows that numbers are moved for: one more than one, to see that no row takes from another."""


def columns_behind(graph: Graph, value: Value, rows: int) -> tuple[Value, np.ndarray] | None:
    """(base [1, m, w], columns [h * d]): `value` is base[..., columns] with its heads split; None where it is not.

    rows: the axis of `value` with the rows, 2 in [1, h, m, d] and 1 in [1, m, h, d]."""
    steps: list[tuple[Op, int]] = []
    base = source(value)
    while base.producer is not None and base.producer.kind in MOVES and base.producer.operand(0) is not None:
        steps.append((base.producer, base.index))
        base = source(operands(base.producer)[0])
    if base.rank != 3 or base.shape is None or base.shape[0] != 1:
        return None
    count, width = base.shape[1:]
    if not isinstance(width, int) or isinstance(count, int) or not count.is_Symbol:
        return None
    numbers = np.arange(ROWS * width).reshape(1, ROWS, width)
    for op, index in reversed(steps):
        moved = _moved(graph, op, index, numbers, count)
        if moved is None:
            return None
        numbers = moved
    numbers = numbers if rows == 2 else numbers.transpose(0, 2, 1, 3)
    if numbers.ndim != 4 or numbers.shape[0] != 1 or numbers.shape[2] != ROWS:
        return None
    first, second = (numbers[0, :, row].reshape(-1) for row in range(ROWS))
    return (base, first) if first.max() < width and np.array_equal(first + width, second) else None


def _moved(graph: Graph, op: Op, index: int, x: np.ndarray, count: sympy.Expr) -> np.ndarray | None:
    """What `op` makes of x in its output `index`, for ROWS rows; None where that is not known."""
    shape = [_length(d, count) for d in op.outputs[index].shape or ()]
    if any(length is None for length in shape):
        return None
    wanted, axis = [int(d) for d in shape if d is not None], op.attrs.get("axis")
    if op.kind == "tie":
        return x
    if op.kind == "reshape":
        return x.reshape(wanted) if x.size == np.prod(wanted) else None
    if op.kind == "expand":
        return np.broadcast_to(x, wanted)
    if op.kind == "transpose":
        return x.transpose(op.attrs["perm"])
    if axis is None:
        return x if list(x.shape) == wanted else None
    if op.kind == "select":
        return np.take(x, op.attrs["index"], axis) if isinstance(op.attrs["index"], int) else None
    if op.kind == "gather":
        chosen = None if op.operand(1) is None else graph.constant_value(source(operands(op)[1]))
        return None if chosen is None else np.take(x, chosen, axis)
    if op.kind == "split":
        start = sum(op.attrs["sizes"][:index])
        cut = slice(start, start + op.attrs["sizes"][index])
    else:
        cut = slice(op.attrs["start"], op.attrs.get("end"), op.attrs.get("step", 1))
    if not all(isinstance(bound, int | None) for bound in (cut.start, cut.stop)):
        return None
    found = x[(slice(None),) * axis + (cut,)]
    return found if list(found.shape) == wanted else None


def _length(dim: Dim, count: sympy.Expr) -> int | None:
    if isinstance(dim, int):
        return dim
    found = dim.subs(count, ROWS)
    return int(found) if found.is_Integer else None
