"""shift_map, range_size, slice_tokens: a stretch of the tokens, counted from both ends."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..body import INT32, Body
from ..definition import Attr, OpDef
from ..lengths import Dim, Shape


def shift_map(
    slot: Tensor, keep: Tensor, source: Tensor, *, start: int, stop: int
) -> tuple[Tensor, Tensor, Tensor]:
    """slot [B, N], keep [B, N'], source [B, N-N'] int32 -> the same map for tokens start ... N-stop-1.

    The first `start` and the last `stop` tokens must be protected: at both ends they keep their place."""
    slots = _cut(slot, start, stop)
    shifted = (slots - start).masked_fill(slots < 0, -1)
    return shifted, _cut(keep, start, stop) - start, source - start


def range_size(size: Tensor, *, start: int, stop: int) -> Tensor:
    """size [B, N] -> the sizes of tokens start ... N-stop-1."""
    return _cut(size, start, stop).clone()


def slice_tokens(x: Tensor, *, axis: int, start: int = 0, end: int = 0, keepdim: bool = True) -> Tensor:
    """x[start:end] along `axis`. A negative start, and an end <= 0, count from the end of the axis.

    keepdim False: the axis (then of length 1) is removed."""
    first, last = _bounds(x.shape[axis], start, end)
    part = x.narrow(axis, first, last - first)
    return part.clone() if keepdim else part.squeeze(axis).clone()


def _cut(x: Tensor, start: int, stop: int) -> Tensor:
    return x[:, start : x.shape[1] - stop]


def _bounds(length: Dim, start: int, end: int) -> tuple[Dim, Dim]:
    return (start if start >= 0 else length + start), (end if end > 0 else length + end)


def _map_shapes(shapes: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    gone = attrs["start"] + attrs["stop"]
    slot, keep, source = shapes
    return [(slot[0], slot[1] - gone), (keep[0], keep[1] - gone), tuple(source)]


def _slice_shapes(shapes: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    shape, axis = list(shapes[0]), attrs["axis"]
    first, last = _bounds(shape[axis], attrs["start"], attrs["end"])
    if not attrs["keepdim"]:
        return [tuple(shape[:axis] + shape[axis + 1 :])]
    shape[axis] = last - first
    return [tuple(shape)]


def _part(b: Body, x: str, axis: int, start: int, stop: int) -> str:
    if not start and not stop:
        return x
    return b.slice(x, axis, start, -stop if stop else None)


def _map_body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    start, stop = attrs["start"], attrs["stop"]
    offset, none = b.constant(start, INT32), b.constant(-1, INT32)
    slots = _part(b, "slot", 1, start, stop)
    keeps = _part(b, "keep", 1, start, stop)
    return [
        b("Max", b("Sub", slots, offset), none),
        b("Sub", keeps, offset),
        b("Sub", "source", offset),
    ]


def _slice_body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    axis, end = attrs["axis"], attrs["end"]
    part = b.slice("x", axis, attrs["start"], None if end == 0 else end)
    return [part if attrs["keepdim"] else b.squeeze(part, axis)]


MAP = OpDef(
    name="shift_map",
    summary="The same map for the tokens between `start` protected ones and `stop` protected ones.",
    inputs=("slot", "keep", "source"),
    outputs=("slot_part", "keep_part", "source_part"),
    attrs=(Attr("start", 0), Attr("stop", 0)),
    reference=shift_map,
    shapes=_map_shapes,
    dtypes=lambda dtypes, attrs: ["int32"] * 3,
    body=_map_body,
    work=lambda shapes, attrs: 0,
    full_precision=False,
)
SIZE = OpDef(
    name="range_size",
    summary="The sizes of the tokens between the first `start` and the last `stop`.",
    inputs=("size",),
    outputs=("size_part",),
    attrs=(Attr("start", 0), Attr("stop", 0)),
    reference=range_size,
    shapes=lambda shapes, attrs: [(shapes[0][0], shapes[0][1] - attrs["start"] - attrs["stop"])],
    dtypes=lambda dtypes, attrs: ["float32"],
    body=lambda b, operands, attrs: [_part(b, "size", 1, attrs["start"], attrs["stop"])],
    work=lambda shapes, attrs: 0,
    full_precision=False,
)
SLICE = OpDef(
    name="slice_tokens",
    summary="Tokens start … end-1 along one axis, counted from either end; `keepdim=False` selects one.",
    inputs=("x",),
    outputs=("part",),
    attrs=(Attr("axis"), Attr("start", 0), Attr("end", 0), Attr("keepdim", True)),
    reference=slice_tokens,
    shapes=_slice_shapes,
    dtypes=lambda dtypes, attrs: [dtypes[0] or "float32"],
    body=_slice_body,
    work=lambda shapes, attrs: 0,
    full_precision=False,
)
