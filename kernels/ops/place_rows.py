"""place_rows: numbers of rows at the places of a mask, as a masked scatter puts the rows themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..body import FLOAT, INT64, Body
from ..definition import Attr, OpDef


def place_rows(where: Tensor, numbers: Tensor, *, outside: float = -1.0) -> Tensor:
    """where bool [B, N], numbers float32 [P] -> float32 [B, N]: the i-th true place, row after row, has number i (the
    last one where there are fewer numbers), a false one `outside`."""
    rank = torch.cumsum(where.reshape(-1).long(), 0) - 1
    found = numbers.float()[rank.clamp(min=0, max=numbers.shape[0] - 1)].reshape(where.shape)
    return torch.where(where, found, outside)


def _body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    line = b("Reshape", b.cast("where", INT64), b.constant([-1]))
    rank = b("Sub", b("CumSum", line, b.constant(0)), b.constant(1))
    last = b("Sub", b.length("numbers", 0), b.constant([1]))
    place = b("Min", b("Max", rank, b.constant(0)), last)
    found = b("Reshape", b("Gather", b.cast("numbers", FLOAT), place, axis=0), b("Shape", "where"))
    return [b("Where", "where", found, b.constant(attrs["outside"], FLOAT))]


OP = OpDef(
    name="place_rows",
    summary="The i-th true place of a mask gets number i, every other place a constant.",
    inputs=("where", "numbers"),
    outputs=("placed",),
    attrs=(Attr("outside", -1.0),),
    reference=place_rows,
    shapes=lambda shapes, attrs: [tuple(shapes[0])],
    dtypes=lambda dtypes, attrs: ["float32"],
    body=_body,
    work=lambda shapes, attrs: 2 * shapes[0][0] * shapes[0][1],
)
