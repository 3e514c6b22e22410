"""Which heads of keys and values are copies of each other: a cache keeps one of each."""

from __future__ import annotations

from math import gcd

from .ir.graph import Op, Value, product


def first_of_each(value: Value) -> Value | None:
    """The value [.., n, d] whose heads were repeated one by one to give `value` [.., heads, n, d]; None where that is
    not the last thing that happened."""
    op = _behind(value)
    if op is None or value.shape is None or op.inputs[0] is None:
        return None
    if op.kind == "spatial" and op.attrs.get("fn") == "repeat_interleave":
        return op.inputs[0] if op.attrs["axes"] == (value.rank - 3,) else None
    if op.kind == "reshape":
        joined = op.inputs[0]
        if joined.shape is None or joined.shape[-2:] != value.shape[-2:]:
            return None
        op = _behind(joined)
    if op is None or op.kind != "expand" or op.inputs[0] is None:
        return None
    before, after = op.inputs[0].shape, op.output.shape
    if before is None or after is None or len(before) != len(after):
        return None
    changed = [axis for axis in range(len(after)) if before[axis] != after[axis]]
    # Copies lie side by side: the repeated axis is the last of the heads'.
    return _squeezed(op.inputs[0]) if changed == [len(after) - 3] else None


def _squeezed(value: Value) -> Value:
    """`value` before it was given an axis of length 1 for the copies."""
    op = _behind(value)
    if op is None or op.kind != "reshape" or op.inputs[0] is None or value.shape is None:
        return value
    source = op.inputs[0]
    return source if source.shape == (*value.shape[:-3], *value.shape[-2:]) else value


def _behind(value: Value) -> Op | None:
    """The producer, looking through what changes nothing."""
    op = value.producer
    while op is not None and op.inputs and op.inputs[0] is not None:
        source = op.inputs[0]
        same = source.shape == op.output.shape and source.dtype == op.output.dtype
        if (
            op.kind == "tie"
            or (op.kind in ("reshape", "expand") and same)
            or (op.attrs.get("fn") == "cast" and same)
        ):
            op = source.producer
        else:
            return op
    return op


def spread(value: Value, axis: int | None = None) -> int:
    """How many neighbours along `axis` (the heads by default) are certainly equal; their number divides the length."""
    if value.shape is None or value.rank < 3:
        return 1
    axis = value.rank - 3 if axis is None else axis
    length = value.shape[axis]
    if not isinstance(length, int):
        return 1
    return _spread(value, axis, length, 0)


def _spread(value: Value, axis: int, length: int, depth: int) -> int:
    op = value.producer
    if length == 1 or op is None or depth > 24 or not op.inputs or op.inputs[0] is None:
        return 1
    x = op.inputs[0]
    assert x.shape is not None or op.kind == "elementwise"
    if op.kind == "elementwise":
        found = 0
        for operand in op.inputs:
            if operand is None or operand.shape is None:
                continue
            place = axis - (value.rank - operand.rank)
            if place >= 0 and operand.shape[place] != 1:
                found = gcd(found, _spread(operand, place, length, depth + 1))
        return found or 1
    if x.shape is None:
        return 1
    if op.kind == "tie":
        return _spread(x, axis, length, depth + 1)
    if op.kind == "transpose":
        return _spread(x, op.attrs["perm"][axis], length, depth + 1)
    if op.kind == "expand":
        place = axis - (value.rank - x.rank)
        return length if place < 0 or x.shape[place] == 1 else _spread(x, place, length, depth + 1)
    if op.kind in ("slice", "split", "concat") and op.attrs["axis"] != axis:
        return gcd(*(_spread(v, axis, length, depth + 1) for v in op.inputs if v is not None))
    if op.kind == "spatial" and op.attrs.get("fn") == "repeat_interleave" and op.attrs["axes"] == (axis,):
        count = x.shape[axis]
        return length // count if isinstance(count, int) else 1
    if op.kind == "reshape" and value.shape is not None:
        return _through_reshape(value, x, axis, length, depth)
    return 1


def _through_reshape(value: Value, x: Value, axis: int, length: int, depth: int) -> int:
    assert value.shape is not None and x.shape is not None
    before = product(value.shape[:axis])
    for place, dim in enumerate(x.shape):
        if product(x.shape[:place]) != before:
            continue
        if dim == length:
            return _spread(x, place, length, depth + 1)
        inner = x.shape[place + 1] if place + 1 < x.rank else 1
        if isinstance(dim, int) and isinstance(inner, int) and dim * inner == length and dim != 1:
            return inner if _spread(x, place + 1, inner, depth + 1) == inner else 1
    return 1
