"""attention: scaled dot-product attention in which a key counts as often as tokens went into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..body import BOOL, FLOAT, Body
from ..definition import Attr, OpDef
from ..lengths import Shape, numel

NEVER = -3e4
"""The logit of a key of size 0: nothing attends to it, and it is finite in every float type."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    size: Tensor | None = None,
    *,
    scale: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """q [..., h, n, d], k [..., hk, m, d], v [..., hk, m, e] -> [..., h, n, e].

    Logits are q k^T * scale (0: 1/sqrt(d)) + log(size) + mask. size [B or 1, m] with B = q's axis 0; a key of
    size 0 is not attended to. mask: bool (True may attend) or additive, broadcasts to [..., h, n, m]. hk divides
    h. causal: query i sees keys 0 ... i. Stays one fused kernel."""
    bias = mask
    if size is not None:
        bias = size_bias(size, q.dim()).to(q.dtype)
        if mask is not None and mask.dtype == torch.bool:
            bias = torch.where(mask, bias, -torch.inf)
        elif mask is not None:
            bias = bias + mask.to(q.dtype)
            if q.dtype == torch.float16:
                bias = bias.clamp(min=torch.finfo(q.dtype).min)
    if causal and bias is not None:
        past = torch.ones((q.shape[-2], k.shape[-2]), dtype=torch.bool, device=q.device).tril()
        bias = bias & past if bias.dtype == torch.bool else torch.where(past, bias, -torch.inf)
        causal = False
    grouped = q.dim() > 2 and isinstance(q.shape[-3], int) and q.shape[-3] != k.shape[-3]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, is_causal=causal, scale=scale or None, enable_gqa=grouped
    )


def size_bias(size: Tensor, rank: int) -> Tensor:
    """size [B, m] -> log(size) as [B, 1, ..., m] of `rank` axes, NEVER where it is 0."""
    bias = torch.where(size > 0, torch.log(size.clamp(min=1e-30)), NEVER)
    return bias.reshape([size.shape[0], *[1] * (rank - 2), size.shape[1]])


def _shapes(shapes: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    q, v = shapes[0], shapes[2]
    return [(*q[:-1], v[-1])]


def _work(shapes: list[Any], attrs: dict[str, Any]) -> Any:
    q, k, v = shapes[:3]
    logits = numel(q[:-1]) * k[-2]
    return logits * (2 * q[-1] + 2 * v[-1] + 5 + (shapes[4] is not None))


# ---- ONNX --------------------------------------------------------------------------------------------
def _body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    (rank, dtype), mask, size = operands[0], operands[3], operands[4]
    q, k, v = "q", "k", "v"
    if rank > 2:
        k, v = _grouped(b, k, rank), _grouped(b, v, rank)
    order = [*range(rank - 2), rank - 1, rank - 2]
    if attrs["scale"]:
        scale = b.constant(attrs["scale"], dtype)
    else:
        width = b.cast(b.squeeze(b.length(q, rank - 1), 0), FLOAT)
        scale = b.cast(b("Reciprocal", b("Sqrt", width)), dtype)
    logits = b("MatMul", b("Mul", q, scale), b.permute(k, order))
    bias = None
    if size is not None:
        bias = b.cast(_size_bias(b, rank), dtype)
    if mask is not None:
        given = "mask"
        if mask[1] == BOOL:
            given = b("Where", "mask", b.constant(0.0, dtype), b.constant(2 * NEVER, dtype))
        elif mask[1] != dtype:
            given = b.cast("mask", dtype)
        bias = given if bias is None else b("Add", bias, given)
    if attrs["causal"]:
        ones = b("Expand", b.constant(1.0, FLOAT), b.join(b.length("q", rank - 2), b.length("k", rank - 2)))
        past = b.cast(b("Trilu", ones, upper=0), BOOL)
        future = b("Where", past, b.constant(0.0, dtype), b.constant(2 * NEVER, dtype))
        bias = future if bias is None else b("Add", bias, future)
    if bias is not None:
        logits = b("Add", logits, bias)
    return [b("MatMul", b("Softmax", logits, axis=-1), v)]


def _size_bias(b: Body, rank: int) -> str:
    floor = b.constant(1e-30, FLOAT)
    log = b("Log", b("Max", "size", floor))
    zero = b.constant(0.0, FLOAT)
    bias = b("Where", b("Greater", "size", zero), log, b.constant(NEVER, FLOAT))
    return b.unsqueeze(bias, *range(1, rank - 1)) if rank > 2 else bias


def _grouped(b: Body, x: str, rank: int) -> str:
    """[..., hk, m, d] with every head repeated until there are as many as q's."""
    heads, own = b.length("q", rank - 3), b.length(x, rank - 3)
    times = b("Div", heads, own)
    apart = b.unsqueeze(x, rank - 2)
    shape = b.join(*([1] * (rank - 2)), times, 1, 1)
    apart = b("Expand", apart, shape)
    parts: list[str | int] = [0] * (rank - 3)
    return b.reshape(apart, *parts, heads, b.length(x, rank - 2), b.length(x, rank - 1))


OP = OpDef(
    name="attention",
    summary="Scaled dot-product attention with log(size) of the keys added to the logits.",
    inputs=("q", "k", "v", "mask?", "size?"),
    outputs=("out",),
    attrs=(Attr("scale", 0.0), Attr("causal", False)),
    reference=attention,
    shapes=_shapes,
    dtypes=lambda dtypes, attrs: [dtypes[0] or "float32"],
    body=_body,
    work=_work,
    traffic=lambda shapes, attrs: sum(numel(s) for s in shapes) + numel(_shapes(shapes, attrs)[0]),
    full_precision=False,
    source="Bolya et al., ICLR 2023 (proportional attention)",
)
