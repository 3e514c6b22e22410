"""longest_row: as many slots as the sample that keeps most tokens needs, a length that only the data say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..body import FLOAT, INT64, Body
from ..definition import Attr, OpDef


def longest_row(flags: Tensor, valid: Tensor | None = None, *, prefix: int = 0, suffix: int = 0) -> Tensor:
    """flags [B, N], valid [B or 1, N] (> 0: no padding) -> int64 [S] 0, 1, ..., S-1: `slots` of `drop_tokens`.

    S is the largest number of tokens that a sample wants, as `drop_tokens` counts them (a flag other than 0 and no
    padding, and the first `prefix` and last `suffix` tokens); 1 where none wants any. In graphs of torch S is an
    unbacked symbol. Raises on a batch without samples."""
    length: Any = flags.shape[1]
    asked = flags != 0 if valid is None else (flags != 0) & (valid > 0)
    places = torch.arange(length, device=flags.device)
    stays = asked | (places < prefix) | (places >= length - suffix)
    most: Any = stays.sum(1).amax(0).clamp(min=1).item()
    torch._check(most >= 1)
    torch._check(most <= length)
    return torch.arange(most, device=flags.device)


def _body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    length = b.length("flags", 1)
    stays = b("Not", b("Equal", "flags", b.constant(0.0, FLOAT)))
    if operands[1] is not None:
        stays = b("And", stays, b("Greater", "valid", b.constant(0.0, FLOAT)))
    places = b.count(length)
    if attrs["prefix"]:
        stays = b("Or", stays, b("Less", places, b.constant(attrs["prefix"])))
    if attrs["suffix"]:
        last = b("Sub", length, b.constant([attrs["suffix"]]))
        stays = b("Or", stays, b("GreaterOrEqual", places, last))
    number = b("ReduceSum", b.cast(stays, INT64), b.constant([1]), keepdims=0)
    most = b("Max", b("ReduceMax", number, b.constant([0]), keepdims=1), b.constant([1]))
    return [b.count(most)]


OP = OpDef(
    name="longest_row",
    summary="0, 1, ...: one slot for each token that the sample with most of them keeps.",
    inputs=("flags", "valid?"),
    outputs=("slots",),
    attrs=(Attr("prefix", 0), Attr("suffix", 0)),
    reference=longest_row,
    shapes=lambda shapes, attrs: [(None,)],
    bounds=lambda shapes, attrs: [(shapes[0][1],)],
    dtypes=lambda dtypes, attrs: ["int64"],
    body=_body,
    work=lambda shapes, attrs: 2 * shapes[0][0] * shapes[0][1],
    traffic=lambda shapes, attrs: shapes[0][0] * shapes[0][1],
)
