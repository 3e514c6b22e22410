"""embedding_nbits: rows of a table of 4 or 8 bits, which may be the weight of `linear_nbits` as well."""

from __future__ import annotations

from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from ..body import FLOAT, INT32, UINT8, Body
from ..definition import Attr, OpDef
from ..lengths import Shape, numel
from .linear_nbits import check, dequantize

DTYPES = {"float32": FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
"""What rows may be given as."""


def embedding_nbits(
    ids: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    bits: int,
    group: int,
    width: int,
    dtype: str = "float32",
) -> Tensor:
    """ids [...] int64 or int32, weight uint8 [v, g, group * bits / 8], scales [v, g] -> [..., width] of `dtype`.

    weight, scales and zeros as `linear_nbits` has them, the vocabulary in place of the output channels. Negative ids
    count from the end."""
    groups = weight.shape[1]
    if dtype not in DTYPES:
        raise ValueError(f"embedding_nbits: dtype is one of {', '.join(DTYPES)}, not {dtype}")
    check("embedding_nbits", bits, group, 0, width, 0, weight.shape[0])
    if not (groups - 1) * group < width <= groups * group:
        raise ValueError(f"embedding_nbits: rows of {groups} groups of {group} do not hold {width}")
    flat = ids.flatten().to(torch.int64)
    flat = torch.where(flat < 0, flat + weight.shape[0], flat)
    rows = [None if x is None else x.index_select(0, flat) for x in (weight, scales, zeros)]
    assert rows[0] is not None and rows[1] is not None
    w = dequantize(rows[0], rows[1], rows[2], bits=bits, width=width)
    return w.to(getattr(torch, dtype)).reshape(*ids.shape, width)


def _shapes(shapes: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    return [(*shapes[0], attrs["width"])]


def _traffic(shapes: list[Any], attrs: dict[str, Any]) -> Any:
    """The rows that are read and written; never the whole table."""
    out = numel(_shapes(shapes, attrs)[0])
    return out + out * attrs["bits"] // 32 + 2 * numel(shapes[0])


def _body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    rank, zeros, bits = operands[0][0], operands[3], attrs["bits"]
    q = b.cast(b("Gather", "weight", "ids", axis=0), INT32)
    if bits == 4:
        sixteen = b.constant(16, INT32)
        high = b("Div", q, sixteen)
        low = b("Sub", q, b("Mul", high, sixteen))
        halves = b("Concat", b.unsqueeze(low, rank + 2), b.unsqueeze(high, rank + 2), axis=rank + 2)
        q = b.reshape(halves, *[0] * (rank + 1), attrs["group"])
    scale = b.unsqueeze(b.cast(b("Gather", "scales", "ids", axis=0), FLOAT), rank + 1)
    q = b.cast(q, FLOAT)
    if zeros is None:
        w = b("Mul", b("Sub", q, b.constant(float(1 << bits - 1), FLOAT)), scale)
    else:
        zero = b.unsqueeze(b.cast(b("Gather", "zeros", "ids", axis=0), FLOAT), rank + 1)
        if zeros[1] == UINT8:
            w = b("Mul", b("Sub", q, zero), scale)
        else:
            w = b("Add", b("Mul", q, scale), zero)
    w = b.slice(b.reshape(w, *[0] * rank, -1), rank, 0, attrs["width"])
    kind = DTYPES[attrs["dtype"]]
    return [w if kind == FLOAT else b.cast(w, kind)]


OP = OpDef(
    name="embedding_nbits",
    summary="Rows of a table of 4 or 8 bits.",
    inputs=("ids", "weight", "scales", "zeros?"),
    outputs=("out",),
    attrs=(Attr("bits"), Attr("group"), Attr("width"), Attr("dtype", "float32")),
    mixes=0,
    reference=embedding_nbits,
    shapes=_shapes,
    dtypes=lambda dtypes, attrs: [attrs["dtype"]],
    body=_body,
    work=lambda shapes, attrs: 2 * numel(_shapes(shapes, attrs)[0]),
    traffic=_traffic,
    full_precision=True,
)
