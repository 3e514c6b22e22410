"""torch.ops.elision_cpu: the C++ kernels on torch's data pointers, on as many threads as torch uses."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..definition import Attributes
from ..kernel import NAMESPACES, TORCH_CPU, Dtypes, Kernel, Shapes, add_fake_and_gradient
from ..layout import check_axes
from ..lengths import fraction, removable
from ..ops import OPS
from ..ops.match_tokens import check_order
from . import library
from .library import call

DTYPES = {
    torch.float32: library.FLOAT32,
    torch.float16: library.FLOAT16,
    torch.bfloat16: library.BFLOAT16,
    torch.bool: library.BOOL,
}
FLOATS = ("float32", "float16", "bfloat16")

library.variant()  # RuntimeError here where there is no library
for _openmp in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
    library.borrow_threads(_openmp)
_LIBRARY = torch.library.Library(NAMESPACES[TORCH_CPU], "DEF")


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _map(*tensors: Tensor) -> list[Tensor]:
    """A token map as the kernels read it."""
    return [t.to(torch.int32).contiguous() for t in tensors]


def _size(size: Tensor | None) -> Tensor | None:
    return None if size is None else size.to(torch.float32).contiguous()


def _fits(op: str, size: Tensor | None, count: int) -> None:
    """The library reads `count` sizes a row; that it cannot check."""
    if size is not None and (size.dim() != 2 or size.shape[1] != count):
        raise ValueError(f"{op}: size is {list(size.shape)}, not [batch, {count}]")


def _float_type(op: str, x: Tensor) -> int:
    if x.dtype not in DTYPES or x.dtype == torch.bool:
        raise ValueError(f"{op}: the kernel takes float32, float16 and bfloat16, not {x.dtype}")
    return DTYPES[x.dtype]


# ---- the kernels ---------------------------------------------------------------------------------------
def _match(op: str, metric: Tensor, size: Tensor | None, attrs: Attributes) -> tuple[Tensor, ...]:
    check_order(op, attrs["order"])
    dtype, metric, size = _float_type(op, metric), metric.contiguous(), _size(size)
    batch, count, width = metric.shape
    _fits(op, size, count)
    r, prefix, suffix = attrs["r"], attrs["prefix"], attrs["suffix"]
    gone = removable(count, r, attrs["ratio"], prefix + suffix)
    share = fraction(max(attrs["ratio"], 0.0))
    slot, keep, source = (torch.empty((batch, n), dtype=torch.int32) for n in (count, count - gone, gone))
    args = library.Match(
        *map(_at, (metric, size, slot, keep, source)),
        *(batch, count, width, 1 if size is None else size.shape[0], gone),
        *(r, share.numerator, share.denominator, prefix, suffix),
        *(dtype, attrs["order"] == "published"),
    )
    call("elision_match", args, torch.get_num_threads())
    return slot, keep, source


def match_tokens(metric: Tensor, **attrs: Any) -> tuple[Tensor, ...]:
    return _match("match_tokens", metric, None, attrs)


def match_padded_tokens(metric: Tensor, size: Tensor, **attrs: Any) -> tuple[Tensor, ...]:
    return _match("match_padded_tokens", metric, size, attrs)


def mean_heads(k: Tensor) -> Tensor:
    dtype, k = _float_type("mean_heads", k), k if k.stride(-1) == 1 else k.contiguous()
    batch, heads, tokens, width = k.shape
    metric = k.new_empty((batch, tokens, width))
    strides = (ctypes.c_int64 * 3)(*k.stride()[:3])
    args = library.Mean(_at(k), _at(metric), batch, heads, tokens, width, strides, dtype)
    call("elision_mean", args, torch.get_num_threads())
    return metric


def _layout(shape: Sequence[int], axis: int, batch_axis: int) -> library.Layout:
    """Where tokens and batch stand in a dense tensor."""
    low, high = (axis, axis) if batch_axis < 0 else sorted((axis, batch_axis))
    pre = mid = width = 1
    for a, length in enumerate(shape):
        if a < low:
            pre *= length
        elif low < a < high:
            mid *= length
        elif a > high:
            width *= length
    return library.Layout(pre, mid, width, batch_axis > axis)


def _joint_batch(op: str, x: Tensor, batch_axis: int, of_map: int) -> tuple[int, int]:
    """The batch of x, and that of x and the map together."""
    if batch_axis < 0 and of_map != 1:
        raise ValueError(f"{op}: without a batch axis the map is one sample, not {of_map}")
    own = x.shape[batch_axis] if batch_axis >= 0 else 1
    return own, 0 if not own or not of_map else max(own, of_map)


def merge_tokens(
    x: Tensor, size: Tensor | None, slot: Tensor, keep: Tensor, source: Tensor, *, axis: int, batch_axis: int
) -> tuple[Tensor, Tensor]:
    check_axes("merge_tokens", x.dim(), axis, batch_axis)
    dtype, x, size = _float_type("merge_tokens", x), x.contiguous(), _size(size)
    slot, keep, source = _map(slot, keep, source)
    rows, count, left, gone = slot.shape[0], x.shape[axis], keep.shape[1], source.shape[1]
    own, batch = _joint_batch("merge_tokens", x, batch_axis, rows)
    _fits("merge_tokens", size, count)
    if slot.shape[1] != count:
        raise ValueError(f"merge_tokens: the map is for {slot.shape[1]} tokens, x has {count}")
    if keep.shape[0] != rows or source.shape[0] != rows:
        raise ValueError("merge_tokens: the tensors of the map differ in their batch")
    shape = list(x.shape)
    shape[axis] = left
    if batch_axis >= 0:
        shape[batch_axis] = batch
    y, new_size = x.new_empty(shape), torch.empty((batch, left), dtype=torch.float32)
    args = library.Merge(
        *map(_at, (x, y, size, slot, keep, source, new_size)),
        *(batch, own, 1 if size is None else size.shape[0], rows, count, left, gone),
        *(_layout(x.shape, axis, batch_axis), dtype),
    )
    call("elision_merge", args, torch.get_num_threads())
    return y, new_size


def restore_tokens(y: Tensor, slot: Tensor, *, axis: int, batch_axis: int) -> Tensor:
    check_axes("restore_tokens", y.dim(), axis, batch_axis)
    y, (slot,) = y.contiguous(), _map(slot)
    rows = slot.shape[0]
    own, batch = _joint_batch("restore_tokens", y, batch_axis, rows)
    shape = list(y.shape)
    shape[axis] = slot.shape[1]
    if batch_axis >= 0:
        shape[batch_axis] = batch
    x = y.new_empty(shape)
    args = library.Restore(
        *map(_at, (y, x, slot)),
        *(batch, own, rows, slot.shape[1], y.shape[axis]),
        *(_layout(y.shape, axis, batch_axis), y.element_size()),
    )
    call("elision_restore", args, torch.get_num_threads())
    return x


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    size: Tensor | None = None,
    *,
    scale: float,
    causal: bool,
) -> Tensor:
    reason = _attention_refuses(
        [None if x is None else x.shape for x in (q, k, v, mask, size)],
        [None if x is None else str(x.dtype).removeprefix("torch.") for x in (q, k, v, mask, size)],
        {},
    )
    if reason:
        raise ValueError(f"attention: {reason}")
    (batch, heads, queries, width), (_, shared, keys, _) = q.shape, k.shape
    k, v = k.expand(batch, -1, -1, width), v.expand(batch, shared, keys, -1)
    _fits("attention", size, keys)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    size = _size(size)
    # Tokens before heads, as torch's own kernel leaves it: models join the heads next, and that is then a view.
    out = empty_out(q, v.shape[-1])
    offsets, strides = None, (0, 0, 0)
    if mask is not None:
        full = mask.expand(batch, heads, queries, keys)
        offsets = (ctypes.c_int64 * batch)(*(b * full.stride(0) for b in range(batch)))
        strides = full.stride()[1:]
    triple = ctypes.c_int64 * 3
    args = library.Attention(
        *map(_at, (q, k, v, out, mask)),
        *(None if offsets is None else ctypes.addressof(offsets), _at(size)),
        *(batch, heads, shared, queries, keys, width, v.shape[-1]),
        *(1 if size is None else size.shape[0], 1),
        *(triple(*x.stride()[:3]) for x in (q, k, v, out)),
        triple(*strides),
        *(scale or max(width, 1) ** -0.5, float("-inf"), causal),
        *(DTYPES[q.dtype], 0 if mask is None else DTYPES[mask.dtype]),
    )
    call("elision_attention", args, torch.get_num_threads())
    return out


def empty_out(q: Tensor, width: Any) -> Tensor:
    """Room for the result of attention, [b, h, n, e] over memory [b, n, h, e]."""
    batch, heads, queries, _ = q.shape
    return q.new_empty((batch, queries, heads, width)).transpose(1, 2)


# ---- what they refuse ----------------------------------------------------------------------------------
def _only_floats(shapes: Shapes, dtypes: Dtypes, attrs: Attributes) -> str:
    return "" if dtypes[0] in FLOATS else f"the kernel takes {', '.join(FLOATS)}, not {dtypes[0]}"


def _anything(shapes: Shapes, dtypes: Dtypes, attrs: Attributes) -> str:
    return "the kernel moves no complex numbers" if str(dtypes[0]).startswith("complex") else ""


def _attention_refuses(shapes: Shapes, dtypes: Dtypes, attrs: Attributes) -> str:
    if any(s is not None and len(s) != 4 for s in shapes[:3]):
        return "the kernel takes [b, h, n, d] only"
    if len({dtypes[i] for i in range(3)}) > 1:
        return "q, k and v differ in type"
    if len(dtypes) > 3 and dtypes[3] not in (None, "bool", *FLOATS):
        return f"the kernel takes no mask of {dtypes[3]}"
    return _only_floats(shapes, dtypes, attrs)


_REFUSALS = {
    match_tokens: _only_floats,
    match_padded_tokens: _only_floats,
    mean_heads: _only_floats,
    merge_tokens: _only_floats,
    restore_tokens: _anything,
    attention: _attention_refuses,
}


def _register(function: Any, refuses: Any) -> Kernel:
    op = OPS[function.__name__]

    def kernel(*operands: Any, **attrs: Any) -> Any:
        return function(*operands, **op.complete(attrs))

    _LIBRARY.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(op.name, kernel, "CPU")
    empty = (lambda q, k, v, *rest: empty_out(q, v.shape[-1])) if op.name == "attention" else None
    add_fake_and_gradient(op, NAMESPACES[TORCH_CPU], empty=empty)
    return Kernel(op.name, TORCH_CPU, refuses)


KERNELS = {function.__name__: _register(function, refuses) for function, refuses in _REFUSALS.items()}
"""The kernels by op name."""
