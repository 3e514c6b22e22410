"""attention: scaled dot-product attention in which a key counts as often as tokens went into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..body import BOOL, FLOAT, FLOATS, Body
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
    """Products and a softmax: what ONNX Runtime runs as fast as its own Attention, in every operator set.

    log(size) rides along as one more channel of q (1) and k (log(size)), cheaper than adding it to the logits."""
    return [write_attention(b, ["q", "k", "v"], operands, attrs)]


def write_attention(b: Body, names: list[str], operands: list[Any], attrs: dict[str, Any]) -> str:
    """The body over the values `names` (q, k, v) and the function's own mask and size."""
    (q, k, v), (rank, dtype), mask, size = names, operands[0], operands[3], operands[4]
    if attrs["scale"]:
        scale = b.constant(attrs["scale"], dtype)
    else:
        width = b.cast(b.squeeze(b.length(q, rank - 1), 0), FLOAT)
        scale = b.cast(b("Reciprocal", b("Sqrt", width)), dtype)
    q = b("Mul", q, scale)
    if size is not None:
        end = [0] * (2 * rank - 1) + [1]
        q = b("Pad", q, b.constant(end), b.constant(1.0, dtype))
        bias = b.unsqueeze(b.cast(size_logarithm(b), dtype), *range(1, rank - 2), rank - 1)
        k = b("Concat", k, b("Expand", bias, b.join(b("Shape", k, end=rank - 1), 1)), axis=rank - 1)
    logits = _product(b, q, k, rank, turned=True)
    bias = None
    if mask is not None:
        bias = "mask"
        if mask[1] == BOOL:
            bias = b("Where", "mask", b.constant(0.0, dtype), b.constant(2 * NEVER, dtype))
        elif mask[1] != dtype:
            bias = b.cast("mask", dtype)
    if attrs["causal"]:
        ones = b("Expand", b.constant(1.0, FLOAT), b.join(b.length(q, rank - 2), b.length(k, rank - 2)))
        past = b.cast(b("Trilu", ones, upper=0), BOOL)
        future = b("Where", past, b.constant(0.0, dtype), b.constant(2 * NEVER, dtype))
        bias = future if bias is None else b("Add", bias, future)
    if bias is not None:
        logits = b("Add", logits, bias)
    return _product(b, b("Softmax", logits, axis=-1), v, rank, turned=False)


def size_logarithm(b: Body) -> str:
    """log(size) [b or 1, m] float32, NEVER where it is 0."""
    log = b("Log", b("Max", "size", b.constant(1e-30, FLOAT)))
    return b("Where", b("Greater", "size", b.constant(0.0, FLOAT)), log, b.constant(NEVER, FLOAT))


def _product(b: Body, x: str, y: str, rank: int, *, turned: bool) -> str:
    """x [..., h, n, i] times y [..., hk, i, m] (turned: [..., hk, m, i]) -> [..., h, n, m].

    The h / hk heads that share one of y's stand along an axis of their own, so that y need not be copied."""
    lead: list[str | int] = [0] * (rank - 3)
    grouped = b.reshape(x, *lead, b.length(y, rank - 3), -1, b.length(x, rank - 2), b.length(x, rank - 1))
    shared = b.unsqueeze(y, rank - 2)
    if turned:
        shared = b.permute(shared, [*range(rank - 1), rank, rank - 1])
    product = b("MatMul", grouped, shared)
    return b.reshape(product, *lead, b.length(x, rank - 3), b.length(x, rank - 2), b.length(product, rank))


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
    custom={0: FLOATS, 3: (BOOL, *FLOATS)},
    work=_work,
    traffic=lambda shapes, attrs: sum(numel(s) for s in shapes) + numel(_shapes(shapes, attrs)[0]),
    full_precision=False,
    source="Bolya et al., ICLR 2023 (proportional attention)",
)
