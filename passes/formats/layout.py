"""The one layout of quantized weights: that of the operands of `linear_nbits`.

A matrix w [N, K] is cut along K into G = ceil(K / group) groups. Each has a scale and either an integer zero point,

    w = (code - zero) * scale            (zero is 2^(bits-1) where there is no array of them)

or an offset, as formats with a minimum per block have it,

    w = code * scale + offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Quantized:
    """A weight of `bits` (4 or 8) with `rows` = N and `width` = K.

    weight: uint8 [N, G, group * bits / 8]; with 4 bits even k in the low half of a byte, with 8 one byte for each.
    scales: float32 or float16 [N, G]. zeros: None, uint8 [N, G] (zero points) or float [N, G] (offsets).
    order: None, or int64 [K]: column j here is column order[j] of the matrix, so that inputs must be taken in it."""

    weight: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    bits: int
    group: int
    width: int
    order: np.ndarray | None = None

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    @property
    def bytes(self) -> int:
        arrays = (self.weight, self.scales, self.zeros, self.order)
        return sum(a.nbytes for a in arrays if a is not None)

    def take(self, rows: np.ndarray) -> Quantized:
        """These rows, in this order."""
        zeros = None if self.zeros is None else self.zeros[rows]
        return replace(self, weight=self.weight[rows], scales=self.scales[rows], zeros=zeros)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes uint8 [..., group] -> bytes uint8 [..., group * bits / 8]. bits: 4 or 8 (ValueError otherwise)."""
    if bits == 8:
        return np.ascontiguousarray(codes, np.uint8)
    if bits != 4:
        raise ValueError(f"weights are packed with 4 or 8 bits, not {bits}")
    return np.ascontiguousarray(codes[..., 0::2] | codes[..., 1::2] << 4)


def unpack(weight: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack`."""
    if bits == 8:
        return weight
    if bits != 4:
        raise ValueError(f"weights are packed with 4 or 8 bits, not {bits}")
    codes = np.empty((*weight.shape[:-1], weight.shape[-1] * 2), np.uint8)
    codes[..., 0::2] = weight & 15
    codes[..., 1::2] = weight >> 4
    return codes


def from_codes(
    codes: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    bits: int,
    width: int,
    order: np.ndarray | None = None,
) -> Quantized:
    """From codes uint8 [N, G, group]."""
    group = codes.shape[-1]
    return Quantized(pack(codes, bits), scales, zeros, bits, group, width, order)


def grouped(w: np.ndarray, group: int, fill: float = 0.0) -> np.ndarray:
    """w [N, K] -> [N, G, group], the last group filled up."""
    rows, width = w.shape
    padding = -width % group
    if padding:
        w = np.pad(w, ((0, 0), (0, padding)), constant_values=fill)
    return w.reshape(rows, -1, group)


def values(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, bits: int) -> np.ndarray:
    """What codes [..., G, group] stand for, float32, in the arithmetic that the op's kernels and GGUF readers share."""
    scale = scales.astype(np.float32)[..., None]
    if zeros is None:
        return (codes.astype(np.float32) - np.float32(2 ** (bits - 1))) * scale
    zero = zeros.astype(np.float32)[..., None]
    if zeros.dtype == np.uint8:
        return (codes.astype(np.float32) - zero) * scale
    return codes.astype(np.float32) * scale + zero


def dequantize(q: Quantized) -> np.ndarray:
    """The matrix that q stands for, float32 [N, K], columns in their own order."""
    found = values(unpack(q.weight, q.bits), q.scales, q.zeros, q.bits)
    found = found.reshape(q.rows, -1)[:, : q.width]
    if q.order is None:
        return np.ascontiguousarray(found)
    result = np.empty_like(found)
    result[:, q.order] = found
    return result


def stacked(parts: Sequence[Quantized]) -> Quantized | None:
    """Rows of several weights as one, brought to one form without loss; None where they cannot be: other widths or
    orders of columns. Where only some have offsets, the products in the offsets of others may round (one ulp)."""
    first = parts[0]
    if any(p.width != first.width or not _same(p.order, first.order) for p in parts):
        return None
    group = min(p.group for p in parts)
    if any(p.group % group for p in parts):
        return None
    if len({_form(p) for p in parts}) > 1:
        parts = [_as_general(p, group, any(_is_offset(p) for p in parts)) for p in parts]
    return replace(
        parts[0],
        weight=np.concatenate([p.weight for p in parts]),
        scales=np.concatenate([p.scales for p in parts]),
        zeros=None
        if parts[0].zeros is None
        else np.concatenate([p.zeros for p in parts if p.zeros is not None]),
    )


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


def _is_offset(q: Quantized) -> bool:
    return q.zeros is not None and q.zeros.dtype != np.uint8


def _form(q: Quantized) -> tuple[object, ...]:
    return q.bits, q.group, q.scales.dtype, None if q.zeros is None else q.zeros.dtype


def _as_general(q: Quantized, group: int, offsets: bool) -> Quantized:
    """In 8 bits and smaller groups, with a zero point or an offset written down for each."""
    codes = unpack(q.weight, q.bits)
    parts = q.group // group
    count = -(-q.width // group)  # groups of nothing but padding go
    codes = codes.reshape(q.rows, -1, group)[:, :count]
    scales = np.repeat(q.scales.astype(np.float32), parts, 1)[:, :count]
    zeros = np.full(q.scales.shape, 2 ** (q.bits - 1), np.uint8) if q.zeros is None else q.zeros
    zeros = np.repeat(zeros, parts, 1)[:, :count]
    if offsets:
        zeros = zeros.astype(np.float32) if _is_offset(q) else -zeros.astype(np.float32) * scales
    return Quantized(pack(codes, 8), scales, zeros, 8, group, q.width, q.order)
