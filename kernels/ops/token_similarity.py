"""distinct_tokens, contextual_tokens, absorb_tokens: what similarity of keys says about tokens that may be dropped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..body import FLOAT, INT32, Body
from ..definition import Attr, OpDef
from ..layout import body_take_rows, take
from ..lengths import Shape
from .match_tokens import UNLIKE, body_normalised, body_sorted, normalised


def distinct_tokens(metric: Tensor) -> Tensor:
    """metric [T, P, D] -> float32 [T, P], 0 ... 2: one less the mean cosine similarity to all tokens of the row.

    The mean is a product with the sum of all unit vectors: O(P D), no P x P matrix."""
    unit = normalised(metric)
    return 1.0 - (unit @ unit.mean(1).unsqueeze(-1)).squeeze(-1).clamp(max=1.0)


def _distinct_body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    unit = body_normalised(b, "metric", operands[0][1])
    centre = b("ReduceMean", unit, b.constant([1]), keepdims=0)
    mean = b.squeeze(b("MatMul", unit, b.unsqueeze(centre, 2)), 2)
    one = b.constant(1.0, FLOAT)
    return [b("Sub", one, b("Min", mean, one))]


def contextual_tokens(
    metric: Tensor, flags: Tensor, *, count: int, kept: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """metric [T, P, D], flags [T, P] (`kept` of them not 0 in every row) -> a merging map and new flags.

    slot [T, P], keep [T, K], source [T, P-K] int32 with K = kept + count; flags [T, P] float32. Of the P - kept tokens
    that are left over, every floor((P - kept) / count)-th becomes a target, `count` of them; each other one goes to the
    target of highest cosine similarity, the first among equals. Slots are in the order of the tokens."""
    rows, length = flags.shape
    places = torch.arange(length, device=flags.device).expand(rows, length)
    dominant = flags != 0
    rest = torch.sort(torch.where(dominant, places + length, places), dim=1).values[:, : length - kept]
    stride = max((length - kept) // max(count, 1), 1)
    targets = rest[:, : stride * count : stride]  # [T, count]
    chosen = torch.zeros_like(flags).scatter(1, targets, 1.0)
    new = torch.where(dominant, flags, chosen)
    keys = torch.where(new != 0, places, places + length)
    order = torch.sort(keys, dim=1).values
    keep, source = order[:, : kept + count], order[:, kept + count :] - length
    unit = normalised(metric)
    best = (take(unit, source, 1, 0) @ take(unit, targets, 1, 0).transpose(1, 2)).argmax(-1)
    slot = torch.zeros_like(places).scatter(1, keep, places[:, : kept + count])
    home = torch.gather(slot, 1, torch.gather(targets, 1, best))
    slot = slot.scatter(1, source, home)
    return slot.int(), keep.int(), source.int(), new


def _contextual_shapes(shapes: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    rows, length = shapes[1]
    left = attrs["kept"] + attrs["count"]
    return [(rows, length), (rows, left), (rows, length - left), (rows, length)]


def _contextual_body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    kept, count = attrs["kept"], attrs["count"]
    length = b.length("flags", 1)
    shape = b("Shape", "flags")
    places = b("Expand", b.count(length), shape)
    dominant = b("Not", b("Equal", "flags", b.constant(0.0, FLOAT)))
    later = b("Add", places, length)
    rest = body_sorted(b, b("Where", dominant, later, places), largest=False)[0]
    left = b("Sub", length, b.constant([kept]))
    stride = b("Max", b("Div", left, b.constant([max(count, 1)])), b.constant([1]))
    # Slice takes no computed step for what follows in every runtime: the places are gathered instead.
    steps = b("Mul", b.count(b.constant([count])), stride)
    targets = b("Gather", rest, steps, axis=1)
    ones = b("Expand", b.constant(1.0, FLOAT), b("Shape", targets))
    chosen = b("ScatterElements", b("Mul", "flags", b.constant(0.0, FLOAT)), targets, ones, axis=1)
    new = b("Where", dominant, "flags", chosen)
    order = body_sorted(b, b("Where", b("Equal", new, b.constant(0.0, FLOAT)), later, places), largest=False)[
        0
    ]
    keep = b.slice(order, 1, 0, kept + count)
    source = b("Sub", b.slice(order, 1, kept + count), length)
    unit = body_normalised(b, "metric", operands[0][1])
    similar = b(
        "MatMul", body_take_rows(b, unit, source), b.permute(body_take_rows(b, unit, targets), [0, 2, 1])
    )
    best = b("ArgMax", similar, axis=2, keepdims=0)
    slot = b("ScatterElements", places, keep, b.slice(places, 1, 0, kept + count), axis=1)
    home = b("GatherElements", slot, b("GatherElements", targets, best, axis=1), axis=1)
    slot = b("ScatterElements", slot, source, home, axis=1)
    return [*(b.cast(x, INT32) for x in (slot, keep, source)), new]


def absorb_tokens(
    x: Tensor, metric: Tensor, score: Tensor, flags: Tensor, *, kept: int, neighbours: int = 32
) -> Tensor:
    """x [T, P, C], metric [T, P, D], score and flags [T, P] (`kept` flags are 1) -> y [T, P, C].

    A kept token becomes the mean of itself and its `neighbours` nearest others by cosine of metric (kept ones too, but
    none whose flag is -1), weighted by score; the other rows stay as they are. The published sum is not normalised,
    which only scales."""
    length = flags.shape[1]
    places = torch.arange(length, device=flags.device).expand(flags.shape)
    keep = torch.sort(torch.where(flags > 0, places, places + length), dim=1).values[:, :kept]
    unit = normalised(metric)
    similar = take(unit, keep, 1, 0) @ unit.transpose(1, 2)  # [T, K, P]
    other = (keep.unsqueeze(-1) != places.unsqueeze(1)) & (flags >= 0).unsqueeze(1)
    similar = torch.where(other, similar, UNLIKE)
    near = torch.sort(similar, dim=-1, descending=True, stable=True).indices[:, :, :neighbours]
    weight = score.float().clamp(min=0)
    share = torch.zeros_like(similar).scatter(
        2, near, torch.gather(weight.unsqueeze(1).expand_as(similar), 2, near)
    )
    share = torch.where(other, share, 0.0)
    own = torch.gather(weight, 1, keep).unsqueeze(-1)
    total = (share.sum(-1, keepdim=True) + own).clamp(min=1e-30)
    wide = x.float()
    mean = (share @ wide + own * take(wide, keep, 1, 0)) / total
    return x.scatter(1, keep.unsqueeze(-1).expand_as(mean), mean.to(x.dtype))


def _absorb_body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    dtype, kept = operands[0][1], attrs["kept"]
    length = b.length("flags", 1)
    places = b("Expand", b.count(length), b("Shape", "flags"))
    keys = b("Where", b("Greater", "flags", b.constant(0.0, FLOAT)), places, b("Add", places, length))
    keep = b.slice(body_sorted(b, keys, largest=False)[0], 1, 0, kept)
    unit = body_normalised(b, "metric", operands[1][1])
    similar = b("MatMul", body_take_rows(b, unit, keep), b.permute(unit, [0, 2, 1]))
    same = b("Equal", b.unsqueeze(keep, 2), b.unsqueeze(places, 1))
    asked = b.unsqueeze(b("GreaterOrEqual", "flags", b.constant(0.0, FLOAT)), 1)
    other = b("And", b("Not", same), asked)
    similar = b("Where", other, similar, b.constant(UNLIKE, FLOAT))
    most = b("Min", b.constant([attrs["neighbours"]]), length)
    flat = b.reshape(similar, -1, length)  # [T K, P]: sorting and scattering along the last of two axes
    near = b.many("TopK", [flat, most], 2, axis=1, largest=1, sorted=1)[1]
    weight = b("Max", b.cast("score", FLOAT), b.constant(0.0, FLOAT))
    spread = b.reshape(b("Expand", b.unsqueeze(weight, 1), b("Shape", similar)), -1, length)
    nought = b("Mul", flat, b.constant(0.0, FLOAT))
    share = b("ScatterElements", nought, near, b("GatherElements", spread, near, axis=1), axis=1)
    share = b("Reshape", share, b("Shape", similar))
    share = b("Where", other, share, b.constant(0.0, FLOAT))
    own = b.unsqueeze(b("GatherElements", weight, keep, axis=1), 2)
    total = b("Add", b("ReduceSum", share, b.constant([2]), keepdims=1), own)
    wide = "x" if dtype == FLOAT else b.cast("x", FLOAT)
    added = b("Add", b("MatMul", share, wide), b("Mul", own, body_take_rows(b, wide, keep)))
    mean = b("Div", added, b("Max", total, b.constant(1e-30, FLOAT)))
    mean = mean if dtype == FLOAT else b.cast(mean, dtype)
    home = b.cast(b("Equal", b.unsqueeze(places, 2), b.unsqueeze(keep, 1)), dtype)  # [T, P, K]
    kept_rows = b.unsqueeze(b("Greater", "flags", b.constant(0.0, FLOAT)), 2)
    return [b("Where", kept_rows, b("MatMul", home, mean), "x")]


def mean_channels(x: Tensor) -> Tensor:
    """x [..., C] -> float32 [..., 1], the mean over the last axis."""
    return x.float().mean(-1, keepdim=True)


DISTINCT = OpDef(
    name="distinct_tokens",
    summary="How unlike the others each token is: one less its mean cosine similarity to all.",
    inputs=("metric",),
    outputs=("score",),
    reference=distinct_tokens,
    shapes=lambda shapes, attrs: [(shapes[0][0], shapes[0][1])],
    dtypes=lambda dtypes, attrs: ["float32"],
    body=_distinct_body,
    work=lambda shapes, attrs: shapes[0][0] * shapes[0][1] * (6 * shapes[0][2] + 2),
)
CONTEXTUAL = OpDef(
    name="contextual_tokens",
    summary="Of the tokens that are not kept, every n-th takes in those that are most like it.",
    inputs=("metric", "flags"),
    outputs=("slot", "keep", "source", "new_flags"),
    attrs=(Attr("count"), Attr("kept")),
    reference=contextual_tokens,
    opaque_shapes=True,
    shapes=_contextual_shapes,
    dtypes=lambda dtypes, attrs: ["int32"] * 3 + ["float32"],
    body=_contextual_body,
    work=lambda shapes, attrs: 2 * shapes[0][0] * shapes[0][1] * shapes[0][2] * (attrs["count"] + 2),
    chooses=True,
    source="Yang et al., VisionZip, CVPR 2025",
)
ABSORB = OpDef(
    name="absorb_tokens",
    summary="Kept tokens become the mean of themselves and their nearest others, weighted by score.",
    inputs=("x", "metric", "score", "flags"),
    outputs=("y",),
    attrs=(Attr("kept"), Attr("neighbours", 32)),
    reference=absorb_tokens,
    shapes=lambda shapes, attrs: [tuple(shapes[0])],
    dtypes=lambda dtypes, attrs: [dtypes[0] or "float32"],
    body=_absorb_body,
    work=lambda shapes, attrs: (
        2 * shapes[0][0] * shapes[0][1] * attrs["kept"] * (shapes[0][2] + shapes[1][2])
    ),
    source="Shang et al., LLaVA-PruMerge, ICCV 2025",
)
CHANNELS = OpDef(
    name="mean_channels",
    summary="The mean over the last axis, which stays with length 1.",
    inputs=("x",),
    outputs=("mean",),
    reference=mean_channels,
    shapes=lambda shapes, attrs: [(*shapes[0][:-1], 1)],
    dtypes=lambda dtypes, attrs: ["float32"],
    body=lambda b, operands, attrs: [b("ReduceMean", b.cast("x", FLOAT), b.constant([-1]), keepdims=1)],
    work=lambda shapes, attrs: shapes[0][0],
)
