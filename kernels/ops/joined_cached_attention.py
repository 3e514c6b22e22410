"""joined_cached_attention: cached_attention as a layer has it: heads side by side, norms and rotary angles inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..body import FLOAT, FLOATS, Body
from ..definition import Attr, OpDef
from ..lengths import Shape, numel
from .cached_attention import cached_attention, write_cached_attention

NONE, HALVES, PAIRS = 0, 1, 2
"""What `rotary` says: nothing turns; channel i with channel i + R/2; channel 2i with channel 2i + 1."""


def joined_cached_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    prefix: Tensor,
    ancestors: Tensor,
    bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    scale: float = 0.0,
    softcap: float = 0.0,
    window: int = 0,
    key_bias: bool = False,
    rotary: int = 0,
    eps: float = 1e-6,
    norm_offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, M, H * D], k [1, M, Hk * D], v [1, M, Hk * E], caches [Hk, C, D], [Hk, C, E] -> [1, M, H * E], new caches.

    Without k and v, q holds all three side by side. `cached_attention` of the split heads, joined again, after, in
    this order: RMS norm of q and of k, x / sqrt(mean(x^2) + eps) * (q_norm + norm_offset), over each head (q_norm [D])
    or over all heads (q_norm [H * D]); rotation of the first R channels of every head by cos and sin [1, M, R] or
    [M, R], x * cos + turned(x) * sin. rotary 1: turned is (-second half, first half); 2: (-x1, x0, -x3, x2, ...);
    0: no rotation. All in float32; q, k and v have one type, and so has what comes out."""
    (shared, _, width), value_width, dtype = key_cache.shape, value_cache.shape[-1], q.dtype
    if k is None or v is None:
        q, k, v = q.split([heads * width, shared * width, shared * value_width], -1)
    turn = (cos, sin, rotary)
    q = _heads(q.float(), heads, width, q_norm, turn, eps, norm_offset)
    k = _heads(k.float(), shared, width, k_norm, turn, eps, norm_offset)
    v = v.float().unflatten(2, (shared, value_width)).transpose(1, 2)
    out, keys, values = cached_attention(
        *(q, k, v, key_cache, value_cache, slots, prefix, ancestors, bias),
        **{"scale": scale, "softcap": softcap, "window": window, "key_bias": key_bias},
    )
    return out.transpose(1, 2).flatten(2).to(dtype), keys, values


def _heads(
    x: Tensor,
    heads: int,
    width: int,
    norm: Tensor | None,
    turn: tuple[Tensor | None, Tensor | None, int],
    eps: float,
    offset: float,
) -> Tensor:
    """[1, M, heads * width] -> [1, heads, M, width], normed and turned."""
    whole = norm is not None and norm.shape[0] != width
    x = x if whole else x.unflatten(2, (heads, width))
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (norm.float() + offset)
    x = x.unflatten(2, (heads, width)) if whole else x
    cos, sin, rotary = turn
    if rotary != NONE and cos is not None and sin is not None:
        cos, sin = (t.float().reshape(1, -1, 1, t.shape[-1]) for t in (cos, sin))
        first, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        if rotary == HALVES:
            low, high = first.chunk(2, -1)
            turned = torch.cat([-high, low], -1)
        else:
            turned = torch.stack([-first[..., 1::2], first[..., ::2]], -1).flatten(-2)
        x = torch.cat([first * cos + turned * sin, rest], -1)
    return x.transpose(1, 2)


def _shapes(shapes: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    q, key_cache, value_cache = shapes[0], shapes[3], shapes[4]
    return [(q[0], q[1], attrs["heads"] * value_cache[-1]), tuple(key_cache), tuple(value_cache)]


def _dtypes(dtypes: list[Any], attrs: dict[str, Any]) -> list[str]:
    return [dtypes[0] or "float32", dtypes[3] or "float32", dtypes[4] or "float32"]


def _work(shapes: list[Any], attrs: dict[str, Any]) -> Any:
    q, key_cache, value_cache = shapes[0], shapes[3], shapes[4]
    extra = 5 + (shapes[8] is not None) + 2 * (attrs["softcap"] > 0)
    logits = q[0] * q[1] * attrs["heads"] * key_cache[1]
    return logits * (2 * key_cache[-1] + 2 * value_cache[-1] + extra) + 4 * numel(q)


def _traffic(shapes: list[Any], attrs: dict[str, Any]) -> Any:
    q, key_cache, value_cache = shapes[0], shapes[3], shapes[4]
    new = q[1] * key_cache[0] * (key_cache[-1] + value_cache[-1])
    return sum(numel(s) for s in shapes) + new + numel(_shapes(shapes, attrs)[0])


# ---- ONNX --------------------------------------------------------------------------------------------
def _body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    dtype, width = operands[0][1], b.length("key_cache", 2)
    value_width = b.length("value_cache", 2)
    names = ["q", "k", "v"]
    if operands[1] is None or operands[2] is None:
        keys = b("Mul", b.constant([attrs["kv_heads"]]), width)
        values = b("Mul", b.constant([attrs["kv_heads"]]), value_width)
        queries = b("Mul", b.constant([attrs["heads"]]), width)
        names = b.many("Split", ["q", b.join(queries, keys, values)], 3, axis=2)
    q, k, v = (b.cast(x, FLOAT) if dtype != FLOAT else x for x in names)
    table = None
    if attrs["rotary"] != NONE and operands[9] is not None and operands[10] is not None:
        table = [_table(b, name, operands[9 + i]) for i, name in enumerate(("cos", "sin"))]
    for count, norm in ((attrs["heads"], "q_norm"), (attrs["kv_heads"], "k_norm")):
        x = q if norm == "q_norm" else k
        given = operands[11 if norm == "q_norm" else 12]
        if given is not None:
            x = _normed(b, x, count, norm, given[1], attrs)
        x = b.reshape(x, 0, 0, count, -1)
        if table is not None:
            x = _turned(b, x, table, attrs["rotary"])
        x = b.permute(x, [0, 2, 1, 3])
        q, k = (x, k) if norm == "q_norm" else (q, x)
    v = b.permute(b.reshape(v, 0, 0, attrs["kv_heads"], -1), [0, 2, 1, 3])
    signature = [(4, FLOAT)] * 3 + list(operands[3:9])
    out, keys, values = write_cached_attention(b, [q, k, v], signature, attrs)
    out = b.reshape(b.permute(out, [0, 2, 1, 3]), 0, 0, -1)
    return [b.cast(out, dtype) if dtype != FLOAT else out, keys, values]


def _table(b: Body, name: str, operand: tuple[int, int]) -> str:
    """cos or sin as [1, M, 1, R] float32."""
    x = name if operand[1] == FLOAT else b.cast(name, FLOAT)
    return b.reshape(x, 1, -1, 1, b.length(x, operand[0] - 1))


def _normed(b: Body, x: str, heads: int, norm: str, dtype: int, attrs: dict[str, Any]) -> str:
    """x [1, M, heads * D] normed over as many channels as there are weights, same shape."""
    weight = norm if dtype == FLOAT else b.cast(norm, FLOAT)
    if attrs["norm_offset"]:
        weight = b("Add", weight, b.constant(attrs["norm_offset"], FLOAT))
    parts = b.reshape(x, 0, 0, -1, b.length(norm, 0))
    mean = b("ReduceMean", b("Mul", parts, parts), b.constant([3]), keepdims=1)
    root = b("Sqrt", b("Add", mean, b.constant(attrs["eps"], FLOAT)))
    return b.reshape(b("Mul", b("Div", parts, root), weight), 0, 0, -1)


def _turned(b: Body, x: str, table: list[str], rotary: int) -> str:
    """x [1, M, heads, D], its first R channels turned."""
    cos, sin = table
    length = b.length(cos, 3)
    first, rest = b.slice(x, 3, 0, length), b.slice(x, 3, length)
    if rotary == HALVES:
        half = b("Div", length, b.constant([2]))
        turned = b("Concat", b("Neg", b.slice(first, 3, half)), b.slice(first, 3, 0, half), axis=3)
    else:
        odd, even = (b.unsqueeze(b.slice(first, 3, start, None, 2), 4) for start in (1, 0))
        turned = b.reshape(b("Concat", b("Neg", odd), even, axis=4), 0, 0, 0, -1)
    return b("Concat", b("Add", b("Mul", first, cos), b("Mul", turned, sin)), rest, axis=3)


OP = OpDef(
    name="joined_cached_attention",
    summary="`cached_attention` over heads side by side, with norms of q and k and rotary angles inside.",
    inputs=(
        *("q", "k?", "v?", "key_cache", "value_cache", "slots", "prefix", "ancestors"),
        *("bias?", "cos?", "sin?", "q_norm?", "k_norm?"),
    ),
    outputs=("out", "new_key_cache", "new_value_cache"),
    attrs=(
        *(Attr("heads"), Attr("kv_heads"), Attr("scale", 0.0), Attr("softcap", 0.0), Attr("window", 0)),
        *(Attr("key_bias", False), Attr("rotary", NONE), Attr("eps", 1e-6), Attr("norm_offset", 0.0)),
    ),
    same_bits=True,
    reference=joined_cached_attention,
    shapes=_shapes,
    dtypes=_dtypes,
    body=_body,
    custom={0: (FLOAT,), 3: FLOATS},
    work=_work,
    traffic=_traffic,
    source="Su et al., RoFormer, 2021 (rotary angles)",
)
