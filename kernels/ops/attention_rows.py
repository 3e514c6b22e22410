"""attention_rows: how much attention every key gets from one query, or from a few, beside a fused attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..body import BOOL, FLOAT, INT64, Body
from ..definition import Attr, OpDef
from ..layout import body_take, take
from ..lengths import Shape, numel
from .attention import NEVER

HEADS = ("sum", "mean")


def attention_rows(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    first: int = 0,
    step: int = 0,
    last: bool = False,
    heads: str = "sum",
    scale: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """q [B, H, N, D], k [B, Hk, M, D] -> float32 [B, M]: attention probabilities of the chosen queries.

    The queries are `first` and, with a step, every step-th after it, whose mean is taken; `last` is instead each
    sample's last token of valid > 0 (valid [B or 1, N], default all). Over the heads the sum or the mean. mask as of
    `attention`; causal: query i sees keys 0 ... i. Costs O(M D) a row and never makes the N x M matrix."""
    check_heads(heads)
    count, keys = q.shape[2], k.shape[2]
    rows = _rows(q, valid, first, step, last)  # [B or 1, R]
    chosen = take(q, rows.expand(q.shape[0], rows.shape[1]), 2, 0).float()
    grouped = chosen.unflatten(1, (k.shape[1], -1))
    logits = grouped @ k.float().transpose(2, 3).unsqueeze(2) * (scale or max(q.shape[3], 1) ** -0.5)
    logits = logits.flatten(1, 2)  # [B, H, R, M]
    if mask is not None:
        wide = mask.reshape([1] * (4 - mask.dim()) + list(mask.shape))
        if count != 1 and wide.shape[2] != 1:
            wide = take(wide, rows, 2, 0)
        logits = torch.where(wide, logits, -torch.inf) if wide.dtype == torch.bool else logits + wide.float()
    if causal:
        places = torch.arange(keys, device=q.device)
        logits = torch.where(places <= rows[:, None, :, None], logits, -torch.inf)
    found = torch.softmax(logits, -1).mean(2)
    return found.sum(1) if heads == "sum" else found.mean(1)


def check_heads(heads: str) -> None:
    if heads not in HEADS:
        raise ValueError(f"attention_rows: heads is one of {HEADS}, not {heads!r}")


def _rows(q: Tensor, valid: Tensor | None, first: int, step: int, last: bool) -> Tensor:
    count = q.shape[2]
    places = torch.arange(count, device=q.device)
    if not last:
        return (places[first::step] if step else places[first : first + 1])[None]
    if valid is None:
        return places[-1:][None]
    return torch.where(valid > 0, places, 0).amax(1, keepdim=True)


def _shapes(shapes: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    q, k = shapes[:2]
    return [(q[0], k[2])]


def _count(shapes: list[Any], attrs: dict[str, Any]) -> Any:
    if attrs["last"] or not attrs["step"]:
        return 1
    return (shapes[0][2] - attrs["first"] + attrs["step"] - 1) // attrs["step"]


def _work(shapes: list[Any], attrs: dict[str, Any]) -> Any:
    q, k = shapes[:2]
    return q[0] * q[1] * _count(shapes, attrs) * k[2] * (2 * q[3] + 6)


def _traffic(shapes: list[Any], attrs: dict[str, Any]) -> Any:
    q, k = shapes[:2]
    return numel(k) + q[0] * q[1] * _count(shapes, attrs) * (q[3] + k[2]) + q[0] * k[2]


def _body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    check_heads(attrs["heads"])
    mask, valid = operands[2], operands[3]
    batch, count, keys = b.length("q", 0), b.length("q", 2), b.length("k", 2)
    if not attrs["last"]:
        end = None if attrs["step"] else attrs["first"] + 1
        line = b.slice(b.count(count), 0, attrs["first"], end, attrs["step"] or 1)
        rows = b.unsqueeze(line, 0)
    elif valid is None:
        rows = b.unsqueeze(b("Sub", count, b.constant([1])), 0)
    else:
        places = b("Where", b("Greater", "valid", b.constant(0.0, FLOAT)), b.count(count), b.constant(0))
        rows = b("ReduceMax", places, b.constant([1]), keepdims=1)
    number = b.length(rows, 1)
    everyone = b("Expand", rows, b.join(batch, number))
    q = b.cast(body_take(b, "q", everyone, 4, 2, 0), FLOAT)
    k = b.cast("k", FLOAT)
    if attrs["scale"]:
        scale = b.constant(attrs["scale"], FLOAT)
    else:
        scale = b("Reciprocal", b("Sqrt", b.cast(b.length(q, 3), FLOAT)))
    grouped = b.reshape(b("Mul", q, scale), 0, b.length(k, 1), -1, b.length(q, 3))
    logits = b("MatMul", grouped, b.permute(k, [0, 1, 3, 2]))
    logits = b.reshape(logits, 0, -1, number, keys)
    if mask is not None:
        wide = "mask" if mask[0] == 4 else b.unsqueeze("mask", *range(4 - mask[0]))
        if mask[1] == BOOL:
            wide = b("Where", wide, b.constant(0.0, FLOAT), b.constant(2 * NEVER, FLOAT))
        else:
            wide = b.cast(wide, FLOAT)
        logits = b("Add", logits, _mask_rows(b, wide, rows))
    if attrs["causal"]:
        past = b("LessOrEqual", b.count(keys), b.unsqueeze(rows, 1, 3))
        logits = b("Where", past, logits, b.constant(2 * NEVER, FLOAT))
    found = b("ReduceMean", b("Softmax", logits, axis=-1), b.constant([2]), keepdims=0)
    return [b("ReduceSum" if attrs["heads"] == "sum" else "ReduceMean", found, b.constant([1]), keepdims=0)]


def _mask_rows(b: Body, mask: str, rows: str) -> str:
    """The rows of a mask [b, h, n, m], n perhaps 1, that belong to the chosen queries."""
    length = b.length(mask, 2)
    inside = b("Min", b.cast(rows, INT64), b("Sub", length, b.constant([1])))
    batch = b("Max", b.length(mask, 0), b.length(rows, 0))
    return body_take(b, mask, b("Expand", inside, b.join(batch, b.length(rows, 1))), 4, 2, 0)


OP = OpDef(
    name="attention_rows",
    summary="The attention that every key gets from one query (first, last valid) or the mean of a few.",
    inputs=("q", "k", "mask?", "valid?"),
    outputs=("scores",),
    attrs=(
        Attr("first", 0),
        Attr("step", 0),
        Attr("last", False),
        Attr("heads", "sum"),
        Attr("scale", 0.0),
        Attr("causal", False),
    ),
    reference=attention_rows,
    shapes=_shapes,
    dtypes=lambda dtypes, attrs: ["float32"],
    body=_body,
    work=_work,
    traffic=_traffic,
    source="Chen et al., FastV, ECCV 2024; Arif et al., HiRED, AAAI 2025: the rows; beside the fused op: ours",
)
