"""merge_tokens: the mean of the tokens in every slot, weighted by size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..body import FLOAT, FLOATS, INT64, Body
from ..definition import Attr, OpDef
from ..layout import (
    body_from_rows,
    body_take_rows,
    body_to_rows,
    check_axes,
    from_rows,
    take,
    to_rows,
    with_length,
)
from ..lengths import Shape, numel

MOST_BY_PRODUCT = 128
"""Up to this many sources a product with a one-hot matrix adds them up, fast everywhere and in a fixed order; beyond
it the product's quadratic cost shows (on one CPU core 210 ms against 3 ms for 2048 sources), and they scatter."""


def merge_tokens(
    x: Tensor,
    size: Tensor | None,
    slot: Tensor,
    keep: Tensor,
    source: Tensor,
    *,
    axis: int,
    batch_axis: int = 0,
) -> tuple[Tensor, Tensor]:
    """x with N tokens along `axis`, size [B or 1, N] or None (all 1), a map -> y with N' tokens, new size [B, N'].

    The mean is taken in float32 at least, y has x's dtype. A slot that receives nothing is a bit-exact copy of
    its token. batch_axis -1: x has no batch axis and the map's batch is 1. Differentiable in x and size."""
    check_axes("merge_tokens", x.dim(), axis, batch_axis)
    rows = to_rows(x, axis, batch_axis)
    if slot.shape[0] == 1:
        slot, keep, source = (m.expand(rows.shape[0], m.shape[1]) for m in (slot, keep, source))
    batch, count = slot.shape
    if size is None:
        size = torch.ones((1, count), dtype=torch.float32, device=x.device)
    size = size.to(torch.float32).expand(batch, count)
    kept, own = take(rows, keep, 1, 0), take(size, keep, 1, 0)
    if isinstance(source.shape[1], int) and source.shape[1] == 0:
        return from_rows(kept, x, axis, batch_axis).clone(), own

    wide = torch.float32 if x.element_size() < 4 else x.dtype
    target = take(slot, source, 1, 0)
    weight = torch.where(target >= 0, take(size, source, 1, 0), 0.0)  # [B, R]
    # Padding may hold anything, and 0 * inf is no 0.
    moved = torch.where(weight.unsqueeze(-1) > 0, take(rows, source, 1, 0).to(wide), 0.0)
    if isinstance(source.shape[1], int) and source.shape[1] > MOST_BY_PRODUCT:
        place = target.clamp(min=0).long()
        received = torch.zeros_like(own).scatter_add(1, place, weight)
        moved = moved * weight.unsqueeze(-1)
        added = torch.zeros_like(kept, dtype=wide).scatter_add(1, place.unsqueeze(-1).expand_as(moved), moved)
    else:
        slots = torch.arange(keep.shape[1], dtype=torch.int32, device=x.device)
        share = torch.where(slots[None, :, None] == target[:, None, :], weight[:, None, :], 0.0)  # [B, N', R]
        received = share.sum(-1)
        added = torch.bmm(share.to(wide), moved)
    total = own + received
    mean = kept.to(wide) * own.unsqueeze(-1) + added
    mean = mean / torch.where(received > 0, total, 1.0).unsqueeze(-1)
    y = torch.where(received.unsqueeze(-1) > 0, mean.to(x.dtype), kept)
    return from_rows(y, x, axis, batch_axis), total


def _shapes(shapes: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    x, _, _, keep, _ = shapes
    batch_axis = attrs["batch_axis"]
    y = with_length(x, attrs["axis"], batch_axis, keep)
    return [y, (y[batch_axis] if batch_axis >= 0 else keep[0], keep[1])]


def _work(shapes: list[Any], attrs: dict[str, Any]) -> Any:
    x, _, slot, keep, source = shapes
    width = numel(x) / (slot[0] * slot[1])
    return slot[0] * (2 * keep[1] * source[1] * width + 4 * keep[1] * width)


def _traffic(shapes: list[Any], attrs: dict[str, Any]) -> Any:
    x, _, slot, keep, source = shapes
    return numel(x) * 2 + slot[0] * keep[1] * source[1]


def _body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    """Only the rows that receive something are computed; one gather out of [x, these rows] makes the result."""
    (rank, dtype), axis, batch_axis = operands[0], attrs["axis"], attrs["batch_axis"]
    check_axes("merge_tokens", rank, axis, batch_axis)
    rows = body_to_rows(b, "x", rank, axis, batch_axis)
    batch = b("Max", b.length(rows, 0), b.length("slot", 0))
    count, left, gone = b.length("slot", 1), b.length("keep", 1), b.length("source", 1)
    zero, nought = b.constant(0), b.constant(0.0, FLOAT)
    slot, keep, source = (
        b("Expand", b.cast(name, INT64), b.join(batch, length))
        for name, length in (("slot", count), ("keep", left), ("source", gone))
    )
    target = b("GatherElements", slot, source, axis=1)
    goes = b("GreaterOrEqual", target, zero)
    home = b("GatherElements", keep, b("Max", target, zero), axis=1)  # the token that the source joins
    moved, base = body_take_rows(b, rows, source), body_take_rows(b, rows, home)
    if dtype != FLOAT:
        moved, base = b.cast(moved, FLOAT), b.cast(base, FLOAT)
    if operands[1] is None:
        sizes = b("Expand", b.constant([1.0], FLOAT), b.join(batch, count))
    else:
        sizes = b("Expand", "size", b.join(batch, count))
    weight = b("Where", goes, b("GatherElements", sizes, source, axis=1), nought)
    if operands[1] is not None:
        moved = b("Where", b("Greater", b.unsqueeze(weight, 2), nought), moved, nought)
    same = b("Equal", b.unsqueeze(target, 2), b.unsqueeze(target, 1))
    share = b("Mul", b.cast(same, FLOAT), b.unsqueeze(weight, 1))  # [B, R, R]
    own = b("GatherElements", sizes, home, axis=1)
    total = b("Add", own, b("ReduceSum", share, b.constant([2]), keepdims=0))
    mean = b("Add", b("Mul", base, b.unsqueeze(own, 2)), b("MatMul", share, moved))
    mean = b("Div", mean, b.unsqueeze(b("Max", total, b.constant(1e-12, FLOAT)), 2))
    if dtype != FLOAT:
        mean = b.cast(mean, dtype)
    # Row count + j of the table is the mean that source j went into. One slot more, cut off again, takes those
    # that are dropped. Sources of one slot have equal rows: any of them may win.
    spare = b("Concat", keep, b("Expand", b.constant([0]), b.join(batch, 1)), axis=1)
    place = b("Where", goes, target, left)
    fresh = b("Expand", b("Add", b.count(gone), count), b.join(batch, gone))
    index = b.slice(b("ScatterElements", spare, place, fresh, axis=1), 1, 0, left)
    if batch_axis >= 0:
        rows = b("Expand", rows, b.join(batch, 1, 1))
    y = body_take_rows(b, b("Concat", rows, mean, axis=1), index)
    new_size = b("GatherElements", b("Concat", sizes, total, axis=1), index, axis=1)
    return [body_from_rows(b, y, "x", rank, axis, batch_axis), new_size]


OP = OpDef(
    name="merge_tokens",
    summary="The mean of each slot's tokens weighted by size, and the new sizes.",
    inputs=("x", "size?", "slot", "keep", "source"),
    outputs=("y", "new_size"),
    attrs=(Attr("axis"), Attr("batch_axis", 0)),
    reference=merge_tokens,
    shapes=_shapes,
    dtypes=lambda dtypes, attrs: [dtypes[0] or "float32", "float32"],
    body=_body,
    custom={0: FLOATS},
    work=_work,
    traffic=_traffic,
    source="Bolya et al., ICLR 2023; the products instead of scatters are ours",
)
