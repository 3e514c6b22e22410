"""joined_attention: attention over tokens whose heads lie side by side, as projections leave them and take them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..body import BOOL, FLOAT, FLOATS, Body
from ..definition import Attr, OpDef
from ..lengths import Shape, numel
from .attention import attention, size_logarithm, write_attention


def joined_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    size: Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    scale: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """q [b, n, heads * d], k [b, m, kv_heads * d], v [b, m, kv_heads * e] -> [b, n, heads * e].

    `attention` of the split heads, joined again. mask broadcasts to [b, heads, n, m], size is [b or 1, m]."""
    split = (
        x.unflatten(2, (count, -1)).transpose(1, 2)
        for x, count in zip((q, k, v), (heads, kv_heads, kv_heads))
    )
    q, k, v = split
    return attention(q, k, v, mask, size, scale=scale, causal=causal).transpose(1, 2).flatten(2)


def _shapes(shapes: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    q, v = shapes[0], shapes[2]
    return [(q[0], q[1], v[2] * attrs["heads"] // attrs["kv_heads"])]


def _work(shapes: list[Any], attrs: dict[str, Any]) -> Any:
    q, k, v = shapes[:3]
    width, value_width = q[2] // attrs["heads"], v[2] // attrs["kv_heads"]
    logits = q[0] * attrs["heads"] * q[1] * k[1]
    return logits * (2 * width + 2 * value_width + 5 + (shapes[4] is not None))


def _body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    """ONNX Runtime's own operator for this layout where it takes the case, otherwise split heads.

    Not with a mask: version 1.20 of that operator is wrong where a bias has a batch and no heads, and spread over the
    heads it is no faster than products and a softmax. log(size) needs none, as one more channel of q and k."""
    dtype, mask, size = operands[0][1], operands[3], operands[4]
    heads, shared, scale = attrs["heads"], attrs["kv_heads"], attrs["scale"]
    if (
        dtype != FLOAT
        or heads != shared
        or attrs["causal"]
        or mask is not None
        or (size is not None and not scale)
    ):
        names = [
            b.permute(b.reshape(x, 0, 0, count, -1), [0, 2, 1, 3])
            for x, count in zip("qkv", (heads, shared, shared))
        ]
        signature = [(4, o[1]) if o is not None and i < 3 else o for i, o in enumerate(operands)]
        out = write_attention(b, names, signature, attrs)
        return [b.reshape(b.permute(out, [0, 2, 1, 3]), 0, 0, -1)]
    q, k = "q", "k"
    if size is not None:
        q, k = (b.reshape(x, 0, 0, heads, -1) for x in (q, k))
        q = b("Pad", q, b.constant([0] * 7 + [1]), b.constant(1 / scale, FLOAT))
        log = b.unsqueeze(size_logarithm(b), 2, 3)
        k = b("Concat", k, b("Expand", log, b.join(b("Shape", k, end=3), 1)), axis=3)
        q, k = (b.reshape(x, 0, 0, -1) for x in (q, k))
    kwargs = {"scale": scale} if scale else {}
    return [b("MultiHeadAttention", q, k, "v", domain="com.microsoft", num_heads=heads, **kwargs)]


OP = OpDef(
    name="joined_attention",
    summary="Attention over [b, n, heads · d], the heads side by side.",
    inputs=("q", "k", "v", "mask?", "size?"),
    outputs=("out",),
    attrs=(Attr("heads"), Attr("kv_heads"), Attr("scale", 0.0), Attr("causal", False)),
    reference=joined_attention,
    shapes=_shapes,
    dtypes=lambda dtypes, attrs: [dtypes[0] or "float32"],
    body=_body,
    custom={0: FLOATS, 3: (BOOL, *FLOATS)},
    work=_work,
    traffic=lambda shapes, attrs: sum(numel(s) for s in shapes) + numel(_shapes(shapes, attrs)[0]),
    full_precision=False,
    source="Bolya et al., ICLR 2023 (proportional attention)",
)
