"""torch.ops.elision_cpu for step graphs: attention that writes into the caches it is given, and gated activations."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernel import NAMESPACES, TORCH_CPU, Dtypes, Kernel, Shapes, add_fake_and_gradient
from ..ops import OPS
from ..ops.gated import FUNCTIONS, check_function
from ..ops.joined_cached_attention import NONE
from . import library
from .library import call

CACHES = {torch.float32: library.FLOAT32, torch.float16: library.FLOAT16, torch.bfloat16: library.BFLOAT16}
CACHED = ("cached_attention", "joined_cached_attention")

_LIBRARY = torch.library.Library(NAMESPACES[TORCH_CPU], "FRAGMENT")


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _dense(*tensors: Tensor | None, dtype: torch.dtype) -> list[Tensor | None]:
    return [None if x is None else x.to(dtype).contiguous() for x in tensors]


def _strides(*pairs: Sequence[int]) -> list[Any]:
    return [(ctypes.c_int64 * 2)(*pair) for pair in pairs]


def cached_refuses(shapes: Shapes, dtypes: Dtypes) -> str:
    """Why the kernel cannot take these operands of one of the two attentions, "" where it can."""
    if any(d not in (None, "float32") for d in dtypes[:3]):
        return f"the kernel takes rows of float32, not {next(d for d in dtypes[:3] if d not in (None, 'float32'))}"
    if dtypes[3] != dtypes[4] or dtypes[3] not in ("float32", "float16", "bfloat16"):
        return f"the kernel takes no caches of {dtypes[3]} and {dtypes[4]}"
    return ""


def _attend(name: str, operands: Sequence[Tensor | None], attrs: dict[str, Any]) -> Tensor:
    """Write the new rows into the caches, attend, return what the rows get."""
    reason = cached_refuses(
        [None if x is None else x.shape for x in operands],
        [None if x is None else str(x.dtype).removeprefix("torch.") for x in operands],
    )
    if reason:
        raise ValueError(f"{name}: {reason}")
    q, k, v, keys, values, slots, prefix, ancestors, bias, *rest = operands
    assert q is not None and keys is not None and values is not None
    cos, sin, q_norm, k_norm = _dense(*(rest or [None] * 4), dtype=torch.float32)
    (bias,) = _dense(bias, dtype=torch.float32)
    slots, prefix, ancestors = _dense(slots, prefix, ancestors, dtype=torch.int32)
    assert slots is not None and prefix is not None and ancestors is not None
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError(f"{name}: the caches are not contiguous")
    (shared, capacity, width), value_width = keys.shape, values.shape[-1]
    if "heads" in attrs:
        heads, rows, dense = attrs["heads"], q.shape[1], q.contiguous()
        first, second = heads * width, (heads + shared) * width
        whole = second + shared * value_width
        if k is None or v is None:
            if dense.shape[-1] != whole or attrs["kv_heads"] != shared:
                raise ValueError(
                    f"{name}: {dense.shape[-1]} channels are not {heads} and twice {shared} heads"
                )
            q, k, v = dense, dense[..., first:second], dense[..., second:]
            strides = [(whole, width), (whole, width), (whole, value_width)]
        else:
            (q, k, v) = (dense, k.contiguous(), v.contiguous())
            strides = [(x.shape[-1], w) for x, w in ((q, width), (k, width), (v, value_width))]
            _check(
                name,
                (q, k, v),
                [(1, rows, h * w) for h, w in zip((heads, shared, shared), (width, width, value_width))],
            )
        out = q.new_empty((1, rows, heads * value_width))
        strides.append((heads * value_width, value_width))
    else:
        assert k is not None and v is not None
        heads, rows = q.shape[1], q.shape[2]
        _check(
            name,
            (q, k, v),
            [(1, heads, rows, width), (1, shared, rows, width), (1, shared, rows, value_width)],
        )
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out = q.new_empty((1, rows, heads, value_width)).transpose(1, 2)
        strides = [(x.stride(2), x.stride(1)) for x in (q, k, v, out)]
    _check(name, (values, slots, prefix), [(shared, capacity, value_width), (rows,), (rows, 2)])
    _check(name, (ancestors,), [(rows, ancestors.shape[-1])])
    turned = 0 if cos is None or sin is None else cos.shape[-1]
    if turned:
        _check(name, [x.flatten(0, -2) for x in (cos, sin) if x is not None], [(rows, turned)] * 2)
    args = library.Cached(
        *map(_at, (q, k, v, out, keys, values, slots, prefix, ancestors, bias, cos, sin, q_norm, k_norm)),
        *(rows, heads, shared, capacity, width, value_width, ancestors.shape[1]),
        *((0, 0) if bias is None else bias.shape),
        *(turned, 0 if q_norm is None else q_norm.numel(), 0 if k_norm is None else k_norm.numel()),
        *_strides(*strides),
        *(attrs["window"], attrs["scale"] or max(width, 1) ** -0.5, attrs["softcap"]),
        *(attrs.get("eps", 0.0), attrs.get("norm_offset", 0.0)),
        *(attrs["key_bias"], attrs.get("rotary", NONE), CACHES[keys.dtype]),
    )
    call("elision_cached", args, torch.get_num_threads())
    return out


def _check(name: str, tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> None:
    for x, shape in zip(tensors, shapes):
        if tuple(x.shape) != tuple(shape):
            raise ValueError(f"{name}: an operand is {list(x.shape)}, not {list(shape)}")


def mutating_schema(name: str) -> str:
    """The schema of the op whose caches are written to: `name_`, with one result."""
    schema = OPS[name].schema.replace(name, f"{name}_", 1)
    schema = schema.replace("Tensor key_cache", "Tensor(a!) key_cache")
    return schema.replace("Tensor value_cache", "Tensor(b!) value_cache").partition(" -> ")[0] + " -> Tensor"


def _register(name: str) -> Any:
    op = OPS[name]

    def kernel(*operands: Tensor | None, **attrs: Any) -> Tensor:
        given = [*operands, *[None] * (len(op.inputs) - len(operands))]
        return _attend(name, given, op.complete(attrs))

    def shaped(*operands: Tensor | None, **attrs: Any) -> Tensor:
        q, values = operands[0], operands[4]
        assert q is not None and values is not None
        if "heads" in attrs:
            return q.new_empty((q.shape[0], q.shape[1], attrs["heads"] * values.shape[-1]))
        return q.new_empty((q.shape[0], q.shape[2], q.shape[1], values.shape[-1])).transpose(1, 2)

    _LIBRARY.define(mutating_schema(name), tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(f"{name}_", kernel, "CPU")
    torch.library.register_fake(f"{NAMESPACES[TORCH_CPU]}::{name}_", shaped)
    return getattr(getattr(torch.ops, NAMESPACES[TORCH_CPU]), f"{name}_").default


def gated(x: Tensor, y: Tensor | None = None, *, fn: str = "silu") -> Tensor:
    check_function(fn)
    if x.dtype != torch.float32 or (y is not None and y.dtype != torch.float32):
        raise ValueError(f"gated: the kernel takes float32, not {x.dtype if y is None else y.dtype}")
    if y is None:
        x = x.contiguous()
        width = x.shape[-1] // 2
        if x.shape[-1] % 2:
            raise ValueError(f"gated: {x.shape[-1]} channels are not two halves")
        at, stride, shape = x.data_ptr() + 4 * width, 2 * width, (*x.shape[:-1], width)
    else:
        if x.shape != y.shape:
            raise ValueError(f"gated: {list(x.shape)} and {list(y.shape)} differ")
        x, y = x.contiguous(), y.contiguous()
        width = x.shape[-1]
        at, stride, shape = y.data_ptr(), width, tuple(x.shape)
    out = x.new_empty(shape)
    rows = out.numel() // width if width else 0
    args = library.Gated(_at(x), at, _at(out), rows, width, stride, stride, list(FUNCTIONS).index(fn))
    call("elision_gated", args, torch.get_num_threads())
    return out


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    return _norm(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    if x.shape != residual.shape:
        raise ValueError(f"add_rms_norm: {list(x.shape)} and {list(residual.shape)} differ")
    out, total = _norm(x, residual, weight, eps)
    assert total is not None
    return out, total


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    given = [x, weight] if residual is None else [x, weight, residual]
    wrong = [t.dtype for t in given if t.dtype != torch.float32]
    if wrong:
        raise ValueError(f"rms_norm: the kernel takes float32, not {wrong[0]}")
    width = x.shape[-1]
    if weight.shape != (width,):
        raise ValueError(f"rms_norm: {list(weight.shape)} weights for {width} channels")
    x, weight = x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    out = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    rows = x.numel() // width if width else 0
    args = library.Norm(_at(x), _at(residual), _at(weight), _at(out), _at(total), rows, width, eps)
    call("elision_norm", args, torch.get_num_threads())
    return out, total


def _wants_floats(shapes: Shapes, dtypes: Dtypes, attrs: dict[str, Any]) -> str:
    wrong = [d for d in dtypes if d not in (None, "float32")]
    return f"the kernel takes float32, not {wrong[0]}" if wrong else ""


def _register_functional(name: str, kernel: Any) -> Kernel:
    op = OPS[name]
    _LIBRARY.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CPU")
    add_fake_and_gradient(op, NAMESPACES[TORCH_CPU])
    return Kernel(name, TORCH_CPU, _wants_floats)


MUTATING = {name: _register(name) for name in CACHED}
"""By op: the overload that writes into its caches and returns what the rows get."""

_FUNCTIONAL = {"gated": gated, "rms_norm": rms_norm, "add_rms_norm": add_rms_norm}

KERNELS = {name: _register_functional(name, kernel) for name, kernel in _FUNCTIONAL.items()}
