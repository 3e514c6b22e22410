"""The axis signature of every canonical kind: which axes of an op's operands and results are the same axis.

One table, written like einsum letters turned into code: for each kind a function that yields groups of ports.
A port is (value, axis); the axes of one group have the same length and the same meaning. Axes of length 1 are
left out by the solver, which makes broadcasting fall out of the notation. Reshapes, and the axis along which
an op concatenates or cuts, are products and intervals; `axes.py` solves those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..ir.graph import Op, Value

if TYPE_CHECKING:
    from ...kernels import OpDef

Port = tuple[Value, int]
Groups = Iterator[list[Port]]
Signature = Callable[[Op], Groups]

SIGNATURES: dict[str, Signature] = {}

# `spatial` ops after which position i of the axis still speaks of position i.
POSITION_KEEPING = frozenset(
    {"cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "tril", "triu", "trilu"}
)


def mixed_axes(op: Op) -> int | None:
    """How many last axes of its first operand an op of our dialect mixes; None where others meet, or for other ops."""
    found = _definition(op)
    return None if found is None else found.mixes


def picked_axis(op: Op) -> int | None:
    """The axis of its result along which an op of our dialect takes rows of its first operand; None where it does
    more, and for other ops."""
    found = _definition(op)
    return op.attrs[found.picks] if found is not None and found.picks else None


def _definition(op: Op) -> OpDef | None:
    from ...kernels import OPS

    return OPS.get(op.target.split(".")[-1].split("::")[-1]) if op.kind == "elision" else None


def by_position(op: Op) -> bool:
    """Whether an op of our dialect treats tokens one by one, as a product or an elementwise function does."""
    return mixed_axes(op) is not None


def row(*kinds: str) -> Callable[[Signature], Signature]:
    """Enter a signature into the table under the given kinds."""

    def enter(function: Signature) -> Signature:
        for kind in kinds:
            SIGNATURES[kind] = function
        return function

    return enter


def groups(op: Op) -> list[list[Port]]:
    """The groups of equal axes of `op`; none when the kind has no signature or a rank is unknown."""
    signature = SIGNATURES.get(op.kind)
    values = [v for v in [*op.inputs, *op.outputs] if v is not None]
    if signature is None or any(v.shape is None for v in values):
        return []
    return list(signature(op))


def operand(op: Op, index: int) -> Value:
    value = op.inputs[index]
    assert value is not None
    return value


def one_to_one(a: Value, b: Value) -> Groups:
    for axis in range(min(a.rank, b.rank)):
        yield [(a, axis), (b, axis)]


def trailing(values: list[Value], last: int = 0) -> Groups:
    """Axes aligned from the right; the `last` rightmost ones left out."""
    rank = max(v.rank for v in values)
    for back in range(1 + last, rank + 1):
        yield [(v, v.rank - back) for v in values if v.rank >= back]


@row("elementwise")
def _elementwise(op: Op) -> Groups:
    operands = [v for v in op.inputs if v is not None]
    for out in op.outputs:
        yield from trailing([*operands, out])


@row("tie")
def _tie(op: Op) -> Groups:
    yield from one_to_one(operand(op, 0), op.output)


@row("linear")
def _linear(op: Op) -> Groups:
    x, weight = operand(op, 0), operand(op, 1)
    for axis in range(x.rank - 1):
        yield [(x, axis), (op.output, axis)]
    if weight.rank == 2:
        inner, outer = (1, 0) if op.attrs.get("transposed", True) else (0, 1)
        yield [(x, x.rank - 1), (weight, inner)]
        yield [(op.output, op.output.rank - 1), (weight, outer)]


@row("matmul")
def _matmul(op: Op) -> Groups:
    a, b, out = operand(op, 0), operand(op, 1), op.output
    if a.rank < 2 or b.rank < 2:
        if b.rank == 1 and a.rank >= 1:
            for axis in range(a.rank - 1):
                yield [(a, axis), (out, axis)]
        return
    yield [(a, a.rank - 1), (b, b.rank - 2)]
    yield [(a, a.rank - 2), (out, out.rank - 2)]
    yield [(b, b.rank - 1), (out, out.rank - 1)]
    yield from trailing([a, b, out], last=2)


@row("norm")
def _norm(op: Op) -> Groups:
    x = operand(op, 0)
    for out in op.outputs[:1]:
        yield from one_to_one(x, out)
    weight = op.operand(1)
    axes = op.attrs.get("axes", ())
    if weight is not None and tuple(axes) == tuple(range(x.rank - weight.rank, x.rank)):
        yield from trailing([weight, x])


@row("softmax", "scatter")
def _softmax(op: Op) -> Groups:
    yield from one_to_one(operand(op, 0), op.output)


@row("reduce")
def _reduce(op: Op) -> Groups:
    x, axes = operand(op, 0), set(op.attrs["axes"])
    for out in op.outputs:
        if out.rank == x.rank:
            for axis in range(x.rank):
                if axis not in axes:
                    yield [(x, axis), (out, axis)]
        else:
            left = [axis for axis in range(x.rank) if axis not in axes]
            for position, axis in enumerate(left[: out.rank]):
                yield [(x, axis), (out, position)]


@row("transpose")
def _transpose(op: Op) -> Groups:
    x = operand(op, 0)
    for axis, source in enumerate(op.attrs["perm"]):
        yield [(op.output, axis), (x, source)]


@row("expand")
def _expand(op: Op) -> Groups:
    x, out = operand(op, 0), op.output
    for back in range(1, min(x.rank, out.rank) + 1):
        if x.shape is not None and x.shape[x.rank - back] != 1:
            yield [(x, x.rank - back), (out, out.rank - back)]


@row("concat")
def _concat(op: Op) -> Groups:
    for axis in range(op.output.rank):
        if axis != op.attrs["axis"]:
            yield [(v, axis) for v in [*op.inputs, op.output] if v is not None and v.rank == op.output.rank]


@row("stack")
def _stack(op: Op) -> Groups:
    new = op.attrs["axis"]
    for axis in range(op.output.rank):
        if axis != new:
            source = axis - (axis > new)
            yield [*((v, source) for v in op.inputs if v is not None), (op.output, axis)]


@row("split", "slice")
def _split(op: Op) -> Groups:
    x = operand(op, 0)
    for axis in range(x.rank):
        if axis != op.attrs["axis"]:
            yield [(x, axis), *((out, axis) for out in op.outputs)]


@row("unbind", "select")
def _unbind(op: Op) -> Groups:
    x, gone = operand(op, 0), op.attrs["axis"]
    for axis in range(x.rank):
        if axis != gone:
            yield [(x, axis), *((out, axis - (axis > gone)) for out in op.outputs)]


@row("gather")
def _gather(op: Op) -> Groups:
    x, indices, axis = operand(op, 0), operand(op, 1), op.attrs["axis"]
    for a in range(axis):
        yield [(x, a), (op.output, a)]
    for a in range(indices.rank):
        yield [(indices, a), (op.output, axis + a)]
    for a in range(axis + 1, x.rank):
        yield [(x, a), (op.output, a + indices.rank - 1)]


@row("embedding")
def _embedding(op: Op) -> Groups:
    table, ids = operand(op, 0), operand(op, 1)
    for axis in range(ids.rank):
        yield [(ids, axis), (op.output, axis)]
    yield [(table, table.rank - 1), (op.output, op.output.rank - 1)]


def attention_groups(q: Value, k: Value, v: Value, mask: Value | None, out: Value) -> Groups:
    """`b h q d, b h k d, b h k e, (b h q k) -> b h q e`, with any number of leading axes."""
    yield [(q, q.rank - 2), (out, out.rank - 2), *_mask_port(mask, 2)]
    yield [(k, k.rank - 2), (v, v.rank - 2), *_mask_port(mask, 1)]
    yield [(q, q.rank - 1), (k, k.rank - 1)]
    yield [(v, v.rank - 1), (out, out.rank - 1)]
    leading = [q, out, *([mask] if mask is not None else [])]
    grouped = q.shape is not None and k.shape is not None and q.rank > 2 and q.shape[-3] != k.shape[-3]
    if grouped:
        yield [(k, k.rank - 3), (v, v.rank - 3)]
        yield [(x, x.rank - 3) for x in leading if x.rank >= 3]
        yield from trailing([*leading, k, v], last=3)
    else:
        yield from trailing([*leading, k, v], last=2)


def _mask_port(mask: Value | None, back: int) -> list[Port]:
    return [(mask, mask.rank - back)] if mask is not None and mask.rank >= back else []


@row("attention")
def _attention(op: Op) -> Groups:
    yield from attention_groups(operand(op, 0), operand(op, 1), operand(op, 2), op.operand(3), op.output)


@row("conv")
def _conv(op: Op) -> Groups:
    x, weight = operand(op, 0), operand(op, 1)
    spatial = op.attrs["spatial"]
    if len(spatial) == x.rank - 2:
        yield [(x, 0), (op.output, 0)]
        if "transpose" not in str(op.attrs.get("fn", op.target)).lower():
            yield [(op.output, 1), (weight, 0)]


@row("spatial")
def _spatial(op: Op) -> Groups:
    x, mixed = operand(op, 0), set(op.attrs["axes"])
    keeps = str(op.attrs.get("fn", "")).lower() in POSITION_KEEPING
    for out in op.outputs:
        if out.rank == x.rank:
            for axis in range(x.rank):
                if axis not in mixed or keeps:
                    yield [(x, axis), (out, axis)]


@row("elision")
def _elision(op: Op) -> Groups:
    """Our own ops in a graph that was rewritten before: every axis but the token axis goes through."""
    name = op.target.split(".")[-1].split("::")[-1]
    x = op.operand(0)
    if x is None:
        return
    if name.startswith("attention_rows"):
        return  # scores of keys, told from a few queries
    if name.startswith("attention"):
        yield from attention_groups(x, operand(op, 1), operand(op, 2), op.operand(3), op.output)
    elif (mixed := mixed_axes(op)) is not None:
        for axis in range(x.rank - mixed):
            yield [(x, axis), *((out, axis) for out in op.outputs)]
        other = op.operand(1)
        if name in ("gated", "add_rms_norm", "overlay_rows") and other is not None:
            yield from one_to_one(x, other)
    elif name.startswith(("merge_tokens", "restore_tokens", "blend_tokens")):
        for axis in range(x.rank):
            if axis != op.attrs["axis"]:
                yield [(x, axis), (op.output, axis)]
    elif (picked := picked_axis(op)) is not None:
        shift = op.output.rank - x.rank
        for axis in range(x.rank):
            if axis + shift not in (picked, op.attrs["batch_axis"]):
                yield [(x, axis), (op.output, axis + shift)]
