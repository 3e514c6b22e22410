"""What stands around an attention over a cache: heads split off projections, norms and rotary angles on the way.

Recognised by what is computed, in either host: transposes and reshapes that split heads, an RMS norm over each head
or over all of them, x * cos + turned(x) * sin on the first channels with halves or pairs of channels turned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .ir.graph import Graph, Op, Value
from .lower_columns import columns_behind
from .lower_match import (
    Piece,
    idle,
    last,
    made_by,
    number,
    operands,
    piece,
    reshaped,
    rms_norm,
    same_shape,
    source,
)

SPLIT = [0, 2, 1, 3]
NONE, HALVES, PAIRS = 0, 1, 2


@dataclass(frozen=True)
class Rotary:
    """x * cos + turned(x) * sin on the first `channels`; cos and sin are [1, m, channels] or [m, channels]."""

    x: Value
    cos: Value
    sin: Value
    kind: int
    channels: int

    def like(self, other: Rotary | None) -> bool:
        return other is not None and (self.cos, self.sin, self.kind) == (other.cos, other.sin, other.kind)


@dataclass(frozen=True)
class Heads:
    """A value [1, h, m, d] from `flat` [1, m, h * d], or from `columns` of a wider `flat`."""

    flat: Value
    norm: np.ndarray | None
    eps: float
    rotary: Rotary | None
    columns: np.ndarray | None = None


def heads_of(graph: Graph, value: Value) -> Heads | None:
    """How `value` [1, h, m, d] comes from heads side by side; None where it comes in another way."""
    if value.rank != 4 or not isinstance(value.shape[1], int) or last(value) < 0:  # type: ignore[index]
        return None
    heads, width = value.shape[1], last(value)  # type: ignore[index]
    rotary, norm, eps, moved = None, None, 0.0, False
    value = source(value)
    for _ in range(8):  # each step takes one thing off
        op = value.producer
        if op is None:
            return None
        if rotary is None and norm is None and (found := turned(graph, value, 1 if moved else 2)) is not None:
            rotary, value = found, found.x
            continue
        normed = rms_norm(graph, value) if norm is None else None
        if normed is not None and len(normed.weight) == width:
            norm, eps, value = normed.weight, normed.eps, normed.x
            continue
        if not moved and op.kind == "transpose" and list(op.attrs["perm"]) == SPLIT:
            value, moved = source(operands(op)[0]), True
            continue
        flat = source(operands(op)[0]) if op.kind == "reshape" and (moved or heads == 1) else None
        if flat is None or flat.rank != 3 or last(flat) != heads * width or flat.shape[0] != 1:  # type: ignore[index]
            found = columns_behind(graph, value, 1 if moved else 2)
            return None if found is None else Heads(found[0], norm, eps, rotary, found[1])
        whole = rms_norm(graph, flat) if norm is None and heads > 1 else None
        if whole is not None and len(whole.weight) == heads * width:
            norm, eps, flat = whole.weight, whole.eps, whole.x
        return Heads(flat, norm, eps, rotary)
    return None


# ---- rotary angles -------------------------------------------------------------------------------------
def turned(graph: Graph, value: Value, rows: int) -> Rotary | None:
    """`value` as rotated channels of a value of its shape, whose rows lie along axis `rows`."""
    value = source(value)
    op, width = value.producer, last(value)
    if op is None:
        return None
    if op.kind == "concat" and op.attrs["axis"] == value.rank - 1 and len(operands(op)) == 2:
        first, rest = operands(op)
        found, kept = _rotated(graph, first, rows), piece(rest)
        if found is None:
            return None
        taken = piece(found.x)
        whole = taken.base
        if last(rest) == 0:
            return found if last(found.x) == width else None
        cut = taken == Piece(whole, 0, found.channels) and kept == Piece(whole, found.channels, width)
        if not cut or not same_shape(whole, value):
            return None
        return Rotary(whole, found.cos, found.sin, found.kind, found.channels)
    return _rotated(graph, value, rows)


def _rotated(graph: Graph, value: Value, rows: int) -> Rotary | None:
    """x * cos + turned(x) * sin with tables as wide as x."""
    op = made_by(value, "elementwise", "add")
    products = (
        []
        if op is None or op.attrs.get("alpha", 1) != 1
        else [made_by(v, "elementwise", "mul") for v in operands(op)]
    )
    if len(products) != 2 or any(p is None or len(operands(p)) != 2 for p in products):
        return None
    for kept, moved in (products, products[::-1]):
        assert kept is not None and moved is not None
        for x, cos in (operands(kept), operands(kept)[::-1]):
            for y, sin in (operands(moved), operands(moved)[::-1]):
                if not same_shape(x, value) or not same_shape(y, value):
                    continue
                kind = _turn(graph, y, source(x))
                tables = [_table(t, value, rows) for t in (cos, sin)]
                if kind and tables[0] is not None and tables[1] is not None:
                    return Rotary(source(x), tables[0], tables[1], kind, last(value))
    return None


def _turn(graph: Graph, value: Value, x: Value) -> int:
    """HALVES where `value` is (-second half, first half) of x, PAIRS where it is (-x1, x0, -x3, x2, ...), else 0."""
    op, width = source(value).producer, last(x)
    if op is None or width % 2:
        return 0
    if op.kind == "concat" and op.attrs["axis"] == x.rank - 1 and len(operands(op)) == 2:
        second, first = operands(op)
        minus = _negated(graph, second)
        if minus is None or piece(first) != Piece(x, 0, width // 2):
            return 0
        return HALVES if piece(minus) == Piece(x, width // 2, width) else 0
    if op.kind != "reshape":
        return 0
    stack = source(operands(op)[0]).producer
    if stack is None or stack.kind not in ("stack", "concat") or len(operands(stack)) != 2:
        return 0
    if stack.attrs["axis"] != x.rank or stack.output.rank != x.rank + 1:
        return 0
    odd, even = [reshaped(v, x.rank) if stack.kind == "concat" else v for v in operands(stack)]
    if stack.kind == "concat" and any(last(v) != 1 for v in operands(stack)):
        return 0
    minus = None if odd is None else _negated(graph, odd)
    if minus is None or even is None:
        return 0
    return PAIRS if _every_other(minus, x, 1) and _every_other(even, x, 0) else 0


def _every_other(value: Value, x: Value, start: int) -> bool:
    """x[..., start::2]; the last one may be cut off by an end that changes nothing."""
    found = piece(value)
    return (found.base, found.start, found.step) == (x, start, 2) and last(value) == last(x) // 2


def _negated(graph: Graph, value: Value) -> Value | None:
    op = source(value).producer
    if op is None or op.kind != "elementwise":
        return None
    if op.attrs.get("fn") == "neg":
        return source(operands(op)[0])
    scaled = number(graph, op, "mul")
    return source(scaled[0]) if scaled is not None and scaled[1] == -1 else None


def _table(value: Value, x: Value, rows: int) -> Value | None:
    """A value that is the same for all heads of x, as [1, m, r] or [m, r]; None where it is none."""
    value = source(value)
    shape, full = list(value.shape or ()), list(x.shape or ())
    wanted = [length if axis in (rows, len(full) - 1) else 1 for axis, length in enumerate(full)]
    if len(shape) > len(full) or [1] * (len(full) - len(shape)) + shape != wanted:
        return None
    for rank in (3, 2):
        found = reshaped(value, rank)
        # A reshape may not hide other rows: [1, m, r] and [m, r] alone have the rows second to last.
        if (
            found is not None
            and found.shape is not None
            and tuple(found.shape[-2:]) == (full[rows], full[-1])
        ):
            return found
    return None


# ---- behind the attention --------------------------------------------------------------------------------
def joined_result(graph: Graph, out: Value) -> Value | None:
    """The value [1, m, h * e] or [m, h * e] that `out` [1, h, m, e] becomes, when it becomes nothing else."""
    moved, heads = False, out.shape
    if heads is None or out.rank != 4:
        return None
    value = out
    for _ in range(8):
        if len(value.users) != 1 or value in graph.outputs:
            return None
        op: Op = value.users[0][0]
        if len(op.outputs) != 1:
            return None
        if idle(op):
            value = op.output
        elif not moved and op.kind == "transpose" and list(op.attrs["perm"]) == SPLIT:
            value, moved = op.output, True
        elif op.kind == "reshape" and (moved or heads[1] == 1):
            width = heads[1] * heads[3] if isinstance(heads[1], int) and isinstance(heads[3], int) else -1
            return op.output if op.output.rank in (2, 3) and last(op.output) == width else None
        else:
            return None
    return None
