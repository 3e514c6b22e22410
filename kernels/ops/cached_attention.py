"""cached_attention: new rows against a key/value cache; what a row sees is a list of slots in logical order."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..body import FLOAT, FLOATS, INT64, Body
from ..definition import Attr, OpDef
from ..lengths import Shape, numel

UNSEEN = -3e38
"""The logit of a slot that a row does not see: finite, so that a row that sees nothing is no NaN."""


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    prefix: Tensor,
    ancestors: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 0.0,
    softcap: float = 0.0,
    window: int = 0,
    key_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, H, M, D], k [1, Hk, M, D], v [1, Hk, M, E], caches [Hk, C, D], [Hk, C, E] -> out [1, H, M, E], new caches.

    First k and v go into the caches at `slots` [M] int32 (of equal slots any row stays). Row m then sees, in this
    order, the slots prefix[m, 0], prefix[m, 0] + 1, ... (prefix [M, 2] int32; prefix[m, 1] of them), then
    ancestors[m] [M, A] int32 up to the first -1. The key at place t has position t, the row that of its last key.
    No slot is seen twice. Logits are q k^T * scale (0: 1/sqrt(D)), then softcap * tanh(logits / softcap) where
    softcap > 0, then + bias [1 or H, T] float32 at the distance of row and key, or with key_bias at the key's
    position (beyond T: its last entry). window > 0: only keys at a distance below it. Hk divides H. Accumulated in
    float32; a row that sees nothing is 0. Slots that were never written must hold finite numbers."""
    rows, width = q.shape[2], q.shape[3]
    shared, capacity = key_cache.shape[0], key_cache.shape[1]
    where = slots.long()
    keys = key_cache.index_copy(1, where, k[0].to(key_cache.dtype))
    values = value_cache.index_copy(1, where, v[0].to(value_cache.dtype))
    place, count = places(prefix, ancestors, capacity)
    grouped = q[0].float().unflatten(0, (shared, -1)).flatten(1, 2)
    logits = grouped @ keys.float().transpose(1, 2) * (scale or max(width, 1) ** -0.5)
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.unflatten(1, (-1, rows))  # [Hk, H / Hk, M, C]
    distance = count - 1 - place
    if bias is not None:
        at = (place if key_bias else distance).clamp(0, bias.shape[1] - 1)
        added = bias.float()[:, at]
        logits = logits + (added if added.shape[0] == 1 else added.unflatten(0, (shared, -1)))
    seen = place >= 0
    if window > 0:
        seen = seen & (distance < window)
    weights = torch.softmax(torch.where(seen, logits, UNSEEN), -1)
    weights = torch.where(seen, weights, 0.0)
    out = weights.flatten(1, 2) @ values.float()
    return out.reshape(1, -1, rows, values.shape[-1]).to(q.dtype), keys, values


def places(prefix: Tensor, ancestors: Tensor, capacity: Any) -> tuple[Tensor, Tensor]:
    """Position of every slot for every row, [M, C] int64, -1 where it is unseen; how many keys a row sees, [M, 1]."""
    start, run = prefix[:, :1].long(), prefix[:, 1:].long()
    steps = torch.arange(capacity, device=prefix.device)[None] - start
    place = torch.where((steps >= 0) & (steps < run), steps, -1)
    listed = ancestors >= 0
    further = run + torch.arange(ancestors.shape[1], device=prefix.device)[None]
    at = torch.where(
        listed, ancestors.long(), capacity
    )  # padding goes to a slot of its own, which is cut off
    place = F.pad(place, (0, 1), value=-1).scatter(1, at, further)[:, :-1]
    return place, run + listed.sum(1, keepdim=True)


def _shapes(shapes: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    q, key_cache, value_cache = shapes[0], shapes[3], shapes[4]
    return [(*q[:-1], value_cache[-1]), tuple(key_cache), tuple(value_cache)]


def _dtypes(dtypes: list[Any], attrs: dict[str, Any]) -> list[str]:
    return [dtypes[0] or "float32", dtypes[3] or "float32", dtypes[4] or "float32"]


def _work(shapes: list[Any], attrs: dict[str, Any]) -> Any:
    """As if every row saw the whole cache: how full it is, is data."""
    q, key_cache, value_cache = shapes[0], shapes[3], shapes[4]
    extra = 5 + (shapes[8] is not None) + 2 * (attrs["softcap"] > 0)
    return numel(q[:-1]) * key_cache[1] * (2 * q[-1] + 2 * value_cache[-1] + extra)


def _traffic(shapes: list[Any], attrs: dict[str, Any]) -> Any:
    """Both caches are read once and only the new rows written."""
    out = _shapes(shapes, attrs)[0]
    return sum(numel(s) for s in shapes) + numel(shapes[1]) + numel(shapes[2]) + numel(out)


# ---- ONNX --------------------------------------------------------------------------------------------
def _body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    return write_cached_attention(b, ["q", "k", "v"], operands, attrs)


def write_cached_attention(
    b: Body, names: list[str], operands: list[Any], attrs: dict[str, Any]
) -> list[str]:
    """The body over the values `names` (q, k, v; heads apart) and the function's own caches and places."""
    (q, k, v), dtype, cache_type, bias = names, operands[0][1], operands[3][1], operands[8]
    keys = _written(b, k, "key_cache", dtype, cache_type)
    values = _written(b, v, "value_cache", dtype, operands[4][1])
    place, count = _places(b)
    shared, rows, width = b.length("key_cache", 0), b.length(q, 2), b.length("key_cache", 2)
    grouped = b.reshape(_as(b, q, dtype, FLOAT), shared, -1, width)
    if attrs["scale"]:
        scale = b.constant(attrs["scale"], FLOAT)
    else:
        scale = b("Reciprocal", b("Sqrt", b.cast(width, FLOAT)))
    turned = b.permute(_as(b, keys, cache_type, FLOAT), [0, 2, 1])
    logits = b("MatMul", b("Mul", grouped, scale), turned)
    if attrs["softcap"] > 0:
        cap = b.constant(attrs["softcap"], FLOAT)
        logits = b("Mul", b("Tanh", b("Div", logits, cap)), cap)
    logits = b.reshape(logits, -1, rows, b.length("key_cache", 1))  # [H, M, C]
    zero, one = b.constant(0), b.constant(1)
    distance = b("Sub", b("Sub", count, one), place)
    if bias is not None:
        last = b("Sub", b.length("bias", 1), b.constant([1]))
        at = b("Min", b("Max", place if attrs["key_bias"] else distance, zero), last)
        logits = b("Add", logits, b("Gather", _as(b, "bias", bias[1], FLOAT), at, axis=1))
    # The node says its window itself: layers with one and layers without share a function.
    window = b.attribute("window")
    reach = b("Where", b("Greater", window, zero), window, b.constant(np.iinfo(np.int32).max))
    seen = b("And", b("GreaterOrEqual", place, zero), b("Less", distance, reach))
    weights = b("Softmax", b("Where", seen, logits, b.constant(UNSEEN, FLOAT)), axis=-1)
    weights = b("Where", seen, weights, b.constant(0.0, FLOAT))
    weights = b.reshape(weights, shared, -1, b.length("key_cache", 1))
    out = b("MatMul", weights, _as(b, values, operands[4][1], FLOAT))
    out = b.reshape(out, 1, -1, rows, b.length("value_cache", 2))
    return [_as(b, out, FLOAT, dtype), keys, values]


def _as(b: Body, x: str, dtype: int, wanted: int) -> str:
    return x if dtype == wanted else b.cast(x, wanted)


def _written(b: Body, rows: str, cache: str, dtype: int, cache_type: int) -> str:
    """The cache [Hk, C, D] with rows [1, Hk, M, D] at `slots`."""
    shared, count = b.length(cache, 0), b.length("slots", 0)
    pairs = b.join(shared, count, 1)
    head = b("Expand", b.unsqueeze(b.count(shared), 1, 2), pairs)
    slot = b("Expand", b.unsqueeze(b.cast("slots", INT64), 0, 2), pairs)
    updates = _as(b, b.squeeze(rows, 0), dtype, cache_type)
    return b("ScatterND", cache, b("Concat", head, slot, axis=2), updates)


def _places(b: Body) -> tuple[str, str]:
    """`places`: [M, C] and [M, 1] int64."""
    capacity, minus = b.length("key_cache", 1), b.constant(-1)
    ends = b.cast("prefix", INT64)
    start, run = b.slice(ends, 1, 0, 1), b.slice(ends, 1, 1, 2)
    steps = b("Sub", b.count(b("Add", capacity, b.constant([1]))), start)
    inside = b("And", b("Greater", steps, minus), b("Less", steps, run))
    listed = b("Greater", b.cast("ancestors", INT64), minus)
    at = b("Where", listed, b.cast("ancestors", INT64), capacity)
    further = b("Expand", b("Add", run, b.count(b.length("ancestors", 1))), b("Shape", "ancestors"))
    place = b("ScatterElements", b("Where", inside, steps, minus), at, further, axis=1)
    listed = b.cast(listed, INT64)
    count = b("Add", run, b("ReduceSum", listed, b.constant([1]), keepdims=1))
    return b.slice(place, 1, 0, capacity), count


OP = OpDef(
    name="cached_attention",
    summary="Attention of new rows over a key/value cache, whose slots each row sees in an order of its own.",
    inputs=("q", "k", "v", "key_cache", "value_cache", "slots", "prefix", "ancestors", "bias?"),
    outputs=("out", "new_key_cache", "new_value_cache"),
    attrs=(Attr("scale", 0.0), Attr("softcap", 0.0), Attr("window", 0), Attr("key_bias", False)),
    same_bits=True,
    reference=cached_attention,
    shapes=_shapes,
    dtypes=_dtypes,
    body=_body,
    custom={0: (FLOAT,), 3: FLOATS},
    work=_work,
    traffic=_traffic,
    source="tree verification over a cache: Miao et al., SpecInfer, ASPLOS 2024; the logical order is ours",
)
