"""Products for the C++ kernels, and what they compute written in numpy: rows as bytes, sums of blocks, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..linear_cases import quantized

ZEROS = ("none", "ints", "floats")


@dataclass(frozen=True)
class Product:
    """One weight of few bits, and rows for it."""

    label: str
    x: Tensor
    parts: list[Tensor | None]  # weight, scales, zeros
    bias: Tensor | None
    bits: int
    group: int

    @property
    def attrs(self) -> dict[str, Any]:
        return {"bits": self.bits, "group": self.group}


def product(
    seed: int,
    rows: int,
    channels: int,
    width: int,
    bits: int,
    group: int,
    zeros: str,
    *,
    scales: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
) -> Product:
    g = torch.Generator().manual_seed(seed)
    parts = quantized(channels, width, bits=bits, group=group, zeros=zeros, scales=scales, generator=g)
    if zeros == "floats" and scales == torch.float16 and parts[2] is not None:
        parts[2] = parts[2].half()
    x = torch.randn(rows, width, generator=g)
    x[:, :: 1 + seed % 7] *= 30  # channels that stand out, as those of language models do
    if seed % 5 == 0:
        x[rows // 2] = 0
    label = f"{seed}: {rows} x {width} -> {channels}, {bits} bits by {group}, {zeros}, {scales}, {dtype}"
    more = torch.randn(channels, generator=g) if bias else None
    return Product(label, x.to(dtype), parts, more, bits, group)


def products() -> Iterator[Product]:
    """Every kind of weight, with lengths that fill no tile, no group and no vector."""
    lengths = ((1, 5, 40), (3, 16, 64), (7, 33, 100), (9, 70, 288), (17, 17, 31), (64, 40, 160))
    seed = 0
    for bits in (4, 8):
        for group in (16, 32, 64, 96, 128):
            for zeros in ZEROS:
                for half in (False, True):
                    seed += 1
                    rows, channels, width = lengths[seed % len(lengths)]
                    kind = torch.float16 if half else torch.float32
                    dtype = (torch.float32, torch.float16, torch.bfloat16, torch.float32)[seed % 4]
                    yield product(
                        seed,
                        rows,
                        channels,
                        width,
                        bits,
                        group,
                        zeros,
                        scales=kind,
                        dtype=dtype,
                        bias=seed % 2 == 0,
                    )


def array(t: Tensor | None) -> np.ndarray[Any, Any] | None:
    return None if t is None else t.numpy() if t.dtype == torch.uint8 else t.float().numpy()


def blocks_of(p: Product) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """x as bytes [rows, groups, blocks, columns], and their scales [rows, groups, blocks], rounded as kernels do."""
    x, groups, block = array(p.x), p.parts[0].shape[1], min(p.group, 32)  # type: ignore[union-attr]
    assert x is not None
    padded = np.zeros((len(x), groups * p.group), np.float32)
    padded[:, : x.shape[1]] = x
    padded = padded.reshape(len(x), groups, p.group // block, block)
    top = np.abs(padded).max(-1)
    scale = (top / np.float32(127)).astype(np.float32)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top >= 1e-30)
    return np.rint(padded * inverse[..., None]), scale


def emulated(p: Product) -> np.ndarray[Any, Any]:
    """The product of the rows as bytes with the weight, float64."""
    q, scale = blocks_of(p)
    weight, scales, zeros = map(array, p.parts)
    assert weight is not None and scales is not None
    if p.bits == 4:
        weight = np.stack([weight & 15, weight >> 4], -1).reshape(*weight.shape[:2], -1)
    middle = 1 << p.bits - 1 if zeros is None else zeros[..., None] if zeros.dtype == np.uint8 else 0
    w = (weight.astype(np.float64) - middle).reshape(len(weight), *q.shape[1:])
    of_groups = np.einsum("mgbk,ngbk,mgb->mng", q.astype(np.float64), w, scale.astype(np.float64))
    total = (of_groups * scales.astype(np.float64)).sum(-1)
    if zeros is not None and zeros.dtype != np.uint8:
        sums = (q.sum(-1).astype(np.float64) * scale).sum(-1)
        total += sums @ zeros.astype(np.float64).T
    return total if p.bias is None else total + array(p.bias)


def allowed(p: Product) -> np.ndarray[Any, Any]:
    """How far the product may be from that of the unrounded rows: half a step of every number, times its weight."""
    from elision.kernels.ops.linear_nbits import dequantize

    _, scale = blocks_of(p)
    weight, scales, zeros = p.parts
    assert weight is not None and scales is not None
    w = dequantize(weight, scales, zeros, bits=p.bits, width=p.x.shape[1])
    padded = torch.zeros(w.shape[0], weight.shape[1] * p.group, dtype=torch.float64)
    padded[:, : w.shape[1]] = w.abs()
    per_block = padded.reshape(w.shape[0], *scale.shape[1:], -1).sum(-1).numpy()
    return 0.5 * np.einsum("mgb,ngb->mn", scale.astype(np.float64), per_block)
