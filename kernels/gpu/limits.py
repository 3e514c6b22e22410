"""What the Triton kernels cannot take, said in a few words; needs no Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ..definition import Attributes
from ..kernel import Dtypes, Shapes
from ..layout import check_axes
from ..lengths import Shape
from ..ops import linear_nbits as nbits

FLOATS = ("float32", "float16", "bfloat16")
COPIED = (*FLOATS, "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
WIDEST_HEAD = 256


def _match(shapes: Shapes, dtypes: Dtypes, attrs: Attributes) -> str:
    if dtypes[0] not in FLOATS:
        return f"a metric of type {dtypes[0]}"
    return ""


def _merge(shapes: Shapes, dtypes: Dtypes, attrs: Attributes) -> str:
    if dtypes[0] not in FLOATS:
        return f"tokens of type {dtypes[0]}"
    x, size, slot, keep, source = shapes
    assert x is not None and slot is not None and keep is not None and source is not None
    check_axes("merge_tokens", len(x), attrs["axis"], attrs["batch_axis"])
    rows = x[attrs["axis"]]
    if _differ(slot[1], rows) or (size is not None and _differ(size[1], rows)):
        return "a map or sizes of another length than the tokens"
    if _differ(keep[0], slot[0]) or _differ(source[0], slot[0]):
        return "a map whose parts differ in batch"
    return _batch(x, attrs, slot, size)


def _restore(shapes: Shapes, dtypes: Dtypes, attrs: Attributes) -> str:
    if dtypes[0] not in COPIED:
        return f"tokens of type {dtypes[0]}"
    y, slot = shapes
    assert y is not None and slot is not None
    check_axes("restore_tokens", len(y), attrs["axis"], attrs["batch_axis"])
    return _batch(y, attrs, slot, None)


def _batch(x: Shape, attrs: Attributes, slot: Shape, size: Shape | None) -> str:
    """Do batches of tokens, map and sizes fit? Each may be 1."""
    own = 1 if attrs["batch_axis"] < 0 else x[attrs["batch_axis"]]
    if attrs["batch_axis"] < 0 and _differ(slot[0], 1):
        return "a batch of maps for tokens without a batch axis"
    if _differ(own, 1) and _differ(slot[0], 1) and _differ(own, slot[0]):
        return f"maps of batch {slot[0]} for tokens of batch {own}"
    batch = own if isinstance(slot[0], int) and slot[0] == 1 else slot[0]
    if size is not None and _differ(size[0], 1) and _differ(size[0], batch):
        return f"sizes of batch {size[0]} for tokens of batch {batch}"
    return ""


def _attention(shapes: Shapes, dtypes: Dtypes, attrs: Attributes) -> str:
    q, k, v, mask, size = shapes
    assert q is not None and k is not None and v is not None
    if dtypes[0] not in FLOATS:
        return f"queries of type {dtypes[0]}"
    if dtypes[1] != dtypes[0] or dtypes[2] != dtypes[0]:
        return f"q, k and v of different types ({dtypes[0]}, {dtypes[1]}, {dtypes[2]})"
    if mask is not None and dtypes[3] not in ("bool", *FLOATS):
        return f"a mask of type {dtypes[3]}"
    if len(q) < 3 or len(k) != len(q) or len(v) != len(q):
        return "q, k and v of unequal rank or without a head axis"
    for width, what in ((q[-1], "query"), (v[-1], "value")):
        if not isinstance(width, int):
            return f"a {what} width that is not known"
        if width > WIDEST_HEAD:
            return f"heads wider than {WIDEST_HEAD}"
    if any(_differ(a, b) or _differ(a, c) for a, b, c in zip(q[:-3], k[:-3], v[:-3])):
        return "q, k and v of different batch"
    if isinstance(q[-3], int) and isinstance(k[-3], int) and (k[-3] == 0 or q[-3] % k[-3]):
        return f"{q[-3]} query heads on {k[-3]} key heads"
    if _differ(k[-1], q[-1]) or _differ(k[-2], v[-2]) or _differ(k[-3], v[-3]):
        return "q, k and v that do not fit together"
    logits = (*q[:-1], k[-2])
    if mask is not None:
        fits = [not _differ(a, b) or not _differ(a, 1) for a, b in zip(reversed(mask), reversed(logits))]
        if len(mask) > len(logits) or not all(fits):
            return "a mask that does not broadcast to the logits"
    if size is not None and (_differ(size[1], k[-2]) or (_differ(size[0], 1) and _differ(size[0], q[0]))):
        return "sizes that do not fit the keys"
    return ""


def _nbits(shapes: Shapes, dtypes: Dtypes, attrs: Attributes) -> str:
    x, weight, scales, zeros, bias = shapes
    assert x is not None and weight is not None and scales is not None
    if dtypes[0] not in FLOATS:
        return f"rows of type {dtypes[0]}"
    if dtypes[1] != "uint8" or dtypes[2] not in FLOATS:
        return f"a weight of type {dtypes[1]} with scales of type {dtypes[2]}"
    if zeros is not None and dtypes[3] not in ("uint8", *FLOATS):
        return f"zeros of type {dtypes[3]}"
    if len(weight) != 3 or len(x) < 1 or not all(isinstance(n, int) for n in (x[-1], *weight)):
        return "a weight whose lengths are not known"
    columns, channels, groups, bits, group = x[-1], weight[0], weight[1], attrs["bits"], attrs["group"]
    nbits.check("linear_nbits", bits, group, attrs["width"], columns, attrs["channels"], channels)
    if columns < 1 or channels < 1 or groups != -(-columns // group) or weight[2] * 8 != group * bits:
        return f"a weight {list(weight)} for {columns} columns in groups of {group}"
    if any(s is not None and tuple(s) != (channels, groups) for s in (scales, zeros)):
        return "scales or zeros that do not fit the weight"
    if bias is not None and (len(bias) != 1 or _differ(bias[0], channels) or dtypes[4] not in FLOATS):
        return "a bias that does not fit the weight"
    return ""


def _cached(shapes: Shapes, dtypes: Dtypes, attrs: Attributes) -> str:
    q, k, v, keys, values, slots, prefix, ancestors, bias = shapes
    assert q and k and v and keys and values and slots and prefix and ancestors is not None
    if dtypes[0] not in FLOATS or dtypes[3] not in FLOATS:
        return f"queries of type {dtypes[0]} on a cache of type {dtypes[3]}"
    if dtypes[1] != dtypes[0] or dtypes[2] != dtypes[0] or dtypes[4] != dtypes[3]:
        return "q, k and v, or the two caches, of different types"
    if any(dtype != "int32" for dtype in dtypes[5:8]) or dtypes[8] not in (None, *FLOATS):
        return f"slots of types {', '.join(map(str, dtypes[5:8]))} or a bias of type {dtypes[8]}"
    ranks = [len(s) for s in (q, k, v, keys, values, slots, prefix, ancestors)]
    if ranks != [4, 4, 4, 3, 3, 1, 2, 2] or _differ(q[0], 1):
        return "operands of other ranks, or more than one batch"
    heads, shared, width, out_width = q[1], keys[0], q[3], values[2]
    if not all(isinstance(n, int) for n in (heads, shared, width, out_width)):
        return "heads or widths that are not known"
    if max(width, out_width) > WIDEST_HEAD:
        return f"heads wider than {WIDEST_HEAD}"
    if shared == 0 or heads % shared:
        return f"{heads} query heads on {shared} key heads"
    one = [(q[2], n) for n in (k[2], v[2], slots[0], prefix[0], ancestors[0])]
    one += [(shared, n) for n in (k[1], v[1], values[0])]
    one += [(width, k[3]), (width, keys[2]), (out_width, v[3]), (keys[1], values[1]), (2, prefix[1])]
    if any(_differ(a, b) for a, b in one):
        return "operands that do not fit together"
    known = bias is None or (len(bias) == 2 and bias[0] in (1, heads))
    if not known or (bias is not None and isinstance(bias[1], int) and bias[1] == 0):
        return "a bias that does not fit the heads"
    return ""


def _differ(a: Any, b: Any) -> bool:
    """Are two lengths known to differ? Where torch traces with symbols, it guards what is asked here."""
    known = (int, torch.SymInt)
    return isinstance(a, known) and isinstance(b, known) and guard_or_false(a != b)


REFUSES: dict[str, Callable[[Shapes, Dtypes, Attributes], str]] = {
    "match_tokens": _match,
    "merge_tokens": _merge,
    "restore_tokens": _restore,
    "attention": _attention,
    "linear_nbits": _nbits,
    "cached_attention": _cached,
}


def check(op: str, operands: list[Tensor | None], attrs: Attributes) -> None:
    """Raises ValueError with the reason where the kernel of `op` refuses these operands."""
    shapes: list[Any] = [None if x is None else tuple(x.shape) for x in operands]
    if op == "attention":  # widths and heads are the model's: a kernel is compiled for just these
        for i, shape in enumerate(shapes[:3]):
            shapes[i] = (*shape[:-3], *(int(n) if j != 1 else n for j, n in enumerate(shape[-3:])))
    elif op == "linear_nbits":
        shapes[0] = (*shapes[0][:-1], int(shapes[0][-1]))
        shapes[1:3] = [tuple(int(n) for n in shape) for shape in shapes[1:3]]
    elif op == "cached_attention":
        shapes[0] = tuple(int(n) if i in (1, 3) else n for i, n in enumerate(shapes[0]))
        shapes[3:5] = [tuple(int(n) if i != 1 else n for i, n in enumerate(s)) for s in shapes[3:5]]
    dtypes = [None if x is None else str(x.dtype).removeprefix("torch.") for x in operands]
    reason = REFUSES[op](shapes, dtypes, attrs)
    if reason:
        raise ValueError(f"elision_triton::{op} does not take {reason}")
