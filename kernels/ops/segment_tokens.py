"""segment_tokens: units of a text, an identifier or a word of several tokens each, as a map onto one slot a unit.

The map is made of numbers that come from outside the graph, one for each token: tokens of equal number that follow each
other are one unit. How many slots there are is said by the graph (a count or a share) or by an operand's length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..body import FLOAT, INT32, INT64, Body
from ..definition import Attr, OpDef
from ..lengths import Dim, Shape, divide, fraction, least
from .match_tokens import body_sorted


def slots_for(length: Dim, count: int, ratio: float, bucket: int) -> Dim:
    """How many slots `length` tokens get: count, or ceil(ratio * length) where that is negative, rounded up to a
    multiple of `bucket`; never more than there are tokens."""
    if count >= 0:
        return least(length, -(-count // bucket) * bucket)
    share = fraction(ratio)
    each = share.denominator * bucket
    return least(length, divide(length * share.numerator + (each - 1), each) * bucket)


def segment_tokens(
    segments: Tensor,
    valid: Tensor | None = None,
    slots: Tensor | None = None,
    *,
    count: int = -1,
    ratio: float = -1.0,
    bucket: int = 1,
    prefix: int = 0,
    suffix: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """segments [B, N] int, valid [B or 1, N] (> 0: no padding) -> a map onto S slots, S from `slots_for` or the length
    of `slots` [S].

    slot [B, N], keep [B, S] int32 (a slot's first token); size [B, S] float32, its number of tokens; used [B, S]
    float32, 1 where that is not 0; fits [B] float32. A token with a negative number is padding. The first `prefix` and
    the last `suffix` tokens are units by themselves, padding or not, and have the first and the last slots. Slots are
    in the order of their tokens. Those that no unit needs hold padding, each a token of its own, or nothing (no token
    has them); other padding has slot -1. A sample of U > S units does not fit (fits 0): its first and its last unit
    (its prefix, its suffix) keep slots of their own, and the M others share the L that are left: the m-th has the
    floor(m * L / M)-th."""
    batch, length = segments.shape
    device = segments.device
    left = slots_for(length, count, ratio, bucket) if slots is None else slots.shape[0]
    first, last = max(prefix, 1), max(suffix, 1)
    places = torch.arange(length, device=device).expand(batch, length)
    real = segments >= 0
    if valid is not None:
        real = real & (valid > 0)
    ends = (places < prefix) | (places >= length - suffix)
    before = torch.nn.functional.pad(segments[:, :-1], (1, 0), value=-1)
    before_real = torch.nn.functional.pad(real[:, :-1], (1, 0), value=False)
    goes_on = real & before_real & (segments == before) & (places > prefix)
    heads = (real & ~goes_on) | ends
    unit = torch.cumsum(heads.long(), 1) - 1
    total = heads.long().sum(1, keepdim=True)
    room: Any = torch.sym_max(left - first - last, 1)
    shared = (unit - first) * room // (total - first - last).clamp(min=1) + first
    shared = torch.where(unit >= total - last, left - total + unit, torch.where(unit < first, unit, shared))
    group = torch.where(total > left, shared, unit)
    starts = group != torch.nn.functional.pad(group[:, :-1], (1, 0), value=-1)

    member = real | ends
    turn = torch.where(
        starts, 0, torch.where(member, 2, 1)
    )  # starts of slots, then padding, then whatever there is
    order = torch.sort(turn * length + places, dim=1).indices
    keep = torch.sort(order[:, :left], dim=1).values
    own = torch.full_like(places, -1).scatter(1, keep, places[:, :left])
    slot = torch.where(member, torch.gather(own, 1, torch.gather(order, 1, group.clamp(min=0))), own)
    counted = torch.where(real, 1.0, 0.0)
    size = torch.zeros_like(keep, dtype=torch.float32).scatter_add(1, slot.clamp(min=0), counted)
    fits = (total[:, 0] <= left).float()
    return slot.int(), keep.int(), size, (size > 0).float(), fits


def _shapes(shapes: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    (batch, length), slots = shapes[0], shapes[2]
    left = slots_for(length, attrs["count"], attrs["ratio"], attrs["bucket"]) if slots is None else slots[0]
    return [(batch, length), (batch, left), (batch, left), (batch, left), (batch,)]


# ---- ONNX --------------------------------------------------------------------------------------------
def _slots(b: Body, length: str, attrs: dict[str, Any]) -> str:
    bucket = attrs["bucket"]
    if attrs["count"] >= 0:
        return b("Min", length, b.constant([-(-attrs["count"] // bucket) * bucket]))
    share = fraction(attrs["ratio"])
    each = share.denominator * bucket
    wanted = b("Add", b("Mul", length, b.constant([share.numerator])), b.constant([each - 1]))
    return b("Min", length, b("Mul", b("Div", wanted, b.constant([each])), b.constant([bucket])))


def _body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    prefix, suffix = attrs["prefix"], attrs["suffix"]
    batch, length = b.length("segments", 0), b.length("segments", 1)
    left = _slots(b, length, attrs) if operands[2] is None else b.length("slots", 0)
    first, last = b.constant(max(prefix, 1)), b.constant(max(suffix, 1))
    zero, one, none = b.constant(0), b.constant(1), b.constant(-1)
    places = b("Expand", b.count(length), b.join(batch, length))

    def shifted(x: str) -> str:
        """Each token's x of the one before it; -1 for the first."""
        column = b("Expand", none, b.join(batch, 1))
        return b("Concat", column, b.slice(x, 1, 0, -1), axis=1)

    numbers = b.cast("segments", INT64)
    real = b("GreaterOrEqual", numbers, zero)
    if operands[1] is not None:
        real = b("And", real, b("Greater", "valid", b.constant(0.0, FLOAT)))
    numbers = b("Where", real, numbers, none)
    goes_on = b("And", real, b("Equal", numbers, shifted(numbers)))
    goes_on = b("And", goes_on, b("Greater", places, b.constant(prefix)))
    heads, member = b("And", real, b("Not", goes_on)), real
    if prefix:
        ends = b("Less", places, b.constant(prefix))
        heads, member = b("Or", heads, ends), b("Or", member, ends)
    if suffix:
        ends = b("GreaterOrEqual", places, b("Sub", length, b.constant(suffix)))
        heads, member = b("Or", heads, ends), b("Or", member, ends)
    heads = b.cast(heads, INT64)
    unit = b("Sub", b("CumSum", heads, one), one)
    total = b("ReduceSum", heads, b.constant([1]), keepdims=1)
    ends_of = b("Add", first, last)
    room = b("Max", b("Sub", left, ends_of), one)
    others = b("Max", b("Sub", total, ends_of), one)
    # Below `first` the quotient is not used; division there would round towards 0.
    shared = b("Mul", b("Max", b("Sub", unit, first), zero), room)
    shared = b("Add", b("Div", shared, others), first)
    shared = b("Where", b("Less", unit, first), unit, shared)
    late = b("GreaterOrEqual", unit, b("Sub", total, last))
    shared = b("Where", late, b("Add", b("Sub", left, total), unit), shared)
    group = b("Where", b("Greater", total, left), shared, unit)
    starts = b("Not", b("Equal", group, shifted(group)))

    turn = b("Where", starts, zero, b("Where", member, b.constant(2), one))
    order = body_sorted(b, b("Add", b("Mul", turn, length), places), largest=False)[1]
    keep = body_sorted(b, b.slice(order, 1, 0, left), largest=False)[0]
    blank = b("Expand", none, b.join(batch, length))
    own = b("ScatterElements", blank, keep, b.slice(places, 1, 0, left), axis=1)
    start = b("GatherElements", order, b("Max", group, zero), axis=1)
    slot = b("Where", member, b("GatherElements", own, start, axis=1), own)
    hit = b("Equal", b.unsqueeze(slot, 1), b.unsqueeze(b.count(left), 1))  # [B, S, N]
    counted = b("And", hit, b.unsqueeze(real, 1))
    size = b("ReduceSum", b.cast(counted, FLOAT), b.constant([2]), keepdims=0)
    used = b.cast(b("Greater", size, b.constant(0.0, FLOAT)), FLOAT)
    fits = b.cast(b("LessOrEqual", b.squeeze(total, 1), left), FLOAT)
    return [b.cast(slot, INT32), b.cast(keep, INT32), size, used, fits]


OP = OpDef(
    name="segment_tokens",
    summary="Tokens of equal number that follow each other as one slot; which slots are real, and whether all fit.",
    inputs=("segments", "valid?", "slots?"),
    outputs=("slot", "keep", "size", "used", "fits"),
    attrs=(
        Attr("count", -1),
        Attr("ratio", -1.0),
        Attr("bucket", 1),
        Attr("prefix", 0),
        Attr("suffix", 0),
    ),
    reference=segment_tokens,
    opaque_shapes=True,
    shapes=_shapes,
    dtypes=lambda dtypes, attrs: ["int32"] * 2 + ["float32"] * 3,
    body=_body,
    work=lambda shapes, attrs: 8 * shapes[0][0] * shapes[0][1],
    source="the unit of Saad et al., 2025 (arXiv 2507.14423); slots, padding and what does not fit are ours",
)
