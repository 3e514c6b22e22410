"""rms_norm, add_rms_norm: the norm in front of a product, with the residual addition that most of them follow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..body import FLOAT, Body
from ..definition import Attr, OpDef
from ..lengths import Shape, numel

SOURCE = "Zhang and Sennrich, Root Mean Square Layer Normalization, NeurIPS 2019"


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """x [..., c], weight [c] -> x / sqrt(mean(x^2) + eps) * weight over the last axis, as x; computed in float32."""
    wide = x.float()
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (unit * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """x, residual [..., c], weight [c] -> rms_norm(x + residual), x + residual. x and residual have one shape."""
    total = x + residual
    return rms_norm(total, weight, eps=eps), total


def _write(b: Body, x: str, dtype: int, attrs: dict[str, Any]) -> str:
    wide = x if dtype == FLOAT else b.cast(x, FLOAT)
    mean = b("ReduceMean", b("Pow", wide, b.constant(2, FLOAT)), b.constant([-1]))
    unit = b("Div", wide, b("Sqrt", b("Add", mean, b.constant(attrs["eps"], FLOAT))))
    out = b("Mul", unit, b.cast("weight", FLOAT))
    return out if dtype == FLOAT else b.cast(out, dtype)


def _body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    return [_write(b, "x", operands[0][1], attrs)]


def _add_body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    total = b("Add", "x", "residual")
    return [_write(b, total, operands[0][1], attrs), total]


def _alone(shapes: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    return [tuple(shapes[0])]


def _both(shapes: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    return [tuple(shapes[0])] * 2


NORM = OpDef(
    name="rms_norm",
    summary="x / sqrt(mean(x²) + eps) · weight over the last axis.",
    inputs=("x", "weight"),
    outputs=("out",),
    attrs=(Attr("eps", 1e-6),),
    mixes=1,
    same_bits=True,
    reference=rms_norm,
    shapes=_alone,
    dtypes=lambda dtypes, attrs: [dtypes[0] or "float32"],
    body=_body,
    custom={0: (FLOAT,)},
    work=lambda shapes, attrs: 4 * numel(shapes[0]),
    source=SOURCE,
)

ADD_NORM = OpDef(
    name="add_rms_norm",
    summary="A residual sum and its norm.",
    inputs=("x", "residual", "weight"),
    outputs=("out", "total"),
    attrs=(Attr("eps", 1e-6),),
    mixes=1,
    same_bits=True,
    reference=add_rms_norm,
    shapes=_both,
    dtypes=lambda dtypes, attrs: [dtypes[0] or "float32"] * 2,
    body=_add_body,
    custom={0: (FLOAT,)},
    work=lambda shapes, attrs: 5 * numel(shapes[0]),
    source=SOURCE,
)
