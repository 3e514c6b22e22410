"""restore_tokens, blend_tokens, select_tokens, compose_slots: reading rows through a map; pad_tokens: one more row."""

from __future__ import annotations

from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from ..body import BOOL, INT32, INT64, Body
from ..definition import Attr, OpDef
from ..layout import body_from_rows, body_take, body_take_rows, body_to_rows, check_axes, take, with_length
from ..lengths import Shape

FIXED_SIZE = tuple(
    int(getattr(TensorProto, name))
    for name in (
        *("FLOAT", "UINT8", "INT8", "UINT16", "INT16", "INT32", "INT64", "BOOL"),
        *("FLOAT16", "DOUBLE", "UINT32", "UINT64", "BFLOAT16"),
    )
)
"""Elements that a kernel copies as they are."""


def restore_tokens(y: Tensor, slot: Tensor, *, axis: int, batch_axis: int = 0) -> Tensor:
    """y with N' tokens along `axis`, slot [B, N] int32 -> N tokens: each gets the row of its slot.

    A dropped token (slot -1) gets zeros. batch_axis -1: y has no batch axis and slot's batch is 1."""
    check_axes("restore_tokens", y.dim(), axis, batch_axis)
    rows = take(y, slot.clamp(min=0), axis, batch_axis)
    shape = [1] * y.dim()
    shape[axis] = slot.shape[1]
    dropped = slot < 0
    if batch_axis < 0:
        dropped = dropped[0]
    else:
        shape[batch_axis] = slot.shape[0]
        dropped = dropped.t() if axis < batch_axis else dropped
    return torch.where(dropped.reshape(shape), torch.zeros((), dtype=y.dtype, device=y.device), rows)


def _restore_body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    (rank, dtype), axis, batch = operands[0], attrs["axis"], attrs["batch_axis"]
    check_axes("restore_tokens", rank, axis, batch)
    # A row of zeros behind the last slot is what a dropped token reads: copying beats a Where over every row.
    slots = b.length("y", axis)
    index = b("Where", b("Less", "slot", b.constant(0, INT32)), slots, b.cast("slot", INT64))
    rows = body_to_rows(b, "y", rank, axis, batch)
    shape = b.join(b.length(rows, 0), 1, b.length(rows, 2))
    zero = b("Expand", b.constant(np_zero(dtype), dtype), shape)
    found = body_take_rows(b, b("Concat", rows, zero, axis=1), index)
    return [body_from_rows(b, found, "y", rank, axis, batch)]


def np_zero(dtype: int) -> bool | int:
    return False if dtype == BOOL else 0


def blend_tokens(y: Tensor, slot: Tensor, base: Tensor, *, axis: int, batch_axis: int = 0) -> Tensor:
    """y with N' tokens along `axis`, slot [B, N] int32, base with N -> N tokens: each gets the row of its slot.

    A dropped token (slot -1) gets its row of `base`, which has y's dtype and y's other axes. batch_axis -1: as in
    `restore_tokens`."""
    check_axes("blend_tokens", y.dim(), axis, batch_axis)
    rows = take(y, slot.clamp(min=0), axis, batch_axis)
    shape = [1] * y.dim()
    shape[axis] = slot.shape[1]
    if batch_axis < 0:
        dropped = slot[0] < 0
    else:
        shape[batch_axis] = slot.shape[0]
        dropped = (slot.t() if axis < batch_axis else slot) < 0
    return torch.where(dropped.reshape(shape), base, rows)


def _blend_body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    rank, axis, batch = operands[0][0], attrs["axis"], attrs["batch_axis"]
    check_axes("blend_tokens", rank, axis, batch)
    rows, base = (body_to_rows(b, x, rank, axis, batch) for x in ("y", "base"))
    slot = b.cast("slot", INT64)
    own = b("Add", b.length("y", axis), b.count(b.length("slot", 1)))  # the token's row behind those of y
    index = b("Where", b("Less", slot, b.constant(0)), own, slot)
    found = body_take_rows(b, b("Concat", rows, base, axis=1), index)
    return [body_from_rows(b, found, "y", rank, axis, batch)]


def pad_tokens(x: Tensor, *, axis: int, value: float = 0.0) -> Tensor:
    """x with one more row of `value` behind the others along `axis`; True for a value other than 0 where x is bool.

    A key and a value of zeros add 1 to the denominator of a softmax: softmax1, exp(a) / (1 + sum exp(a))."""
    shape = list(x.shape)
    shape[axis] = 1
    return torch.cat([x, x.new_full(shape, bool(value) if x.dtype == torch.bool else value)], axis)


def _pad_shapes(shapes: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    shape = list(shapes[0])
    shape[attrs["axis"]] = shape[attrs["axis"]] + 1
    return [tuple(shape)]


def _pad_body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    (rank, dtype), axis = operands[0], attrs["axis"]
    parts = [1 if a == axis else b.length("x", a) for a in range(rank)]
    value = bool(attrs["value"]) if dtype == BOOL else attrs["value"]
    return [b("Concat", "x", b("Expand", b.constant(value, dtype), b.join(*parts)), axis=axis)]


def select_tokens(x: Tensor, keep: Tensor, *, axis: int, rank: int, batch_axis: int = 0) -> Tensor:
    """The rows `keep` [B, N'] int32 of x along `axis`, any dtype.

    x is seen with 1s on the left up to `rank`; axis and batch_axis refer to that. A batch axis of length 1 is
    expanded to keep's. batch_axis -1: no batch axis, keep's batch is 1."""
    if x.dim() > rank:
        raise ValueError(f"select_tokens: x has rank {x.dim()}, more than {rank}")
    check_axes("select_tokens", rank, axis, batch_axis)
    if x.dim() < rank:
        x = x.reshape([1] * (rank - x.dim()) + list(x.shape))
    return take(x, keep, axis, batch_axis)


def _select_shapes(shapes: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    x = (1,) * (attrs["rank"] - len(shapes[0])) + tuple(shapes[0])
    return [with_length(x, attrs["axis"], attrs["batch_axis"], shapes[1])]


def _select_body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    rank, own = attrs["rank"], operands[0][0]
    if own > rank:
        raise ValueError(f"select_tokens: x has rank {own}, more than {rank}")
    check_axes("select_tokens", rank, attrs["axis"], attrs["batch_axis"])
    x = "x" if own == rank else b.unsqueeze("x", *range(rank - own))
    return [body_take(b, x, "keep", rank, attrs["axis"], attrs["batch_axis"])]


def compose_slots(first: Tensor, second: Tensor) -> Tensor:
    """first [B, N], second [B, N'] int32 -> second[first] [B, N]; what is dropped (-1) stays dropped."""
    found = torch.gather(second, 1, first.clamp(min=0).long())
    return torch.where(first < 0, first, found)


def _compose_body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    zero = b.constant(0, INT32)
    found = b("GatherElements", "second", b("Max", "first", zero), axis=1)
    return [b("Where", b("Less", "first", zero), "first", found)]


RESTORE = OpDef(
    name="restore_tokens",
    summary="Back to N tokens: each takes the row of its slot, zeros where it was dropped.",
    inputs=("y", "slot"),
    outputs=("x",),
    attrs=(Attr("axis"), Attr("batch_axis", 0)),
    reference=restore_tokens,
    shapes=lambda shapes, attrs: [with_length(shapes[0], attrs["axis"], attrs["batch_axis"], shapes[1])],
    dtypes=lambda dtypes, attrs: [dtypes[0] or "float32"],
    body=_restore_body,
    custom={0: FIXED_SIZE},
    work=lambda shapes, attrs: 0,
    full_precision=False,
)
SELECT = OpDef(
    name="select_tokens",
    summary="The rows of the kept tokens: for positions, masks, ids, biases. Any element type.",
    inputs=("x", "keep"),
    outputs=("y",),
    attrs=(Attr("axis"), Attr("rank"), Attr("batch_axis", 0)),
    reference=select_tokens,
    shapes=_select_shapes,
    dtypes=lambda dtypes, attrs: [dtypes[0] or "float32"],
    body=_select_body,
    work=lambda shapes, attrs: 0,
    picks="axis",
    full_precision=False,
)
BLEND = OpDef(
    name="blend_tokens",
    summary="Back to N tokens: each takes the row of its slot, or of another value where it was dropped.",
    inputs=("y", "slot", "base"),
    outputs=("x",),
    attrs=(Attr("axis"), Attr("batch_axis", 0)),
    reference=blend_tokens,
    shapes=lambda shapes, attrs: [with_length(shapes[0], attrs["axis"], attrs["batch_axis"], shapes[1])],
    dtypes=lambda dtypes, attrs: [dtypes[0] or "float32"],
    body=_blend_body,
    work=lambda shapes, attrs: 0,
    full_precision=False,
)
PAD = OpDef(
    name="pad_tokens",
    summary="One more row of a fixed value: a key that nobody wrote.",
    inputs=("x",),
    outputs=("y",),
    attrs=(Attr("axis"), Attr("value", 0.0)),
    reference=pad_tokens,
    shapes=_pad_shapes,
    dtypes=lambda dtypes, attrs: [dtypes[0] or "float32"],
    body=_pad_body,
    work=lambda shapes, attrs: 0,
    full_precision=False,
    source="Miller, Attention Is Off By One, 2023 (softmax1)",
)
COMPOSE = OpDef(
    name="compose_slots",
    summary="Two maps in a row as one: second[first], -1 stays -1.",
    inputs=("first", "second"),
    outputs=("slot",),
    reference=compose_slots,
    shapes=lambda shapes, attrs: [tuple(shapes[0])],
    dtypes=lambda dtypes, attrs: ["int32"],
    body=_compose_body,
    work=lambda shapes, attrs: 0,
    full_precision=False,
)
