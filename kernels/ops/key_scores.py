"""key_scores: how much attention each key of a cache gets from new rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..body import FLOAT, Body
from ..definition import Attr, OpDef
from ..lengths import Shape, numel
from .cached_attention import UNSEEN, _as, _places, places


def key_scores(
    q: Tensor,
    key_cache: Tensor,
    prefix: Tensor,
    ancestors: Tensor,
    *,
    scale: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """q [1, H, M, D], key_cache [Hk, C, D] -> float32 [M, Hk, C]: each row's attention probability of every slot.

    Those of the H / Hk query heads that share a key head are added up. key_cache holds the rows' own keys already;
    prefix, ancestors, scale and softcap as of `cached_attention`. A slot that a row does not see has 0."""
    rows, width = q.shape[2], q.shape[3]
    shared, capacity = key_cache.shape[0], key_cache.shape[1]
    grouped = q[0].float().unflatten(0, (shared, -1)).flatten(1, 2)
    logits = grouped @ key_cache.float().transpose(1, 2) * (scale or max(width, 1) ** -0.5)
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    seen = places(prefix, ancestors, capacity)[0] >= 0
    logits = logits.unflatten(1, (-1, rows))  # [Hk, H / Hk, M, C]
    weights = torch.softmax(torch.where(seen, logits, UNSEEN), -1)
    return torch.where(seen, weights, 0.0).sum(1).transpose(0, 1).contiguous()


def _shapes(shapes: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    q, cache = shapes[:2]
    return [(q[2], cache[0], cache[1])]


def _work(shapes: list[Any], attrs: dict[str, Any]) -> Any:
    q, cache = shapes[:2]
    return numel(q[:-1]) * cache[1] * (2 * q[-1] + 6 + 2 * (attrs["softcap"] > 0))


def _body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    (place, _), width = _places(b), b.length("key_cache", 2)
    shared, capacity = b.length("key_cache", 0), b.length("key_cache", 1)
    grouped = b.reshape(_as(b, "q", operands[0][1], FLOAT), shared, -1, width)
    if attrs["scale"]:
        scale = b.constant(attrs["scale"], FLOAT)
    else:
        scale = b("Reciprocal", b("Sqrt", b.cast(width, FLOAT)))
    turned = b.permute(_as(b, "key_cache", operands[1][1], FLOAT), [0, 2, 1])
    logits = b("MatMul", b("Mul", grouped, scale), turned)
    if attrs["softcap"] > 0:
        cap = b.constant(attrs["softcap"], FLOAT)
        logits = b("Mul", b("Tanh", b("Div", logits, cap)), cap)
    logits = b.reshape(logits, shared, -1, b.length("q", 2), capacity)
    seen = b("GreaterOrEqual", place, b.constant(0))
    weights = b("Softmax", b("Where", seen, logits, b.constant(UNSEEN, FLOAT)), axis=-1)
    weights = b("Where", seen, weights, b.constant(0.0, FLOAT))
    return [b.permute(b("ReduceSum", weights, b.constant([1]), keepdims=0), [1, 0, 2])]


OP = OpDef(
    name="key_scores",
    summary="The attention that each key of a cache gets from new rows.",
    inputs=("q", "key_cache", "prefix", "ancestors"),
    outputs=("scores",),
    attrs=(Attr("scale", 0.0), Attr("softcap", 0.0)),
    reference=key_scores,
    shapes=_shapes,
    dtypes=lambda dtypes, attrs: ["float32"],
    body=_body,
    work=_work,
    source="Zhang et al., H2O: Heavy-Hitter Oracle, NeurIPS 2023",
)
