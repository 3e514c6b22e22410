"""valid_size: an attention mask as token sizes, 1 for a token and 0 for padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..body import BOOL, FLOAT, Body
from ..definition import Attr, OpDef
from ..layout import check_axes
from ..lengths import Shape, numel

THRESHOLD = -1e4
"""An additive mask entry above this attends; maskers write -inf, the dtype's minimum, or -1e4."""


def valid_size(mask: Tensor, *, axis: int, batch_axis: int = -1) -> Tensor:
    """mask [..., N] bool (True attends), additive or 0/1 integers -> [B or 1, N] float32.

    1.0 where any entry over all other axes attends. batch_axis -1: the result has batch 1."""
    check_axes("valid_size", mask.dim(), axis, batch_axis)
    attends = mask > THRESHOLD if mask.is_floating_point() else mask != 0
    others = [a for a in range(mask.dim()) if a not in (axis, batch_axis)]
    if others:
        attends = torch.any(attends, dim=others)
    if batch_axis < 0:
        attends = attends.unsqueeze(0)
    elif axis < batch_axis:
        attends = attends.t()
    return attends.to(torch.float32)


def _shapes(shapes: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    mask, batch = shapes[0], attrs["batch_axis"]
    return [(1 if batch < 0 else mask[batch], mask[attrs["axis"]])]


def _body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    (rank, dtype), axis, batch = operands[0], attrs["axis"], attrs["batch_axis"]
    check_axes("valid_size", rank, axis, batch)
    others = [a for a in range(rank) if a not in (axis, batch)]
    if dtype not in (BOOL, 6, 7):
        # The largest of a key's entries says it; comparing all of a wide mask would take three times as long.
        largest = b.cast("mask", FLOAT)
        if others:
            largest = b("ReduceMax", largest, b.constant(others), keepdims=0)
        mask, others = b.cast(b("Greater", largest, b.constant(THRESHOLD, FLOAT)), FLOAT), []
    elif dtype == BOOL:
        mask = b.cast("mask", FLOAT)
    else:
        mask = b.cast(b("Not", b("Equal", "mask", b.constant(0, dtype))), FLOAT)
    if others:
        mask = b("ReduceMax", mask, b.constant(others), keepdims=0)
    if batch < 0:
        mask = b.unsqueeze(mask, 0)
    elif axis < batch:
        mask = b.permute(mask, [1, 0])
    return [mask]


OP = OpDef(
    name="valid_size",
    summary="A mask over keys as sizes: 1.0 where any entry over the other axes attends, else 0.0.",
    inputs=("mask",),
    outputs=("size",),
    attrs=(Attr("axis"), Attr("batch_axis", -1)),
    reference=valid_size,
    shapes=_shapes,
    dtypes=lambda dtypes, attrs: ["float32"],
    body=_body,
    work=lambda shapes, attrs: numel(shapes[0]),
)
