"""adaptive_counts: how many tokens each row needs, by what its scores are like."""

from __future__ import annotations

from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from ..body import FLOAT, INT32, INT64, Body
from ..definition import Attr, OpDef
from .match_tokens import body_sorted

DOUBLE = int(TensorProto.DOUBLE)


def adaptive_counts(
    score: Tensor, among: Tensor | None = None, *, capacity: int, mass: float = 0.0
) -> Tensor:
    """score [G, P] (below 0, or where `among` [G, P] is: no candidate) -> counts int32 [G], from 1 to `capacity`.

    With `mass` the fewest tokens whose scores add up to that share of the sum of all. Without, as many as are outliers:
    above the third quartile by more than 1.5 times what lies between the first and the third (quartiles between two
    scores by linear interpolation). A row without candidates has count 0."""
    candidate = score >= 0 if among is None else (score >= 0) & (among >= 0)
    found = candidate.sum(1, keepdim=True)
    line = torch.sort(torch.where(candidate, score, -1.0), dim=1, descending=True).values.double()
    line = line.clamp(min=0)  # candidates come first
    if mass:
        before = torch.cumsum(line, 1) - line
        needed = (before < mass * line.sum(1, keepdim=True)) & (line > 0)
    else:
        first, third = _quarter(line, found, 3), _quarter(line, found, 1)
        needed = line > third + 1.5 * (third - first)
    count = needed.sum(1).clamp(min=1, max=capacity)
    return torch.minimum(count, found[:, 0]).int()


def _quarter(line: Tensor, found: Tensor, quarters: int) -> Tensor:
    """What stands `quarters` of the way down a line in descending order of `found` scores, [G, 1]."""
    last = (found - 1).clamp(min=0)
    place = quarters * last
    low = place // 4
    share = (place % 4).double() / 4
    above = torch.gather(line, 1, low)
    below = torch.gather(line, 1, torch.minimum(low + 1, last))
    return above + (below - above) * share


def _body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    score = b.cast("score", FLOAT)
    none, along = b.constant(0.0, FLOAT), b.constant([1])
    candidate = b("GreaterOrEqual", score, none)
    if operands[1] is not None:
        candidate = b("And", candidate, b("GreaterOrEqual", "among", none))
    found = b("ReduceSum", b.cast(candidate, INT64), along, keepdims=1)
    line = body_sorted(b, b("Where", candidate, score, b.constant(-1.0, FLOAT)), largest=True)[0]
    zero = b.constant(0.0, DOUBLE)
    line = b("Max", b.cast(line, DOUBLE), zero)
    if attrs["mass"]:
        before = b("Sub", b("CumSum", line, b.constant(1)), line)
        share = b("Mul", b("ReduceSum", line, along, keepdims=1), b.constant(attrs["mass"], DOUBLE))
        needed = b("And", b("Less", before, share), b("Greater", line, zero))
    else:
        last = b("Max", b("Sub", found, b.constant(1)), b.constant(0))
        first, third = (_body_quarter(b, line, last, quarters) for quarters in (3, 1))
        over = b("Mul", b.constant(1.5, DOUBLE), b("Sub", third, first))
        needed = b("Greater", line, b("Add", third, over))
    count = b("ReduceSum", b.cast(needed, INT64), along, keepdims=1)
    count = b("Min", b("Max", count, b.constant(1)), b.constant(attrs["capacity"]), found)
    return [b.cast(b("Squeeze", count, along), INT32)]


def _body_quarter(b: Body, line: str, last: str, quarters: int) -> str:
    place = b("Mul", last, b.constant(quarters))
    low = b("Div", place, b.constant(4))
    share = b("Div", b.cast(b("Mod", place, b.constant(4)), DOUBLE), b.constant(4.0, DOUBLE))
    above = b("GatherElements", line, low, axis=1)
    below = b("GatherElements", line, b("Min", b("Add", low, b.constant(1)), last), axis=1)
    return b("Add", above, b("Mul", b("Sub", below, above), share))


OP = OpDef(
    name="adaptive_counts",
    summary="How many tokens hold a share of a row's scores, or are outliers among them, up to a capacity.",
    inputs=("score", "among?"),
    outputs=("counts",),
    attrs=(Attr("capacity"), Attr("mass", 0.0)),
    reference=adaptive_counts,
    shapes=lambda shapes, attrs: [(shapes[0][0],)],
    dtypes=lambda dtypes, attrs: ["int32"],
    body=_body,
    work=lambda shapes, attrs: 6 * shapes[0][0] * shapes[0][1],
    chooses=True,
    source="outliers: Shang et al., LLaVA-PruMerge, ICCV 2025; a share of the scores, capacity and order: ours",
)
