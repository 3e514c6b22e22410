"""tile_budgets: how the tokens of an image are shared out among the whole picture and its tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from ..body import FLOAT, INT32, INT64, Body
from ..definition import Attr, OpDef
from ..lengths import Shape, floor_of, fraction
from .match_tokens import body_sorted

DOUBLE = int(TensorProto.DOUBLE)


def tile_budgets(
    row: Tensor,
    *,
    rows: int,
    columns: int,
    height: int,
    width: int,
    budget: int,
    prefix: int = 0,
    alpha: float = 0.5,
    published: bool = False,
) -> Tensor:
    """row [T, N], attention of the class token in an early layer -> counts int32 [T].

    T is a multiple of 1 + rows * columns: of each image the whole picture, then its tiles in raster order. Behind
    `prefix` tokens stand height * width = P patches. The whole picture gets floor(alpha * budget); the tiles share the
    rest by what the whole picture's row has in the region of each (a patch belongs to the tile of its centre), by
    largest remainder, at most P each; what is cut off goes to the others, so that the budget is spent.

    published: as the code of HiRED does it. A tile counts its patches among the floor((1 - alpha) P) best ones, regions
    are runs of consecutive patches, and floors and the limit P leave some of the budget unused."""
    tiles, patches = rows * columns, height * width
    whole = row[:: tiles + 1, prefix : prefix + patches].double()
    regions = torch.from_numpy(_regions(rows, columns, height, width, published)).to(row.device)
    first = min(patches, floor_of(budget, alpha))
    if published:
        order = torch.sort(whole, dim=1, descending=True, stable=True).indices[:, : _best(patches, alpha)]
        votes = torch.zeros_like(whole).scatter(1, order, 1.0) @ regions
        total = votes.sum(1, keepdim=True).clamp(min=1)
        shares = torch.floor((budget - floor_of(budget, alpha)) * votes / total).clamp(max=patches)
    else:
        rest = min(budget - first, tiles * patches)
        first = budget - rest
        shares = _shared(whole.clamp(min=0) @ regions, rest, patches, tiles)
    own = torch.full_like(shares[:, :1], first)
    return torch.cat([own, shares], 1).flatten().int()


def _regions(rows: int, columns: int, height: int, width: int, strips: bool) -> np.ndarray:
    """float64 [P, tiles]: 1 where a patch belongs to a tile."""
    if strips:
        tile = np.arange(height * width) * (rows * columns) // (height * width)
    else:
        y = (2 * np.arange(height) + 1) * rows // (2 * height)
        x = (2 * np.arange(width) + 1) * columns // (2 * width)
        tile = (y[:, None] * columns + x).ravel()
    return np.eye(rows * columns)[tile]


def _shared(weight: Tensor, total: int, most: int, tiles: int) -> Tensor:
    """float64 [n, tiles] of whole numbers that add up to `total`, none above `most`."""
    fixed = torch.zeros_like(weight)
    open_ = torch.ones_like(weight)

    def quotas() -> tuple[Tensor, Tensor]:
        left = total - fixed.sum(1, keepdim=True)
        mine = weight * open_
        mine = torch.where(mine.sum(1, keepdim=True) > 0, mine, open_)
        return left, left * mine / mine.sum(1, keepdim=True).clamp(min=1e-300)

    for _ in range(tiles):
        full = open_ * (quotas()[1] >= most)
        fixed = fixed + full * most
        open_ = open_ - full
    left, quota = quotas()
    low = torch.floor(quota + 1e-9)
    missing = left - low.sum(1, keepdim=True)
    part = torch.where(open_ > 0, torch.round((quota - low) * 1e9), -1.0)  # rounding makes no order of equals
    order = torch.sort(part, dim=1, descending=True, stable=True).indices
    places = torch.arange(weight.shape[1], device=weight.device).expand_as(order)
    rank = torch.zeros_like(order).scatter(1, order, places)
    return fixed + low + (rank < missing)


def _body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    rows, columns, height, width = (attrs[name] for name in ("rows", "columns", "height", "width"))
    budget, alpha, tiles, patches = attrs["budget"], attrs["alpha"], rows * columns, height * width
    prefix, published = attrs["prefix"], attrs["published"]
    whole = b.slice(b.slice("row", 0, 0, None, tiles + 1), 1, prefix, prefix + patches)
    whole = b.cast(whole, DOUBLE)
    regions = b.constant(_regions(rows, columns, height, width, published), DOUBLE)
    first = min(patches, floor_of(budget, alpha))
    zero, one = b.constant(0.0, DOUBLE), b.constant(1.0, DOUBLE)
    if published:
        best = _best(patches, alpha)
        order = b.slice(body_sorted(b, b.cast(whole, FLOAT), largest=True)[1], 1, 0, best)
        ones = b("Expand", one, b("Shape", order))
        votes = b("MatMul", b("ScatterElements", b("Mul", whole, zero), order, ones, axis=1), regions)
        total = b("Max", b("ReduceSum", votes, b.constant([1]), keepdims=1), one)
        rest = b.constant(float(budget - floor_of(budget, alpha)), DOUBLE)
        shares = b(
            "Min", b("Floor", b("Div", b("Mul", rest, votes), total)), b.constant(float(patches), DOUBLE)
        )
    else:
        spent = min(budget - first, tiles * patches)
        first = budget - spent
        shares = _body_shared(b, b("MatMul", b("Max", whole, zero), regions), spent, patches, tiles)
    own = b("Expand", b.constant(float(first), DOUBLE), b.join(b.length(shares, 0), 1))
    return [b.cast(b("Reshape", b("Concat", own, shares, axis=1), b.constant([-1])), INT32)]


def _body_shared(b: Body, weight: str, total: int, most: int, tiles: int) -> str:
    zero, one = b.constant(0.0, DOUBLE), b.constant(1.0, DOUBLE)
    along = b.constant([1])
    fixed = b("Mul", weight, zero)
    open_ = b("Add", fixed, one)

    def quotas() -> tuple[str, str]:
        left = b("Sub", b.constant(float(total), DOUBLE), b("ReduceSum", fixed, along, keepdims=1))
        mine = b("Mul", weight, open_)
        some = b("Greater", b("ReduceSum", mine, along, keepdims=1), zero)
        mine = b("Where", some, mine, open_)
        whole = b("Max", b("ReduceSum", mine, along, keepdims=1), b.constant(1e-300, DOUBLE))
        return left, b("Div", b("Mul", left, mine), whole)

    for _ in range(tiles):
        quota = quotas()[1]
        full = b("Mul", open_, b.cast(b("GreaterOrEqual", quota, b.constant(float(most), DOUBLE)), DOUBLE))
        fixed = b("Add", fixed, b("Mul", full, b.constant(float(most), DOUBLE)))
        open_ = b("Sub", open_, full)
    left, quota = quotas()
    low = b("Floor", b("Add", quota, b.constant(1e-9, DOUBLE)))
    missing = b("Sub", left, b("ReduceSum", low, along, keepdims=1))
    remainder = b("Round", b("Mul", b("Sub", quota, low), b.constant(1e9, DOUBLE)))
    part = b("Where", b("Greater", open_, zero), remainder, b.constant(-1.0, DOUBLE))
    order = body_sorted(b, part, largest=True)[1]
    places = b("Expand", b.count(b.length(order, 1)), b("Shape", order))
    rank = b("ScatterElements", order, order, places, axis=1)
    more = b.cast(b("Less", rank, b.cast(missing, INT64)), DOUBLE)
    return b("Add", b("Add", fixed, low), more)


def _best(patches: int, alpha: float) -> int:
    """floor((1 - alpha) * patches)."""
    share = 1 - fraction(alpha)
    return patches * share.numerator // share.denominator


def _shapes(shapes: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    return [(shapes[0][0],)]


OP = OpDef(
    name="tile_budgets",
    summary="How many tokens each picture of an image keeps: the whole and its tiles share a budget.",
    inputs=("row",),
    outputs=("counts",),
    attrs=(
        *(Attr(name) for name in ("rows", "columns", "height", "width", "budget")),
        Attr("prefix", 0),
        Attr("alpha", 0.5),
        Attr("published", False),
    ),
    reference=tile_budgets,
    opaque_shapes=True,
    shapes=_shapes,
    dtypes=lambda dtypes, attrs: ["int32"],
    body=_body,
    work=lambda shapes, attrs: 2 * shapes[0][0] * shapes[0][1],
    chooses=True,
    source="Arif et al., HiRED, AAAI 2025; two-dimensional regions and largest remainders are ours",
)
