"""mean_heads: one key per token, the mean over the heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..body import FLOAT, FLOATS, Body
from ..definition import OpDef
from ..lengths import Shape, numel


def mean_heads(k: Tensor) -> Tensor:
    """k [B, H, N, D] -> [B, N, D], accumulated in float32."""
    return k.float().mean(1).to(k.dtype) if k.element_size() < 4 else k.mean(1)


def _shapes(shapes: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    b, _, n, d = shapes[0]
    return [(b, n, d)]


def _body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    dtype = operands[0][1]
    k = "k" if dtype == FLOAT else b.cast("k", FLOAT)
    mean = b("ReduceMean", k, b.constant([1]), keepdims=0)
    return [mean if dtype == FLOAT else b.cast(mean, dtype)]


OP = OpDef(
    name="mean_heads",
    summary="Mean over the heads: k[B,H,N,D] → [B,N,D].",
    inputs=("k",),
    outputs=("metric",),
    reference=mean_heads,
    shapes=_shapes,
    dtypes=lambda dtypes, attrs: [dtypes[0] or "float32"],
    body=_body,
    custom={0: FLOATS},
    work=lambda shapes, attrs: numel(shapes[0]),
    source="Bolya et al., ICLR 2023",
)
