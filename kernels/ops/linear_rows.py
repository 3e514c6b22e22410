"""linear_rows: a product whose rows come out with the same bits however many there are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..body import FLOAT, FLOATS, Body
from ..definition import OpDef
from ..lengths import numel
from .linear_nbits import product_work, shapes


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., k], weight [n, k] of any float type, bias [n] -> [..., n], as x. Sums are float32.

    A kernel adds the terms of an output in an order that does not depend on the number of rows; the reference
    promises that only up to rounding."""
    bias = None if bias is None else bias.to(torch.float32)
    return torch.nn.functional.linear(x.to(torch.float32), weight.to(torch.float32), bias).to(x.dtype)


def _body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    x, weight = ("x", "weight")
    if operands[0][1] != FLOAT:
        x = b.cast(x, FLOAT)
    if operands[1][1] != FLOAT:
        weight = b.cast(weight, FLOAT)
    out = b("MatMul", x, b.permute(weight, [1, 0]))
    if operands[2] is not None:
        out = b("Add", out, b.cast("bias", FLOAT))
    return [out if operands[0][1] == FLOAT else b.cast(out, operands[0][1])]


OP = OpDef(
    name="linear_rows",
    summary="A product that gives a row the same bits among any number of rows.",
    inputs=("x", "weight", "bias?"),
    outputs=("out",),
    mixes=1,
    same_bits=True,
    reference=linear_rows,
    shapes=shapes,
    dtypes=lambda dtypes, attrs: [dtypes[0] or "float32"],
    body=_body,
    custom={0: FLOATS, 1: FLOATS, 2: (FLOAT,)},
    work=product_work,
    traffic=lambda given, attrs: sum(numel(s) for s in [*given, *shapes(given, attrs)]),
)
