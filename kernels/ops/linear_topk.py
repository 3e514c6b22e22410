"""linear_topk: the largest outputs of a product with many channels (a language model's head), and where they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..body import FLOAT, FLOATS, UINT8, Body
from ..definition import Attr, OpDef
from ..lengths import Shape, numel
from .linear_nbits import BITS, SCALES, check, dequantize, lengths, product_work, stored, write_product


def linear_topk(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    *,
    k: int,
    **attrs: Any,
) -> tuple[Tensor, Tensor]:
    """x [..., c] -> the k largest of the n products, values float32 [..., k] descending, and their indices int64.

    Among equals the lowest index comes first. weight, scales, zeros, bias, group, width and channels as of
    `linear_nbits`; with bits 16 or 32 weight is float [n, c] and there are no scales (group is not read). norm [c]: x
    is normalised first, x / sqrt(mean(x^2) + eps) * (norm + norm_offset). No tensor of rows x n is made by kernels.
    Raises ValueError for more than n of n."""
    out = _products(x, weight, scales, zeros, bias, norm, k=k, **attrs)
    return _largest(out, k)


def _largest(out: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = torch.sort(out, dim=-1, descending=True, stable=True)
    return values[..., :k].contiguous(), indices[..., :k].contiguous()


def _products(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bias: Tensor | None,
    norm: Tensor | None,
    *,
    bits: int,
    group: int,
    k: int,
    eps: float = 1e-6,
    norm_offset: float = 0.0,
    width: int = 0,
    channels: int = 0,
) -> Tensor:
    inside, outside = x.shape[-1], weight.shape[0]
    if not 1 <= k <= outside:
        raise ValueError(f"linear_topk: k is between 1 and {outside}, not {k}")
    if bits in BITS:
        check("linear_topk", bits, group, width, inside, channels, outside)
        if scales is None:
            raise ValueError(f"linear_topk: weights of {bits} bits need scales")
        w = dequantize(weight, scales, zeros, bits=bits, width=inside)
    elif bits in (16, 32):
        w = weight.to(torch.float32)
    else:
        raise ValueError(f"linear_topk: bits is 4, 8, 16 or 32, not {bits}")
    x = x.to(torch.float32)
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (norm.to(torch.float32) + norm_offset)
    return torch.nn.functional.linear(x, w, None if bias is None else bias.to(torch.float32))


def _shapes(given: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    return [(*given[0][:-1], attrs["k"])] * 2


def _body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    return b.many("TopK", [_write_products(b, operands, attrs), b.constant([attrs["k"]])], 2)


def _spread_body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    out, last = _write_products(b, operands, attrs), b.constant([-1])
    logs, whole = b("LogSoftmax", out, axis=-1), b("ReduceLogSumExp", out, last)
    entropy = b("Neg", b("ReduceSum", b("Mul", b("Exp", logs), logs), last))
    return [*b.many("TopK", [out, b.constant([attrs["k"]])], 2), b("Concat", whole, entropy, axis=-1)]


def _write_products(b: Body, operands: list[Any], attrs: dict[str, Any]) -> str:
    x = "x" if operands[0][1] == FLOAT else b.cast("x", FLOAT)
    if operands[5] is not None:
        mean = b("ReduceMean", b("Mul", x, x), b.constant([-1]))
        x = b("Div", x, b("Sqrt", b("Add", mean, b.constant(attrs["eps"], FLOAT))))
        scale = b.cast("norm", FLOAT)
        if attrs["norm_offset"]:
            scale = b("Add", scale, b.constant(attrs["norm_offset"], FLOAT))
        x = b("Mul", x, scale)
    if attrs["bits"] in BITS:
        out = write_product(b, x, operands[2], operands[3], attrs)
    else:
        out = b("MatMul", x, b.permute(b.cast("weight", FLOAT), [1, 0]))
    if operands[4] is not None:
        out = b("Add", out, b.cast("bias", FLOAT))
    return out


def linear_spread(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    *,
    k: int,
    **attrs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_topk`, and of the softmax over all n products the log of its sum and its entropy in nats: spread float32
    [..., 2]. exp(value - spread[..., 0]) is the probability of a value."""
    out = _products(x, weight, scales, zeros, bias, norm, k=k, **attrs)
    logs = torch.log_softmax(out, -1)
    spread = torch.stack([torch.logsumexp(out, -1), -(logs.exp() * logs).sum(-1)], -1)
    return *_largest(out, k), spread


OP = OpDef(
    name="linear_topk",
    summary="The k largest outputs of a product, and where they are.",
    inputs=("x", "weight", "scales?", "zeros?", "bias?", "norm?"),
    outputs=("values", "indices"),
    attrs=(
        *(Attr("bits"), Attr("group"), Attr("k"), Attr("eps", 1e-6)),
        *(Attr("norm_offset", 0.0), Attr("width", 0), Attr("channels", 0)),
    ),
    mixes=1,
    same_bits=True,
    reference=linear_topk,
    shapes=_shapes,
    dtypes=lambda dtypes, attrs: ["float32", "int64"],
    body=_body,
    work=product_work,
    traffic=lambda given, attrs: (
        numel(given[0]) + stored(given, attrs["bits"]) + numel(given[5]) + 3 * numel(_shapes(given, attrs)[0])
    ),
    pinned=lengths,
    custom={0: FLOATS, 1: (UINT8, *FLOATS), 2: SCALES, 3: (UINT8, *SCALES), 4: (FLOAT,), 5: (FLOAT,)},
)

SPREAD = replace(
    OP,
    name="linear_spread",
    summary="The k largest outputs of a product, where they are, and how sure its softmax is.",
    outputs=("values", "indices", "spread"),
    reference=linear_spread,
    shapes=lambda given, attrs: [*_shapes(given, attrs), (*given[0][:-1], 2)],
    dtypes=lambda dtypes, attrs: ["float32", "int64", "float32"],
    body=_spread_body,
)
