"""top_tokens, drop_tokens, guard_rows: from scores to the tokens that are kept, each sample on its own.

A *flag* is -1 for a token that is none of those to choose among (text, class tokens), 1 for one that is kept, and 0 for
one that is dropped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..body import FLOAT, INT32, INT64, Body
from ..definition import Attr, OpDef
from ..lengths import Dim, Shape, fraction, wanted
from .delete_gate import body_gone
from .match_tokens import body_sorted


def top_tokens(
    score: Tensor,
    counts: Tensor | None = None,
    among: Tensor | None = None,
    *,
    count: int = -1,
    ratio: float = -1.0,
    shared: bool = False,
) -> Tensor:
    """score [G, P] -> flags float32 [G, P]: in every row the tokens of highest score, the first among equals.

    A score below 0 (or NaN) is no candidate and stays -1, and so is a token where `among` [G, P] is below 0. Kept are
    counts [G] int32, or `count`, or floor(ratio * n) of the row's n candidates; never more than n. shared:
    every row gets the places that row 0 gets (as the published code of HiRED for LLaVA-1.5 does)."""
    candidate = score >= 0 if among is None else (score >= 0) & (among >= 0)
    found = candidate.sum(1, keepdim=True)
    if counts is not None:
        most = counts[:, None].long()
    elif count >= 0:
        most = torch.full_like(found, count)
    else:
        share = fraction(ratio)
        most = found * share.numerator // share.denominator
    order = torch.sort(torch.where(candidate, score, -1.0), dim=1, descending=True, stable=True).indices
    places = torch.arange(score.shape[1], device=score.device).expand_as(order)
    rank = torch.zeros_like(order).scatter(1, order, places)
    flags = torch.where(candidate, (rank < torch.minimum(most, found)).float(), -1.0)
    return flags[:1].expand_as(flags).clone() if shared else flags


def _top_body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    score = b.cast("score", FLOAT)
    candidate = b("GreaterOrEqual", score, b.constant(0.0, FLOAT))
    if operands[2] is not None:
        candidate = b("And", candidate, b("GreaterOrEqual", "among", b.constant(0.0, FLOAT)))
    found = b("ReduceSum", b.cast(candidate, INT64), b.constant([1]), keepdims=1)
    if operands[1] is not None:
        wanted = b.unsqueeze(b.cast("counts", INT64), 1)
    elif attrs["count"] >= 0:
        wanted = b.constant(attrs["count"])
    else:
        share = fraction(attrs["ratio"])
        wanted = b("Div", b("Mul", found, b.constant(share.numerator)), b.constant(share.denominator))
    order = body_sorted(b, b("Where", candidate, score, b.constant(-1.0, FLOAT)), largest=True)[1]
    places = b("Expand", b.count(b.length("score", 1)), b("Shape", "score"))
    rank = b("ScatterElements", order, order, places, axis=1)
    kept = b.cast(b("Less", rank, b("Min", wanted, found)), FLOAT)
    flags = b("Where", candidate, kept, b.constant(-1.0, FLOAT))
    if attrs["shared"]:
        flags = b("Expand", b.slice(flags, 0, 0, 1), b("Shape", "score"))
    return [flags]


def drop_tokens(
    flags: Tensor,
    valid: Tensor | None = None,
    slots: Tensor | None = None,
    *,
    count: int = -1,
    ratio: float = -1.0,
    prefix: int = 0,
    suffix: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """flags [B, N], valid [B or 1, N] (> 0: no padding) -> a map onto N' slots, and two checks of it.

    `count` tokens go, or floor(ratio * N); or N' is the length of `slots` int64 [N'] (0, 1, ...). slot [B, N], keep
    [B, N'], source [B, N-N'] int32; size [B, N'] and fits [B] float32. Tokens keep their order. Wanted are those with
    a flag other than 0 that are no padding; the first `prefix` and the last `suffix` tokens keep their place, padding
    or not. A sample that wants fewer than there are slots fills up with others, whose size is 0 (nothing attends to
    them) and whose slot is -1; one that wants more does not fit (fits 0), and all of its tokens have slot 0."""
    batch, length = flags.shape
    asked = flags != 0 if valid is None else (flags != 0) & (valid > 0)
    places = torch.arange(length, device=flags.device).expand(batch, length)
    stays = asked | (places < prefix) | (places >= length - suffix)
    order = torch.sort(torch.where(stays, places, places + length), dim=1).indices
    if slots is None:
        left = length - wanted(length, count, ratio)
        first, others, numbers = order[:, :left], order[:, left:], places[:, :left]
    else:  # chosen by number: torch cannot tell that a slice has a length that only the data say
        left = slots.shape[0]
        rest = torch.arange(length - left, device=flags.device) + left
        first, others = order.index_select(1, slots), order.index_select(1, rest)
        numbers = slots.expand(batch, left)
    keep, source = torch.sort(first, dim=1).values, torch.sort(others, dim=1).values
    slot = torch.where(stays, torch.full_like(places, -1).scatter(1, keep, numbers), -1)
    size = torch.gather(asked.float(), 1, keep)
    fits = (stays.sum(1) <= left).float()
    slot = torch.where(fits[:, None] > 0, slot, 0)
    return slot.int(), keep.int(), source.int(), size, fits


def _drop_shapes(shapes: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    batch, length = shapes[0]
    if shapes[2] is not None:
        left: Dim = shapes[2][0]
        gone: Dim = length - left
    else:
        gone = wanted(length, attrs["count"], attrs["ratio"])
        left = length - gone
    return [(batch, length), (batch, left), (batch, gone), (batch, left), (batch,)]


def _drop_body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    batch, length = b.length("flags", 0), b.length("flags", 1)
    left = b.length("slots", 0) if operands[2] is not None else b("Sub", length, body_gone(b, length, attrs))
    wanted = b("Not", b("Equal", "flags", b.constant(0.0, FLOAT)))
    if operands[1] is not None:
        wanted = b("And", wanted, b("Greater", "valid", b.constant(0.0, FLOAT)))
    places = b("Expand", b.count(length), b.join(batch, length))
    stays = wanted
    if attrs["prefix"]:
        stays = b("Or", stays, b("Less", places, b.constant(attrs["prefix"])))
    if attrs["suffix"]:
        last = b("Sub", length, b.constant([attrs["suffix"]]))
        stays = b("Or", stays, b("GreaterOrEqual", places, last))
    keys = b("Where", stays, places, b("Add", places, length))
    order = body_sorted(b, keys, largest=False)[1]
    keep = body_sorted(b, b.slice(order, 1, 0, left), largest=False)[0]
    source = body_sorted(b, b.slice(order, 1, left), largest=False)[0]
    none = b("Expand", b.constant(-1), b.join(batch, length))
    slot = b("ScatterElements", none, keep, b.slice(places, 1, 0, left), axis=1)
    slot = b("Where", stays, slot, b.constant(-1))
    size = b("GatherElements", b.cast(wanted, FLOAT), keep, axis=1)
    number = b("ReduceSum", b.cast(stays, INT64), b.constant([1]), keepdims=0)
    room = b("LessOrEqual", number, left)
    slot = b("Where", b.unsqueeze(room, 1), slot, b.constant(0))
    fits = b.cast(room, FLOAT)
    return [*(b.cast(x, INT32) for x in (slot, keep, source)), size, fits]


def guard_rows(x: Tensor, fits: Tensor, *, batch_axis: int = 0) -> Tensor:
    """x as it is, but NaN for samples whose fits [B] is 0: no result is better than a wrong one."""
    shape = [1] * x.dim()
    shape[batch_axis] = fits.shape[0]
    return torch.where(fits.reshape(shape) > 0, x, torch.nan)


def _guard_body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    rank, dtype = operands[0]
    axes = [a for a in range(rank) if a != attrs["batch_axis"]]
    good = b.unsqueeze(b("Greater", "fits", b.constant(0.0, FLOAT)), *axes)
    return [b("Where", good, "x", b.cast(b.constant(float("nan"), FLOAT), dtype))]


TOP = OpDef(
    name="top_tokens",
    summary="Flags of the tokens of highest score in each row: 1 kept, 0 dropped, -1 no candidate.",
    inputs=("score", "counts?", "among?"),
    outputs=("flags",),
    attrs=(Attr("count", -1), Attr("ratio", -1.0), Attr("shared", False)),
    reference=top_tokens,
    shapes=lambda shapes, attrs: [tuple(shapes[0])],
    dtypes=lambda dtypes, attrs: ["float32"],
    body=_top_body,
    work=lambda shapes, attrs: 4 * shapes[0][0] * shapes[0][1],
    chooses=True,
)
DROP = OpDef(
    name="drop_tokens",
    summary="The map that leaves a number or share of tokens out: flagged 0 or padding; what is real, and if it fits.",
    inputs=("flags", "valid?", "slots?"),
    outputs=("slot", "keep", "source", "size", "fits"),
    attrs=(Attr("count", -1), Attr("ratio", -1.0), Attr("prefix", 0), Attr("suffix", 0)),
    reference=drop_tokens,
    opaque_shapes=True,
    shapes=_drop_shapes,
    dtypes=lambda dtypes, attrs: ["int32"] * 3 + ["float32"] * 2,
    body=_drop_body,
    work=lambda shapes, attrs: 4 * shapes[0][0] * shapes[0][1],
)
GUARD = OpDef(
    name="guard_rows",
    summary="NaN in place of the samples that do not fit the static number of tokens.",
    inputs=("x", "fits"),
    outputs=("y",),
    attrs=(Attr("batch_axis", 0),),
    reference=guard_rows,
    shapes=lambda shapes, attrs: [tuple(shapes[0])],
    dtypes=lambda dtypes, attrs: [dtypes[0] or "float32"],
    body=_guard_body,
    work=lambda shapes, attrs: 0,
    full_precision=False,
)
