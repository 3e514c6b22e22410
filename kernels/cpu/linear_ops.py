"""The products in torch: torch.ops.elision_cpu.linear_nbits, linear_rows, linear_topk and linear_spread.

For constant weights there are `linear_packed`, `linear_topk_packed` and `linear_spread_packed`, which take what `pack`
made of them once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernel import NAMESPACES, TORCH_CPU, Dtypes, Kernel, Shapes, add_fake_and_gradient
from ..ops import OPS
from ..ops.linear_nbits import BITS, check
from . import library
from .library import call
from .torch_ops import DTYPES, FLOATS, _at, _float_type

_NAMESPACE = NAMESPACES[TORCH_CPU]
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")
_TYPES = {**DTYPES, torch.uint8: library.UINT8}


def pack(
    weight: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    *,
    bits: int,
    group: int = 0,
    width: int,
) -> Tensor:
    """A weight in the order in which the kernels read it, uint8 [bytes]; `width` columns.

    weight, scales, zeros, bits and group as of `linear_nbits`; with bits 16 or 32 a float weight [n, width] alone.
    Raises ValueError for what the kernels do not take."""
    channels, scale_type, zero_type = weight.shape[0], 0, 0
    if bits in BITS:
        if scales is None:
            raise ValueError(f"a weight of {bits} bits needs scales")
        groups = -(-width // group)
        weight = _dense(weight, (channels, groups, group * bits // 8))
        scales = _dense(scales, (channels, groups))
        scale_type = _TYPES.get(scales.dtype, -1)
        if zeros is not None:
            zeros = _dense(zeros, (channels, groups))
            zero_type = _TYPES.get(zeros.dtype, -1)
        if weight.dtype != torch.uint8:
            raise ValueError(f"a weight of {bits} bits is uint8, not {weight.dtype}")
    else:
        weight, scales, zeros = _dense(weight, (channels, width)), None, None
        if 8 * weight.element_size() != bits:
            raise ValueError(f"a weight of {weight.dtype} has not {bits} bits")
    types = (_TYPES.get(weight.dtype, -1), scale_type, zero_type)
    args = library.Pack(*map(_at, (weight, scales, zeros)), None, channels, width, group, bits, *types)
    size = library.packed_bytes(args)
    if size == 0:
        kinds = [str(t.dtype) for t in (weight, scales, zeros) if t is not None]
        raise ValueError(f"no kernel for weights of {', '.join(kinds)} in groups of {group}")
    packed = torch.frombuffer(library.weight_memory(size), dtype=torch.uint8)
    args.packed = packed.data_ptr()
    call("elision_pack", args, torch.get_num_threads())
    return packed


def _dense(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(x.shape) != shape:
        raise ValueError(f"a part of the weight is {list(x.shape)}, not {list(shape)}")
    return x.contiguous()


def _vector(x: Tensor | None, length: int, what: str) -> Tensor | None:
    if x is None:
        return None
    if tuple(x.shape) != (length,):
        raise ValueError(f"{what} is {list(x.shape)}, not [{length}]")
    return x.to(torch.float32).contiguous()


def linear_packed(x: Tensor, packed: Tensor, bias: Tensor | None = None, *, channels: int) -> Tensor:
    dtype, x, packed = _float_type("linear", x), x.contiguous(), packed.contiguous()
    width, bias = x.shape[-1], _vector(bias, channels, "bias")
    out = x.new_empty((*x.shape[:-1], channels))
    args = library.Linear(
        *map(_at, (x, packed, bias, None, out, None, None, None)),
        *(x.numel() // max(width, 1), width, channels, packed.numel(), 0, 0.0, 0.0, dtype),
    )
    call("elision_linear", args, torch.get_num_threads())
    return out


def linear_topk_packed(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    **attrs: Any,
) -> tuple[Tensor, Tensor]:
    return _largest(x, packed, bias, norm, None, **attrs)


def linear_spread_packed(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    **attrs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    spread = torch.empty((*x.shape[:-1], 2), dtype=torch.float32)
    return *_largest(x, packed, bias, norm, spread, **attrs), spread


def _largest(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    spread: Tensor | None,
    *,
    channels: int,
    k: int,
    eps: float = 1e-6,
    norm_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    dtype, x, packed = _float_type("linear_topk", x), x.contiguous(), packed.contiguous()
    width = x.shape[-1]
    bias, norm = _vector(bias, channels, "bias"), _vector(norm, width, "norm")
    values = torch.empty((*x.shape[:-1], max(k, 0)), dtype=torch.float32)
    indices = torch.empty(values.shape, dtype=torch.int64)
    # The address of a tensor without elements is null, which would ask for the whole product.
    if not 1 <= k <= channels:
        raise ValueError(f"linear_topk: k is between 1 and {channels}, not {k}")
    if values.numel():
        args = library.Linear(
            *map(_at, (x, packed, bias, norm, None, values, indices, spread)),
            *(x.numel() // max(width, 1), width, channels, packed.numel(), k, eps, norm_offset, dtype),
        )
        call("elision_linear", args, torch.get_num_threads())
    return values, indices


# ---- with the weight as the definitions have it: it is packed anew in every call -----------------------------
def linear_nbits(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    **attrs: Any,
) -> Tensor:
    width = x.shape[-1]
    check(
        "linear_nbits",
        attrs["bits"],
        attrs["group"],
        attrs["width"],
        width,
        attrs["channels"],
        weight.shape[0],
    )
    packed = pack(weight, scales, zeros, bits=attrs["bits"], group=attrs["group"], width=width)
    return linear_packed(x, packed, bias, channels=weight.shape[0])


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    packed = pack(weight, bits=8 * weight.element_size(), width=x.shape[-1])
    return linear_packed(x, packed, bias, channels=weight.shape[0])


def linear_topk(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    **attrs: Any,
) -> tuple[Tensor, Tensor]:
    packed, more = _packed_now(x, weight, scales, zeros, attrs)
    return linear_topk_packed(x, packed, bias, norm, **more)


def linear_spread(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    **attrs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    packed, more = _packed_now(x, weight, scales, zeros, attrs)
    return linear_spread_packed(x, packed, bias, norm, **more)


def _packed_now(
    x: Tensor, weight: Tensor, scales: Tensor | None, zeros: Tensor | None, attrs: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    bits = attrs["bits"] if scales is not None else 8 * weight.element_size()
    packed = pack(weight, scales, zeros, bits=bits, group=attrs["group"], width=x.shape[-1])
    more = {name: attrs[name] for name in ("k", "eps", "norm_offset")}
    return packed, {"channels": weight.shape[0], **more}


# ---- what they refuse ----------------------------------------------------------------------------------
def _refuses(shapes: Shapes, dtypes: Dtypes, attrs: dict[str, Any]) -> str:
    """Of (x, weight, scales, zeros, ...)."""
    bits = attrs.get("bits", 32)
    if dtypes[0] not in FLOATS:
        return f"the kernel takes {', '.join(FLOATS)}, not {dtypes[0]}"
    if bits not in BITS:
        return "" if dtypes[1] in FLOATS else f"the kernel takes no weight of {dtypes[1]}"
    scales, zeros = (dtypes[i] if len(dtypes) > i else None for i in (2, 3))
    if scales not in ("float32", "float16"):
        return f"the kernel takes no scales of {scales}"
    if zeros not in (None, "uint8", "float32", "float16"):
        return f"the kernel takes no zeros of {zeros}"
    return ""


def _register(function: Any) -> Kernel:
    op = OPS[function.__name__]

    def kernel(*operands: Any, **attrs: Any) -> Any:
        return function(*operands, **op.complete(attrs))

    _LIBRARY.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(op.name, kernel, "CPU")
    add_fake_and_gradient(op, _NAMESPACE)
    return Kernel(op.name, TORCH_CPU, _refuses)


def _register_packed(function: Any, schema: str, fake: Any) -> None:
    name = function.__name__
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, function, "CPU")
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")  # results carry no gradients
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake)


def _empty_product(x: Tensor, packed: Tensor, bias: Tensor | None = None, *, channels: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], channels))


def _empty_largest(x: Tensor, *rest: Any, k: int, **attrs: Any) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int64)


def _empty_spread(x: Tensor, *rest: Any, k: int, **attrs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return *_empty_largest(x, *rest, k=k), x.new_empty((*x.shape[:-1], 2), dtype=torch.float32)


KERNELS = {
    function.__name__: _register(function)
    for function in (linear_nbits, linear_rows, linear_topk, linear_spread)
}
"""The kernels by op name."""
_register_packed(
    linear_packed,
    "(Tensor x, Tensor packed, Tensor? bias=None, *, int channels) -> Tensor out",
    _empty_product,
)
_register_packed(
    linear_topk_packed,
    "(Tensor x, Tensor packed, Tensor? bias=None, Tensor? norm=None, *, int channels, int k, float eps=1e-06, "
    "float norm_offset=0.0) -> (Tensor values, Tensor indices)",
    _empty_largest,
)
_register_packed(
    linear_spread_packed,
    "(Tensor x, Tensor packed, Tensor? bias=None, Tensor? norm=None, *, int channels, int k, float eps=1e-06, "
    "float norm_offset=0.0) -> (Tensor values, Tensor indices, Tensor spread)",
    _empty_spread,
)
