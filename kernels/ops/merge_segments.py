"""merge_segments, segment_weights, any_tokens: what becomes of the tokens of a slot, by a map of `segment_tokens`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..body import BOOL, FLOAT, INT64, Body
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
from .merge_tokens import MOST_BY_PRODUCT


def merge_segments(
    x: Tensor, weight: Tensor | None, slot: Tensor, keep: Tensor, *, axis: int, batch_axis: int = 0
) -> Tensor:
    """x with N tokens along `axis`, weight [B or 1, N] >= 0 or None (all 1), slot [B, N], keep [B, S] -> the weighted
    mean of each slot's tokens.

    Sums are taken in float32 at least, y has x's dtype. A slot of one token is a bit-exact copy of it, one that no
    token has a copy of its `keep`. batch_axis -1: x has no batch axis and the map's batch is 1. Differentiable in x and
    weight."""
    check_axes("merge_segments", x.dim(), axis, batch_axis)
    rows = to_rows(x, axis, batch_axis)
    if slot.shape[0] == 1:
        slot, keep = (m.expand(rows.shape[0], m.shape[1]) for m in (slot, keep))
    batch, count = slot.shape
    rows = rows.expand(batch, count, rows.shape[2])
    wide = torch.float32 if x.element_size() < 4 else x.dtype
    ones = torch.where(slot >= 0, 1.0, 0.0)
    share = ones if weight is None else torch.where(slot >= 0, weight.to(torch.float32), 0.0)
    if isinstance(count, int) and count > MOST_BY_PRODUCT:
        place = slot.clamp(min=0).long()
        none = torch.zeros_like(keep, dtype=torch.float32)
        number, total = none.scatter_add(1, place, ones), none.scatter_add(1, place, share)
        moved = torch.where(share.unsqueeze(-1) > 0, rows.to(wide) * share.unsqueeze(-1), 0.0)
        empty = torch.zeros_like(moved[:, :1]).expand(batch, keep.shape[1], rows.shape[2])
        added = empty.scatter_add(1, place.unsqueeze(-1).expand_as(moved), moved.to(wide))
    else:
        slots = torch.arange(keep.shape[1], dtype=torch.int32, device=x.device)
        hit = slots[None, :, None] == slot[:, None, :]  # [B, S, N]
        number = torch.where(hit, ones[:, None, :], 0.0).sum(-1)
        shares = torch.where(hit, share[:, None, :], 0.0)
        total = shares.sum(-1)
        # What has no part in a mean may hold anything, and 0 * inf is no 0.
        moved = torch.where(share.unsqueeze(-1) > 0, rows.to(wide), 0.0)
        added = torch.bmm(shares.to(wide), moved)
    mean = added / torch.where(total > 0, total, 1.0).unsqueeze(-1)
    y = torch.where(number.unsqueeze(-1) > 1, mean.to(x.dtype), take(rows, keep, 1, 0))
    return from_rows(y, x, axis, batch_axis)


def _merge_body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    (rank, dtype), axis, batch_axis = operands[0], attrs["axis"], attrs["batch_axis"]
    check_axes("merge_segments", rank, axis, batch_axis)
    rows = body_to_rows(b, "x", rank, axis, batch_axis)
    batch = b("Max", b.length(rows, 0), b.length("slot", 0))
    count, left = b.length("slot", 1), b.length("keep", 1)
    slot = b("Expand", b.cast("slot", INT64), b.join(batch, count))
    keep = b("Expand", b.cast("keep", INT64), b.join(batch, left))
    nought = b.constant(0.0, FLOAT)
    hit = b("Equal", b.unsqueeze(slot, 1), b.unsqueeze(b.count(left), 1))
    shares = b.cast(hit, FLOAT)
    number = b("ReduceSum", shares, b.constant([2]), keepdims=1)  # [B, S, 1]
    moved = rows if dtype == FLOAT else b.cast(rows, FLOAT)
    part = b("GreaterOrEqual", slot, b.constant(0))
    if operands[1] is not None:
        part = b("And", part, b("Greater", "weight", nought))
        shares = b("Mul", shares, b.unsqueeze("weight", 1))
    moved = b("Where", b.unsqueeze(part, 2), moved, nought)
    total = b("ReduceSum", shares, b.constant([2]), keepdims=1)
    mean = b("Div", b("MatMul", shares, moved), b("Max", total, b.constant(1e-30, FLOAT)))
    if dtype != FLOAT:
        mean = b.cast(mean, dtype)
    several = b("Greater", number, b.constant(1.0, FLOAT))
    y = b("Where", several, mean, body_take_rows(b, rows, keep))
    return [body_from_rows(b, y, "x", rank, axis, batch_axis)]


def _merge_work(shapes: list[Any], attrs: dict[str, Any]) -> Any:
    x, _, _, keep = shapes
    return 2 * numel(x) * keep[1]


def segment_weights(x: Tensor, query: Tensor, slot: Tensor, *, axis: int, batch_axis: int = 0) -> Tensor:
    """x with N tokens along `axis`, query [F] over all its other axes but the batch, slot [B, N] -> weight [B, N]
    float32.

    exp of the score x . query / sqrt(F) less the largest score in the slot; 0 for a token without a slot. Divided by
    their sum over the slot these are a softmax (attention pooling with one learned query); a query of zeros weighs all
    tokens alike. Differentiable in x and query."""
    check_axes("segment_weights", x.dim(), axis, batch_axis)
    rows = to_rows(x, axis, batch_axis).float()
    score = torch.matmul(rows, query.float()) * (1 / math.sqrt(query.shape[0]))
    score, slot = torch.broadcast_tensors(score, slot)
    there = slot >= 0
    together = slot.unsqueeze(2) == slot.unsqueeze(1)
    # The largest only keeps exp in range: the mean does not depend on it, and so has no gradient through it.
    most = torch.where(together, score.detach().unsqueeze(1), -torch.inf).amax(-1)
    return torch.where(there, torch.exp(torch.where(there, score - most, 0.0)), 0.0)


def _weights_shapes(shapes: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    x, _, slot = shapes
    batch = attrs["batch_axis"]
    return [(slot[0] if batch < 0 or x[batch] == 1 else x[batch], slot[1])]


def _weights_body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    (rank, dtype), axis, batch_axis = operands[0], attrs["axis"], attrs["batch_axis"]
    check_axes("segment_weights", rank, axis, batch_axis)
    rows = body_to_rows(b, "x", rank, axis, batch_axis)
    rows = rows if dtype == FLOAT else b.cast(rows, FLOAT)
    query = "query" if operands[1][1] == FLOAT else b.cast("query", FLOAT)
    scale = b("Reciprocal", b("Sqrt", b.cast(b.length("query", 0), FLOAT)))
    score = b("Mul", b.squeeze(b("MatMul", rows, b.unsqueeze(query, 1)), 2), scale)
    zero, nought = b.constant(0, 6), b.constant(0.0, FLOAT)
    there = b("GreaterOrEqual", "slot", zero)
    together = b("Equal", b.unsqueeze("slot", 2), b.unsqueeze("slot", 1))
    most = b("Where", together, b.unsqueeze(score, 1), b.constant(-3e38, FLOAT))
    most = b("ReduceMax", most, b.constant([2]), keepdims=0)
    return [b("Where", there, b("Exp", b("Where", there, b("Sub", score, most), nought)), nought)]


def any_tokens(
    mask: Tensor, slot: Tensor, keep: Tensor, *, axis: int, rank: int, batch_axis: int = 0
) -> Tensor:
    """mask bool with N tokens along `axis`, slot [B, N], keep [B, S] -> for each slot, whether it holds for any of its
    tokens; the entry of `keep` where no token has the slot.

    mask is seen with 1s on the left up to `rank`, as in select_tokens; axis and batch_axis refer to that."""
    if mask.dim() > rank:
        raise ValueError(f"any_tokens: the mask has rank {mask.dim()}, more than {rank}")
    check_axes("any_tokens", rank, axis, batch_axis)
    mask = mask.reshape([1] * (rank - mask.dim()) + list(mask.shape))
    rows = to_rows(mask, axis, batch_axis)
    if slot.shape[0] == 1:
        slot, keep = (m.expand(rows.shape[0], m.shape[1]) for m in (slot, keep))
    rows = rows.expand(slot.shape[0], slot.shape[1], rows.shape[2])
    slots = torch.arange(keep.shape[1], dtype=torch.int32, device=mask.device)
    hit = (slots[None, :, None] == slot[:, None, :]).float()
    found = torch.bmm(hit, rows.float()) > 0
    y = torch.where(hit.sum(-1, keepdim=True) > 0, found, take(rows, keep, 1, 0))
    return from_rows(y, mask, axis, batch_axis)


def _any_shapes(shapes: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    mask = (1,) * (attrs["rank"] - len(shapes[0])) + tuple(shapes[0])
    return [with_length(mask, attrs["axis"], attrs["batch_axis"], shapes[2])]


def _any_body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    (own, dtype), rank = operands[0], attrs["rank"]
    axis, batch_axis = attrs["axis"], attrs["batch_axis"]
    if own > rank or dtype != BOOL:
        raise ValueError(f"any_tokens: takes a bool mask of rank {rank} at most, not {own}")
    check_axes("any_tokens", rank, axis, batch_axis)
    mask = b.cast("mask", FLOAT)
    mask = mask if own == rank else b.unsqueeze(mask, *range(rank - own))
    rows = body_to_rows(b, mask, rank, axis, batch_axis)
    batch, left = b("Max", b.length(rows, 0), b.length("slot", 0)), b.length("keep", 1)
    slot = b("Expand", b.cast("slot", INT64), b.join(batch, b.length("slot", 1)))
    keep = b("Expand", b.cast("keep", INT64), b.join(batch, left))
    hit = b.cast(b("Equal", b.unsqueeze(slot, 1), b.unsqueeze(b.count(left), 1)), FLOAT)
    number = b("ReduceSum", hit, b.constant([2]), keepdims=1)
    half = b.constant(0.5, FLOAT)
    y = b("Where", b("Greater", number, half), b("MatMul", hit, rows), body_take_rows(b, rows, keep))
    return [b("Greater", body_from_rows(b, y, mask, rank, axis, batch_axis), half)]


MERGE = OpDef(
    name="merge_segments",
    summary="The mean, or a weighted mean, of the tokens of each slot.",
    inputs=("x", "weight?", "slot", "keep"),
    outputs=("y",),
    attrs=(Attr("axis"), Attr("batch_axis", 0)),
    reference=merge_segments,
    shapes=lambda shapes, attrs: [with_length(shapes[0], attrs["axis"], attrs["batch_axis"], shapes[3])],
    dtypes=lambda dtypes, attrs: [dtypes[0] or "float32"],
    body=_merge_body,
    work=_merge_work,
    source="Saad et al., 2025 (arXiv 2507.14423): averaging",
)
WEIGHTS = OpDef(
    name="segment_weights",
    summary="Weights of the tokens of each slot by one learned query: attention pooling before the division.",
    inputs=("x", "query", "slot"),
    outputs=("weight",),
    attrs=(Attr("axis"), Attr("batch_axis", 0)),
    reference=segment_weights,
    shapes=_weights_shapes,
    dtypes=lambda dtypes, attrs: ["float32"],
    body=_weights_body,
    work=lambda shapes, attrs: 2 * numel(shapes[0]) + 2 * shapes[2][0] * shapes[2][1] * shapes[2][1],
    source="Saad et al., 2025 (arXiv 2507.14423): learned; the form of the weights is ours",
)
ANY = OpDef(
    name="any_tokens",
    summary="A mask over slots: true where it is for any token of the slot.",
    inputs=("mask", "slot", "keep"),
    outputs=("y",),
    attrs=(Attr("axis"), Attr("rank"), Attr("batch_axis", 0)),
    reference=any_tokens,
    shapes=_any_shapes,
    dtypes=lambda dtypes, attrs: ["bool"],
    body=_any_body,
    work=lambda shapes, attrs: 2 * numel(shapes[0]) * shapes[2][1],
    full_precision=False,
)
