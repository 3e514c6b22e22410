"""match_padded_tokens: bipartite soft matching of sequences of different lengths in one padded batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..body import BOOL, FLOAT, FLOATS, INT32, INT64, Body
from ..definition import OpDef
from ..layout import body_take_rows, take
from ..lengths import fraction, removable
from .match_tokens import (
    BUDGET,
    UNLIKE,
    body_best,
    body_normalised,
    body_removable,
    body_sorted,
    check_order,
    identity,
    map_shapes,
    matching_work,
    normalised,
)


def match_padded_tokens(
    metric: Tensor,
    size: Tensor,
    *,
    r: int = -1,
    ratio: float = -1.0,
    prefix: int = 0,
    suffix: int = 0,
    order: str = "published",
) -> tuple[Tensor, Tensor, Tensor]:
    """metric [B, N, D], size [B or 1, N] (0: padding) -> slot [B, N], keep [B, N'], source [B, N-N'], int32.

    Like `match_tokens` on each sample's real tokens alone, wherever its padding stands: n of them, of which
    min(r or floor(ratio * n), (n - prefix - suffix) // 2) are removed. N' is what N real tokens would leave.
    Real slots come first, in the order that `match_tokens` gives them, then slots that hold padding.
    Padding in excess of these is dropped: slot -1, listed in `source`."""
    check_order("match_padded_tokens", order)
    batch, count, _ = metric.shape
    device = metric.device
    gone = removable(count, r, ratio, prefix + suffix)
    if gone == 0:
        return identity(batch, count, device)
    positions = torch.arange(count, device=device).expand(batch, count)
    real = (size > 0).expand(batch, count)
    n = real.sum(1, keepdim=True)
    # Real tokens first, padding behind them, both by position. From here on a token's place is its rank.
    place = torch.sort(torch.where(real, positions, positions + count), dim=1).values % count
    unit = take(normalised(torch.where(real.unsqueeze(-1), metric, 0)), place, 1, 0)
    free = (positions >= prefix) & (positions < n - suffix)
    score = torch.bmm(unit[:, 0::2], unit[:, 1::2].transpose(1, 2))
    score = torch.where(free[:, 0::2, None] & free[:, None, 1::2], score, UNLIKE)
    best, partner = score.max(-1)
    ranking = torch.sort(best, dim=1, descending=True, stable=True).indices

    own = torch.minimum(_wanted(n, r, ratio), torch.clamp((n - prefix - suffix) // 2, min=0))  # [B, 1]
    chosen, turn = ranking[:, :gone], positions[:, :gone]
    merges = turn < own
    # Where a sample has fewer pairs than N' asks for, its last padding goes instead.
    source = torch.where(merges, 2 * chosen, count - gone + turn)
    within, moves = positions, free & (own > 0)
    if order == "published" and prefix == 0:
        similar = torch.zeros_like(ranking).scatter(1, ranking, positions[:, : ranking.shape[1]])
        within = torch.stack([similar, similar], dim=2).flatten(1)[:, :count]
        within = torch.where(moves & (positions % 2 == 0), within, positions)
    group = torch.where(positions < n, 0, 4)
    if order == "published":
        side = torch.where(free, 1 + positions % 2, torch.where(positions < prefix, 0, 3))
        group = torch.where(positions < n, torch.where(own > 0, side, 0), 4)
    group = group.scatter(1, source, 5)
    keep = torch.argsort(group * count + within, dim=1)[:, : count - gone]
    slot = torch.zeros_like(positions).scatter(1, keep, positions[:, : count - gone])
    target = 2 * torch.gather(partner, 1, chosen) + 1
    slot = slot.scatter(1, source, torch.where(merges, torch.gather(slot, 1, target), -1))

    slot = torch.zeros_like(positions).scatter(1, place, slot)
    keep, source = torch.gather(place, 1, keep), torch.gather(place, 1, source)
    return slot.int(), keep.int(), source.int()


def _wanted(n: Tensor, r: int, ratio: float) -> Tensor:
    if r >= 0:
        return torch.full_like(n, r)
    share = fraction(ratio)
    return n * share.numerator // share.denominator


def _shapes(shapes: list[Any], attrs: dict[str, Any]) -> Any:
    gone = removable(shapes[0][1], attrs["r"], attrs["ratio"], attrs["prefix"] + attrs["suffix"])
    return map_shapes(shapes[0], gone)


# ---- ONNX --------------------------------------------------------------------------------------------
def _body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    check_order("match_padded_tokens", attrs["order"])
    prefix, suffix, published = attrs["prefix"], attrs["suffix"], attrs["order"] == "published"
    count, batch = b.length("metric", 1), b.length("metric", 0)
    gone = body_removable(b, count, attrs)
    left = b("Sub", count, gone)
    zero, one, two = b.constant(0), b.constant(1), b.constant(2)
    full = b.join(batch, count)
    positions = b("Expand", b.count(count), full)
    real = b.cast(b("Expand", b.cast(b("Greater", "size", b.constant(0.0, FLOAT)), INT32), full), BOOL)
    n = b("ReduceSum", b.cast(real, INT64), b.constant([1]), keepdims=1)
    keys = b("Where", real, positions, b("Add", positions, count))
    place = b("Mod", body_sorted(b, keys, largest=False)[0], count)
    metric = b.cast("metric", FLOAT)
    metric = b("Where", b.unsqueeze(real, 2), metric, b.constant(0.0, FLOAT))
    unit = body_take_rows(b, body_normalised(b, metric, FLOAT), place)
    free = b(
        "And",
        b("GreaterOrEqual", positions, b.constant(prefix)),
        b("Less", positions, b("Sub", n, b.constant(suffix))),
    )
    even, odd = b.slice(unit, 1, 0, None, 2), b.slice(unit, 1, 1, None, 2)
    score = b("MatMul", even, b.permute(odd, [0, 2, 1]))
    free_even = b.unsqueeze(b.slice(free, 1, 0, None, 2), 2)
    free_odd = b.unsqueeze(b.slice(free, 1, 1, None, 2), 1)
    score = b("Where", b("And", free_even, free_odd), score, b.constant(UNLIKE, FLOAT))
    best, partner = body_best(b, score)
    ranking = body_sorted(b, best, largest=True)[1]

    own = body_removable(b, n, attrs)
    chosen, turn = b.slice(ranking, 1, 0, gone), b.slice(positions, 1, 0, gone)
    merges = b("Less", turn, own)
    source = b("Where", merges, b("Mul", chosen, two), b("Add", turn, left))
    parity = b("Mod", positions, two)
    moved = b("Greater", own, zero)
    within, moves = positions, b("And", free, moved)
    if published and prefix == 0:
        order = b.slice(positions, 1, 0, b.length(ranking, 1))
        similar = b("ScatterElements", ranking, ranking, order, axis=1)
        pairs = b("Concat", b.unsqueeze(similar, 2), b.unsqueeze(similar, 2), axis=2)
        pairs = b.slice(b("Reshape", pairs, b.constant([0, -1])), 1, 0, count)
        within = b("Where", b("And", moves, b("Equal", parity, zero)), pairs, positions)
    side = zero
    if published:
        ends = b("Where", b("Less", positions, b.constant(prefix)), zero, b.constant(3))
        side = b("Where", moved, b("Where", free, b("Add", parity, one), ends), zero)
    group = b("Where", b("Less", positions, n), side, b.constant(4))
    removed = b("Expand", b.constant([5]), b("Shape", source))
    group = b("ScatterElements", group, source, removed, axis=1)
    keys = b("Add", b("Mul", group, count), within)
    keep = b.slice(body_sorted(b, keys, largest=False)[1], 1, 0, left)
    slot = b("ScatterElements", positions, keep, b.slice(positions, 1, 0, left), axis=1)
    target = b("Add", b("Mul", b("GatherElements", partner, chosen, axis=1), two), one)
    receiver = b("Where", merges, b("GatherElements", slot, target, axis=1), b.constant(-1))
    slot = b("ScatterElements", slot, source, receiver, axis=1)

    slot = b("ScatterElements", positions, place, slot, axis=1)
    keep, source = b("GatherElements", place, keep, axis=1), b("GatherElements", place, source, axis=1)
    nothing = b("Equal", gone, zero)
    slot, keep = (
        b("Where", nothing, positions, slot),
        b("Where", nothing, b.slice(positions, 1, 0, left), keep),
    )
    return [b.cast(x, INT32) for x in (slot, keep, source)]


OP = OpDef(
    name="match_padded_tokens",
    summary="Bipartite soft matching where size 0 marks padding: each sample as if it were alone.",
    inputs=("metric", "size"),
    outputs=("slot", "keep", "source"),
    attrs=BUDGET,
    reference=match_padded_tokens,
    opaque_shapes=True,
    shapes=_shapes,
    dtypes=lambda dtypes, attrs: ["int32"] * 3,
    body=_body,
    custom={0: FLOATS},
    work=matching_work,
    chooses=True,
    source="Bolya et al., ICLR 2023, which has no padding",
)
