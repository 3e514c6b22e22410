"""pool_tokens: a mean or sum over the tokens in which a merged token counts as often as tokens went into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..body import FLOAT, Body
from ..definition import Attr, OpDef
from ..layout import check_axes
from ..lengths import Shape, numel

MODES = ("mean", "sum")


def pool_tokens(
    x: Tensor, size: Tensor, *, axis: int, batch_axis: int = 0, keepdim: bool = False, mode: str = "mean"
) -> Tensor:
    """x with N tokens along `axis`, size [B or 1, N] -> the sum of size * x, divided by the sum of size for "mean".

    Accumulated in float32 at least; the result has x's dtype. batch_axis -1: x has no batch axis."""
    _check(x.dim(), axis, batch_axis, mode)
    wide = torch.float32 if x.element_size() < 4 else x.dtype
    shape = [1] * x.dim()
    shape[axis] = size.shape[1]
    weight = size.to(wide)
    if batch_axis >= 0:
        shape[batch_axis] = size.shape[0]
        weight = weight.t() if axis < batch_axis else weight
    weight = weight.reshape(shape)
    # Padding may hold anything, and 0 * inf is no 0.
    total = torch.where(weight > 0, x.to(wide) * weight, 0).sum(axis, keepdim=keepdim)
    if mode == "mean":
        total = total / weight.sum(axis, keepdim=keepdim).clamp(min=1e-12)
    return total.to(x.dtype)


def _check(rank: int, axis: int, batch_axis: int, mode: str) -> None:
    check_axes("pool_tokens", rank, axis, batch_axis)
    if mode not in MODES:
        raise ValueError(f"pool_tokens: mode is one of {MODES}, not {mode!r}")


def _shapes(shapes: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    shape, axis = list(shapes[0]), attrs["axis"]
    batch = attrs["batch_axis"]
    if batch >= 0 and shape[batch] == 1:
        shape[batch] = shapes[1][0]
    return [tuple(shape[:axis] + ([1] if attrs["keepdim"] else []) + shape[axis + 1 :])]


def _body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    (rank, dtype), axis, batch = operands[0], attrs["axis"], attrs["batch_axis"]
    _check(rank, axis, batch, attrs["mode"])
    x = "x" if dtype == FLOAT else b.cast("x", FLOAT)
    size = b.permute("size", [1, 0]) if 0 <= axis < batch else "size"
    parts: list[str | int] = [1] * rank
    parts[axis] = b.length("size", 1)
    if batch >= 0:
        parts[batch] = b.length("size", 0)
    weight = b.reshape(size, *parts)
    axes, keep = b.constant([axis]), int(attrs["keepdim"])
    zero = b.constant(0.0, FLOAT)
    weighted = b("Where", b("Greater", weight, zero), b("Mul", x, weight), zero)
    total = b("ReduceSum", weighted, axes, keepdims=keep)
    if attrs["mode"] == "mean":
        count = b("ReduceSum", weight, axes, keepdims=keep)
        total = b("Div", total, b("Max", count, b.constant(1e-12, FLOAT)))
    return [total if dtype == FLOAT else b.cast(total, dtype)]


OP = OpDef(
    name="pool_tokens",
    summary="Mean or sum over the tokens, weighted by size.",
    inputs=("x", "size"),
    outputs=("pooled",),
    attrs=(Attr("axis"), Attr("batch_axis", 0), Attr("keepdim", False), Attr("mode", "mean")),
    reference=pool_tokens,
    shapes=_shapes,
    dtypes=lambda dtypes, attrs: [dtypes[0] or "float32"],
    body=_body,
    work=lambda shapes, attrs: 2 * numel(shapes[0]),
)
