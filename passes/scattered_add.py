"""Additions to some rows, written as reading them, adding, and writing them back, become additions to all rows.

h[mask] = h[mask] + f is h + s, where s is 0 but for s[mask] = f. Some vision-language models add features of images to
the hidden states of later layers so (deepstack). In the second form what is added is a value over all tokens, which can
be followed when tokens go."""

from __future__ import annotations

import numpy as np

from .analysis.flow import is_float
from .ir.graph import Graph, Op, Value
from .writer import Writer

NONZERO = frozenset({"NonZero", "aten.nonzero"})


def spell_out(graph: Graph) -> int:
    """Rewrite in place; returns how many such additions there were. Bits stay, but that -0 + 0 is 0."""
    count = 0
    for op in additions(graph):
        found = _added(op)
        assert found is not None
        add, data, f, shapes = found
        assert data.shape is not None
        write = Writer(graph, op)
        zeros = write.filled(np.zeros((1,) * data.rank, np.float32), "nothing", list(data.shape))
        if zeros.dtype != data.dtype:
            zeros = write.plain("cast", zeros, dtype=data.dtype)
        rows = f
        for shape in shapes:
            rows = write.repeat(shape, [rows])[0]
        inputs = [rows if v is not None and is_float(v) else v for v in op.inputs]
        inputs[0] = zeros
        spread = write.repeat(op, inputs)[0]
        whole = write.repeat(add, [spread if v is f else data for v in add.inputs])[0]
        graph.replace_uses(op.output, whole)
        count += 1
    if count:
        graph.remove_dead()  # the rows as they were read
    return count


def additions(graph: Graph) -> list[Op]:
    """The ops that write back rows to which something was added."""
    return [op for op in graph.ops_of("scatter") if _added(op) is not None]


def _added(op: Op) -> tuple[Op, Value, Value, list[Op]] | None:
    """(the addition, all rows, what is added, reshapes behind the addition) when `op` writes back rows that were read
    at the same places."""
    data, rest = op.inputs[0], [v for v in op.inputs[1:] if v is not None]
    floats, places = [v for v in rest if is_float(v)], [v for v in rest if not is_float(v)]
    if data is None or len(floats) != 1 or len(places) != 1 or op.attrs.get("accumulate"):
        return None
    updates, shapes = floats[0], []
    while updates.producer is not None and updates.producer.kind == "reshape" and len(updates.users) == 1:
        shapes.insert(0, updates.producer)
        inner = updates.producer.inputs[0]
        assert inner is not None
        updates = inner
    add = updates.producer
    if add is None or add.kind != "elementwise" or add.attrs.get("fn") != "add" or len(updates.users) != 1:
        return None
    if len(add.inputs) != 2 or add.attrs.get("alpha", 1) != 1:
        return None
    for rows, f in (add.inputs, add.inputs[::-1]):
        if rows is None or f is None or rows.producer is None or f is rows:
            continue
        read = rows.producer
        where = [v for v in read.inputs[1:] if v is not None]
        if read.kind not in ("gather", "unknown") or read.inputs[0] is not data or len(where) != 1:
            continue
        if where[0] is places[0] or _mask(where[0]) is _mask(places[0]) is not None:
            return add, data, f, shapes
    return None


def _mask(places: Value) -> Value | None:
    """The mask over rows that indices were made of, where they were."""
    value = places
    while value.dtype != "bool" or (
        value.producer is not None and value.producer.kind in ("expand", "reshape")
    ):
        op = value.producer
        if op is None or not (op.kind in ("transpose", "expand", "reshape") or op.target in NONZERO):
            return None
        inner = op.inputs[0]
        assert inner is not None
        value = inner
    return value
