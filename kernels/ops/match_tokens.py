"""match_tokens: bipartite soft matching (token merging), the map that removes the r most redundant tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..body import FLOAT, FLOATS, INT32, Body
from ..definition import Attr, OpDef
from ..lengths import Dim, Shape, fraction, removable

ORDERS = ("published", "original")
BUDGET = (
    Attr("r", -1),
    Attr("ratio", -1.0),
    Attr("prefix", 0),
    Attr("suffix", 0),
    Attr("order", "published"),
)
EPSILON = 1e-12
UNLIKE = -3.0
"""Below every cosine: what a pair scores that must not merge."""


def match_tokens(
    metric: Tensor,
    *,
    r: int = -1,
    ratio: float = -1.0,
    prefix: int = 0,
    suffix: int = 0,
    order: str = "published",
) -> tuple[Tensor, Tensor, Tensor]:
    """metric [B, N, D] -> slot [B, N], keep [B, N'], source [B, N-N'], all int32.

    Even positions (A) look for the odd position (B) of highest cosine similarity, the first one among equals;
    the r best pairs merge into the B token (r, or floor(ratio * N); at most half of the unprotected tokens).
    The first `prefix` and the last `suffix` tokens take no part. Slots, order "published": prefix, the A tokens
    that stay (by position with a prefix, else by falling similarity), B, suffix; "original": by position.
    Where nothing is removed, nothing moves. The removed positions in `source` are in falling similarity."""
    check_order("match_tokens", order)
    batch, count, _ = metric.shape
    gone = removable(count, r, ratio, prefix + suffix)
    device = metric.device
    if gone == 0:
        return identity(batch, count, device)
    unit = normalised(metric)
    (first_a, first_b), end = sides(prefix), count - suffix
    a, b = unit[:, first_a:end:2], unit[:, first_b:end:2]
    best, partner = torch.bmm(a, b.transpose(1, 2)).max(-1)
    ranking = torch.sort(best, dim=1, descending=True, stable=True).indices
    removed, stay = ranking[:, :gone], ranking[:, gone:]
    if prefix > 0 and order == "published":
        stay = torch.sort(stay, dim=1).values
    positions = torch.arange(count, device=device).expand(batch, count)
    keep = torch.cat(
        [positions[:, :prefix], first_a + 2 * stay, positions[:, first_b:end:2], positions[:, end:]], dim=1
    )
    if order == "original":
        keep = torch.sort(keep, dim=1).values
    source = first_a + 2 * removed
    target = first_b + 2 * torch.gather(partner, 1, removed)
    slot = torch.zeros_like(positions).scatter(1, keep, positions[:, : count - gone])
    slot = slot.scatter(1, source, torch.gather(slot, 1, target))
    return slot.int(), keep.int(), source.int()


def identity(batch: Dim, count: Dim, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The map that removes nothing and moves nothing."""
    same = torch.arange(count, dtype=torch.int32, device=device).expand(batch, count)
    return same.clone(), same.clone(), same[:, :0].clone()


def normalised(metric: Tensor) -> Tensor:
    """Rows of length 1 in float32; a row of zeros stays zero."""
    wide = metric.float()
    return wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp(min=EPSILON)


def sides(prefix: int) -> tuple[int, int]:
    """The first unprotected even and odd position."""
    return prefix + prefix % 2, prefix + 1 - prefix % 2


def check_order(op: str, order: str) -> None:
    if order not in ORDERS:
        raise ValueError(f"{op}: order is one of {ORDERS}, not {order!r}")


def map_shapes(metric: Shape, gone: Dim) -> list[Shape]:
    batch, count = metric[0], metric[1]
    return [(batch, count), (batch, count - gone), (batch, gone)]


def _gone(shapes: list[Any], attrs: dict[str, Any]) -> Dim:
    return removable(shapes[0][1], attrs["r"], attrs["ratio"], attrs["prefix"] + attrs["suffix"])


def matching_work(shapes: list[Any], attrs: dict[str, Any]) -> Any:
    batch, count, width = shapes[0]
    return batch * (count * count * width / 2 + 3 * count * width)


def _traffic(shapes: list[Any], attrs: dict[str, Any]) -> Any:
    batch, count, width = shapes[0]
    return batch * (count * width * 3 + count * count / 2 + 6 * count)


# ---- ONNX --------------------------------------------------------------------------------------------
def body_normalised(b: Body, metric: str, dtype: int) -> str:
    wide = metric if dtype == FLOAT else b.cast(metric, FLOAT)
    length = b("ReduceL2", wide, b.constant([-1]), keepdims=1)
    return b("Div", wide, b("Max", length, b.constant(EPSILON, FLOAT)))


def body_wanted(b: Body, length: str, attrs: dict[str, Any]) -> str:
    """`lengths.wanted` for int64 `length`."""
    if attrs["r"] >= 0:
        return b.attribute("r")
    share = fraction(attrs["ratio"])
    return b("Div", b("Mul", length, b.constant([share.numerator])), b.constant([share.denominator]))


def body_removable(b: Body, length: str, attrs: dict[str, Any]) -> str:
    """`lengths.removable` for int64 `length`, never below 0."""
    protected = attrs["prefix"] + attrs["suffix"]
    free = b("Max", b("Sub", length, b.constant([protected])), b.constant([0]))
    return b("Min", body_wanted(b, length, attrs), b("Div", free, b.constant([2])))


def body_sorted(b: Body, values: str, *, largest: bool) -> list[str]:
    """Values and indices, sorted along axis 1 of [B, M]; the lower index comes first among equals."""
    return b.many("TopK", [values, b.length(values, 1)], 2, axis=1, largest=int(largest), sorted=1)


def body_best(b: Body, scores: str) -> tuple[str, str]:
    """Maximum and the first place of it along the last axis of [B, M, K]; K may be 0, then both mean nothing."""
    last = b("Sub", b.length(scores, 2), b.constant([1]))
    padded = b("Pad", scores, b.constant([0, 0, 0, 0, 0, 1]), b.constant(UNLIKE, FLOAT))
    best = b("ReduceMax", padded, b.constant([2]), keepdims=0)
    return best, b("Min", b("ArgMax", padded, axis=2, keepdims=0), last)


def _body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    check_order("match_tokens", attrs["order"])
    prefix, suffix = attrs["prefix"], attrs["suffix"]
    first_a, first_b = sides(prefix)
    until = -suffix if suffix else None
    count, batch = b.length("metric", 1), b.length("metric", 0)
    gone = body_removable(b, count, attrs)
    unit = body_normalised(b, "metric", operands[0][1])
    a, other = b.slice(unit, 1, first_a, until, 2), b.slice(unit, 1, first_b, until, 2)
    scores = b("MatMul", a, b.permute(other, [0, 2, 1]))
    best, partner = body_best(b, scores)
    ranking = body_sorted(b, best, largest=True)[1]
    removed, stay = b.slice(ranking, 1, 0, gone), b.slice(ranking, 1, gone)
    if prefix > 0 and attrs["order"] == "published":
        stay = body_sorted(b, stay, largest=False)[0]
    two = b.constant(2)
    line = b.count(count)
    positions = b("Expand", line, b.join(batch, count))
    keep = b("Add", b("Mul", stay, two), b.constant(first_a))
    parts = [b.slice(positions, 1, 0, prefix)] if prefix else []
    parts += [keep, b.slice(positions, 1, first_b, until, 2)]
    parts += [b.slice(positions, 1, -suffix)] if suffix else []
    keep = b("Concat", *parts, axis=1)
    if attrs["order"] == "original":
        keep = body_sorted(b, keep, largest=False)[0]
    source = b("Add", b("Mul", removed, two), b.constant(first_a))
    target = b("Add", b("Mul", b("GatherElements", partner, removed, axis=1), two), b.constant(first_b))
    places = b.slice(positions, 1, 0, b("Sub", count, gone))
    keep = b("Where", b("Equal", gone, b.constant(0)), places, keep)
    slot = b("ScatterElements", positions, keep, places, axis=1)
    slot = b("ScatterElements", slot, source, b("GatherElements", slot, target, axis=1), axis=1)
    return [b.cast(x, INT32) for x in (slot, keep, source)]


OP = OpDef(
    name="match_tokens",
    summary="Bipartite soft matching: the r most similar pairs of an even and an odd token merge.",
    inputs=("metric",),
    outputs=("slot", "keep", "source"),
    attrs=BUDGET,
    reference=match_tokens,
    opaque_shapes=True,
    shapes=lambda shapes, attrs: map_shapes(shapes[0], _gone(shapes, attrs)),
    dtypes=lambda dtypes, attrs: ["int32"] * 3,
    body=_body,
    custom={0: FLOATS},
    work=matching_work,
    traffic=_traffic,
    chooses=True,
    source="Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023",
)
