"""linear_nbits: a product with weights of 4 or 8 bits, which have a scale for every group of columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..body import FLOAT, FLOAT16, FLOATS, INT32, UINT8, Body
from ..definition import Attr, OpDef
from ..lengths import Shape, divide, numel

BITS = (4, 8)
SCALES = (FLOAT, FLOAT16)
"""Types of scales and of offsets that the kernels take."""


def unpack(weight: Tensor, bits: int) -> Tensor:
    """uint8 [n, g, group * bits / 8] -> uint8 [n, g, group]; of a byte, the low nibble comes first."""
    if bits == 8:
        return weight
    return torch.stack([weight & 15, weight >> 4], dim=-1).flatten(2)


def check(op: str, bits: int, group: int, width: int, inside: int, channels: int, outside: int) -> None:
    """Raises ValueError where what the attributes say is not what the operands are."""
    if bits not in BITS:
        raise ValueError(f"{op}: bits is 4 or 8, not {bits}")
    if group != 16 and (group < 32 or group % 32 != 0):
        raise ValueError(f"{op}: group is 16 or a multiple of 32, not {group}")
    if width not in (0, inside) or channels not in (0, outside):
        raise ValueError(f"{op}: a product of {width} -> {channels}, with operands for {inside} -> {outside}")


def dequantize(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, width: int | None = None
) -> Tensor:
    """weight uint8 [n, g, group * bits / 8], scales [n, g], zeros None, uint8 or float [n, g] -> float32 [n, width].

    (q - zero) * scale with zero 2^(bits - 1) or an integer, q * scale + zero with a float."""
    q, scale = unpack(weight, bits).to(torch.float32), scales.to(torch.float32).unsqueeze(2)
    if zeros is None:
        w = (q - float(1 << bits - 1)) * scale
    elif zeros.is_floating_point():
        w = q * scale + zeros.to(torch.float32).unsqueeze(2)
    else:
        w = (q - zeros.to(torch.float32).unsqueeze(2)) * scale
    w = w.flatten(1)
    return w if width is None else w[:, :width]


def linear_nbits(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group: int,
    width: int = 0,
    channels: int = 0,
) -> Tensor:
    """x [..., k], weight uint8 [n, g, group * bits / 8] with g = ceil(k / group), scales [n, g] -> [..., n], as x.

    With 4 bits the even column is the low nibble. w = (q - zero) * scale, where zero is 2^(bits - 1) or, in zeros
    uint8 [n, g], an integer; zeros of a float type are offsets: w = q * scale + zero. bias [n]. What stands behind
    column k in the last group does not matter. Kernels quantize x to 8 bits as well, in blocks of min(group, 32)
    columns of a row: absmax / 127. width and channels repeat k and n (0: not said), so that a file says them."""
    k = x.shape[-1]
    check("linear_nbits", bits, group, width, k, channels, weight.shape[0])
    w = dequantize(weight, scales, zeros, bits=bits, width=k)
    out = torch.nn.functional.linear(x.to(torch.float32), w, None if bias is None else bias.to(torch.float32))
    return out.to(x.dtype)


def shapes(given: list[Any], attrs: dict[str, Any]) -> list[Shape]:
    return [(*given[0][:-1], given[1][0])]


def product_work(given: list[Any], attrs: dict[str, Any]) -> Any:
    """A multiply-add for every element of x and every row of the weight."""
    return 2 * numel(given[0]) * given[1][0]


def stored(given: list[Any], bits: int) -> Any:
    """How many float32 the weight, with its scales and the bias, are as large as."""
    weight, rest = given[1], given[2:5]
    share = divide(numel(weight), 4) if bits in BITS else divide(numel(weight) * bits, 32)
    return share + sum(numel(shape) for shape in rest)


def lengths(given: list[Any], attrs: dict[str, Any]) -> dict[str, int]:
    """width and channels where the operands' shapes say them as numbers."""
    known = {"width": given[0][-1] if given[0] else 0, "channels": given[1][0] if given[1] else 0}
    return {
        name: int(n) for name, n in known.items() if isinstance(n, int) or getattr(n, "is_Integer", False)
    }


# ---- in ONNX -------------------------------------------------------------------------------------------
def write_product(
    b: Body,
    x: str,
    scale_type: tuple[int, int] | None,
    zeros: tuple[int, int] | None,
    attrs: dict[str, Any],
) -> str:
    """x (float32) times the operands "weight", "scales", "zeros": MatMulNBits, or products with what was unpacked where
    the lengths are not known.

    Its integer sums (accuracy_level 4) are wrong where scales or zero points are computed and nobody folds them, in
    onnxruntime 1.32 too; those are left to its floating-point sums."""
    direct = scale_type is not None and scale_type[1] == FLOAT
    scales = "scales" if direct else b.cast("scales", FLOAT)
    if not attrs["width"] or not attrs["channels"]:
        return b("MatMul", x, b.permute(_unpacked(b, x, scales, zeros, attrs), [1, 0]))
    bits, group = attrs["bits"], attrs["group"]
    block = next(size for size in (256, 128, 64, 32, 16) if group % size == 0)
    weight, repeat = "weight", group // block
    if repeat > 1:  # no power of two: several blocks share a scale
        weight = b.reshape(weight, 0, -1, block * bits // 8)
        scales = _repeated(b, scales, repeat)
    operands = [x, weight, scales]
    offset = None
    if zeros is not None and zeros[1] == UINT8:
        operands.append(_packed(b, _repeated(b, "zeros", repeat), bits))
        direct = direct and operands[-1] == "zeros"
    elif zeros is not None:
        # (q - middle) * scale, and what the rest of the offsets adds, from the sums of x over the groups
        whole = "scales" if scale_type is not None and scale_type[1] == FLOAT else b.cast("scales", FLOAT)
        middle = b("Mul", whole, b.constant(float(1 << bits - 1), FLOAT))
        rest = b("Add", b.cast("zeros", FLOAT), middle)
        offset = b("MatMul", _sums(b, x, attrs), b.permute(rest, [1, 0]))
    common: dict[str, Any] = {"accuracy_level": 4 if direct and repeat == 1 else 0}
    if zeros is None and repeat == 1:  # one function for all widths of weights
        out = b("MatMulNBits", *operands, domain="com.microsoft", **common)
        b.refer("bits", "bits")
        b.refer("block_size", "group")
    else:
        out = b("MatMulNBits", *operands, domain="com.microsoft", bits=bits, block_size=block, **common)
    b.refer("K", "width")
    b.refer("N", "channels")
    return out if offset is None else b("Add", out, offset)


def _repeated(b: Body, x: str, times: int) -> str:
    """[n, g] -> [n, g * times], every element that often."""
    if times == 1:
        return x
    wide = b("Expand", b.unsqueeze(x, 2), b.constant([1, 1, times]))
    return b.reshape(wide, 0, -1)


def _packed(b: Body, zeros: str, bits: int) -> str:
    """Zero points uint8 [n, g] as MatMulNBits takes them: two in a byte where they have 4 bits."""
    if bits == 8:
        return zeros
    wide = b.cast(zeros, INT32)
    wide = b(
        "Pad", wide, b.constant([0, 0, 0, 1])
    )  # an odd one has a neighbour; one too many is cut off below
    groups = b.length(zeros, 1)
    even = b.slice(wide, 1, 0, groups, 2)
    odd = b.slice(wide, 1, 1, b("Add", groups, b.constant([1])), 2)
    return b.cast(b("Add", even, b("Mul", odd, b.constant(16, INT32))), UINT8)


def _sums(b: Body, x: str, attrs: dict[str, Any]) -> str:
    """x [..., k] -> [..., g], the sums over groups of columns."""
    group = attrs["group"]
    lead, width = b("Shape", x, end=-1), b.attribute("width")
    more = b(
        "Sub",
        b(
            "Mul",
            b("Div", b("Add", width, b.constant([group - 1])), b.constant([group])),
            b.constant([group]),
        ),
        width,
    )
    flat = b("Reshape", x, b.join(-1, width))
    padded = b("Pad", flat, b("Concat", b.constant([0, 0, 0]), more, axis=0))
    sums = b("ReduceSum", b.reshape(padded, 0, -1, group), b.constant([2]), keepdims=0)
    return b("Reshape", sums, b("Concat", lead, b.length(sums, 1), axis=0))


def _unpacked(b: Body, x: str, scales: str, zeros: tuple[int, int] | None, attrs: dict[str, Any]) -> str:
    """The weight, float32 [n, k]."""
    bits, group = attrs["bits"], attrs["group"]
    q = b.cast("weight", INT32)
    if bits == 4:
        sixteen = b.constant(16, INT32)
        high = b("Div", q, sixteen)
        low = b("Sub", q, b("Mul", high, sixteen))
        q = b.reshape(b("Concat", b.unsqueeze(low, 3), b.unsqueeze(high, 3), axis=3), 0, 0, group)
    w, scale = b.cast(q, FLOAT), b.unsqueeze(scales, 2)
    if zeros is None:
        w = b("Mul", b("Sub", w, b.constant(float(1 << bits - 1), FLOAT)), scale)
    elif zeros[1] == UINT8:
        w = b("Mul", b("Sub", w, b.unsqueeze(b.cast("zeros", FLOAT), 2)), scale)
    else:
        w = b("Add", b("Mul", w, scale), b.unsqueeze(b.cast("zeros", FLOAT), 2))
    return b.slice(b.reshape(w, 0, -1), 1, 0, b.length(x, -1))


def _body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    dtype = operands[0][1]
    x = "x" if dtype == FLOAT else b.cast("x", FLOAT)
    out = write_product(b, x, operands[2], operands[3], attrs)
    if operands[4] is not None:
        out = b("Add", out, b.cast("bias", FLOAT))
    return [out if dtype == FLOAT else b.cast(out, dtype)]


OP = OpDef(
    name="linear_nbits",
    summary="A product with weights of 4 or 8 bits.",
    inputs=("x", "weight", "scales", "zeros?", "bias?"),
    outputs=("out",),
    attrs=(Attr("bits"), Attr("group"), Attr("width", 0), Attr("channels", 0)),
    mixes=1,
    same_bits=True,
    reference=linear_nbits,
    shapes=shapes,
    dtypes=lambda dtypes, attrs: [dtypes[0] or "float32"],
    body=_body,
    work=product_work,
    traffic=lambda given, attrs: (
        numel(given[0]) + stored(given, attrs["bits"]) + numel(shapes(given, attrs)[0])
    ),
    pinned=lengths,
    custom={0: FLOATS, 2: SCALES, 3: (UINT8, *SCALES), 4: (FLOAT,)},
    source="Frantar et al., ICLR 2023 (GPTQ); the layout is that of ONNX Runtime's MatMulNBits",
)
