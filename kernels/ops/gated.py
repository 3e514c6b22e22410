"""gated: what a gated feed-forward layer does between its products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..body import FLOAT, Body
from ..definition import Attr, OpDef
from ..lengths import Shape, divide, numel

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def check_function(fn: str) -> None:
    """Raises ValueError for a function that `gated` does not know."""
    if fn not in FUNCTIONS:
        raise ValueError(f"gated: fn is one of {', '.join(FUNCTIONS)}, not {fn!r}")


def gated(x: Tensor, y: Tensor | None = None, *, fn: str = "silu") -> Tensor:
    """fn(x) * y of two tensors of one shape; without y, x [..., 2 F] is x and y side by side -> [..., F].

    fn: silu, gelu (by the error function), gelu_tanh, quick_gelu, relu, sigmoid or tanh. Computed in float32, in
    x's type."""
    check_function(fn)
    gate, up = x.chunk(2, -1) if y is None else (x, y)
    return (FUNCTIONS[fn](gate.float()) * up.float()).to(x.dtype)


def _shapes(shapes: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    x, y = shapes
    return [tuple(x) if y is not None else (*x[:-1], divide(x[-1], 2))]


def _body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    check_function(attrs["fn"])
    (rank, dtype), y = operands
    gate, up = ("x", "y") if y is not None else b.many("Split", ["x"], 2, axis=rank - 1, num_outputs=2)
    if dtype != FLOAT:
        gate, up = b.cast(gate, FLOAT), b.cast(up, FLOAT)
    out = b("Mul", _function(b, gate, attrs["fn"]), up)
    return [out if dtype == FLOAT else b.cast(out, dtype)]


def _function(b: Body, x: str, fn: str) -> str:
    def number(value: float) -> str:
        return b.constant(value, FLOAT)

    if fn in ("relu", "sigmoid", "tanh"):
        return b({"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}[fn], x)
    if fn == "silu":
        return b("Mul", x, b("Sigmoid", x))
    if fn == "quick_gelu":
        return b("Mul", x, b("Sigmoid", b("Mul", x, number(1.702))))
    if fn == "gelu":
        inner = b("Erf", b("Mul", x, number(0.5**0.5)))
    else:
        cube = b("Mul", b("Mul", x, x), x)
        inner = b(
            "Tanh", b("Mul", b("Add", x, b("Mul", cube, number(0.044715))), number((2 / torch.pi) ** 0.5))
        )
    return b("Mul", b("Mul", x, number(0.5)), b("Add", inner, number(1.0)))


OP = OpDef(
    name="gated",
    summary="An activation of one half times the other: fn(x) · y.",
    inputs=("x", "y?"),
    outputs=("out",),
    attrs=(Attr("fn", "silu"),),
    mixes=1,
    same_bits=True,
    reference=gated,
    shapes=_shapes,
    dtypes=lambda dtypes, attrs: [dtypes[0] or "float32"],
    body=_body,
    custom={0: (FLOAT,)},
    work=lambda shapes, attrs: 10 * numel(_shapes(shapes, attrs)[0]),
    source="Shazeer, GLU Variants Improve Transformer, 2020",
)
