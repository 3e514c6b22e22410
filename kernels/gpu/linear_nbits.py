"""linear_nbits in Triton: weights of 4 or 8 bits become floats in registers; a row has the same bits in any company.

Rows come in tiles of 16, and a tile is multiplied by the same instructions, block of columns by block of columns,
whether it holds 1 row or 16 and whether 1 or 4 tiles share the unpacked weights. The columns are split into a number
of parts that hangs on the weight alone, and their sums are added in the order of the parts. So a row's bits are the
same for every number of rows: for 1 to 64, which one program takes, and above, where each further 64 rows unpack the
weights again (this is no kernel for prompts of thousands of rows)."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.linear_nbits import OP
from .launch import INTERPRETED, precision, register, tuned, wrap_triton

NO_ZEROS, INT_ZEROS, OFFSETS = 0, 1, 2
TILE = (
    16  # rows of the smallest product of matrices that tensor cores take; larger ones have other instructions
)
MOST_SPLITS = 16
PROGRAMS = 512  # of one tile of rows: a few for each multiprocessor of a large GPU

# Bytes of an element of x -> columns per block, which decide what is added up in which order and therefore are one and
# the same for all choices; (channels per block, warps, stages) to choose from.
TABLE: dict[int, tuple[int, tuple[tuple[int, int, int], ...]]] = {
    2: (128, ((64, 8, 2), (32, 8, 2), (32, 4, 1))),
    4: (32, ((32, 4, 3), (32, 4, 2))),
}
CONFIGS = [
    triton.Config({"BLOCK_N": channels, "BLOCK_K": columns}, num_warps=warps, num_stages=stages)
    for columns, choices in TABLE.values()
    for channels, warps, stages in choices
]
ADD_CONFIGS = [triton.Config({"BLOCK": n}, num_warps=4, num_stages=2) for n in (256, 512, 1024)]


def fits(config: triton.Config, arguments: dict[str, Any]) -> bool:
    """Has the configuration the blocks of this element type?"""
    return config.kwargs["BLOCK_K"] == TABLE[arguments["x"].element_size()][0]


def splits(columns: int, channels: int, item: int) -> int:
    """Into how many parts the columns are split: a power of two, from the weight's lengths and x's type only."""
    steps = triton.cdiv(columns, TABLE[item][0])
    wanted = min(MOST_SPLITS, PROGRAMS // triton.cdiv(channels, 64), steps // 2)
    return 1 << max(wanted, 1).bit_length() - 1


def tiles(rows: Any) -> int:
    """How many tiles of 16 rows a program takes: 1, 2 or 4; 4 where the number of rows is a symbol."""
    return next((n for n in (1, 2) if rows <= n * TILE), 4) if isinstance(rows, int) else 4


@triton.jit
def of_groups(x, COUNT: tl.constexpr, SUB: tl.constexpr):
    """[n, COUNT] -> [n, COUNT * SUB], every column SUB times."""
    wide = tl.broadcast_to(tl.expand_dims(x, 2), [x.shape[0], COUNT, SUB])
    return tl.reshape(wide, [x.shape[0], COUNT * SUB])


@triton.jit
def store_sums(out, bias, sums, row, channel, rows, channels, HAS_BIAS: tl.constexpr):
    """Sums [16, n] of some rows and channels, with the bias if this is the end of it."""
    there = channel < channels
    if HAS_BIAS:
        sums += tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)[None, :]
    to = out + row.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=(row < rows)[:, None] & there[None, :])


@tuned(CONFIGS, ["channels", "columns", "TILES", "BITS", "ZEROS"], fits)
@triton.jit
def multiply_groups(
    x,  # [M, K] float32, float16 or bfloat16
    weight,  # [N, G, group * BITS / 8] uint8
    scales,  # [N, G] a float type
    zeros,  # [N, G] uint8 or a float type, or nothing
    bias,  # [N] a float type, or nothing; only without SPLITS
    out,  # [M, N] as x; with SPLITS: [SPLITS, M, N] float32
    rows,
    channels,
    columns,
    groups,
    row_bytes,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,
    SUB: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program owns BLOCK_N channels of TILES x 16 rows, over one part of the columns.

    SUB: the largest power of two that divides the group and the block. ZEROS: 0 none, 1 integers, 2 offsets.
    WIDEN: see launch.INTERPRETED."""
    BYTES: tl.constexpr = BLOCK_K * BITS // 8
    SCALES: tl.constexpr = BLOCK_K // SUB
    row_blocks = tl.cdiv(rows, TILES * 16)
    block = tl.program_id(0) // row_blocks
    split = block % SPLITS
    channel = (block // SPLITS) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = (tl.program_id(0) % row_blocks) * (TILES * 16) + tl.arange(0, 16)
    there = channel < channels
    own_weight = weight + channel.to(tl.int64)[:, None] * row_bytes
    own_groups = channel[:, None] * groups
    k = tl.arange(0, BLOCK_K)
    own_x = x + row.to(tl.int64)[:, None] * columns + k[None, :]
    steps = tl.cdiv(columns, BLOCK_K)
    share = tl.cdiv(steps, SPLITS)
    sums0 = tl.zeros([16, BLOCK_N], tl.float32)
    if TILES > 1:
        sums1 = tl.zeros([16, BLOCK_N], tl.float32)
    if TILES > 2:
        sums2 = tl.zeros([16, BLOCK_N], tl.float32)
        sums3 = tl.zeros([16, BLOCK_N], tl.float32)
    for step in range(split * share, tl.minimum((split + 1) * share, steps)):
        byte = step * BYTES + tl.arange(0, BYTES)
        packed = tl.load(
            own_weight + byte[None, :], mask=there[:, None] & (byte < row_bytes)[None, :], other=0
        )
        if BITS == 4:
            whole = tl.interleave(packed & 15, packed >> 4).to(tl.int32)
        else:
            whole = packed.to(tl.int32)
        group = (step * BLOCK_K + tl.arange(0, SCALES) * SUB) // GROUP
        known = there[:, None] & (group < groups)[None, :]
        scale = tl.load(scales + own_groups + group[None, :], mask=known, other=0.0).to(tl.float32)
        # The bits of 2^23 + q as a float32 are those of 2^23 with q in the last ones: no conversion is needed.
        number = (whole | 0x4B000000).to(tl.float32, bitcast=True)
        if ZEROS == 0:
            number = number - (8388608 + (1 << BITS - 1))  # type: ignore
        elif ZEROS == 1:
            zero = tl.load(zeros + own_groups + group[None, :], mask=known, other=0).to(tl.float32)
            number = number - of_groups(zero + 8388608, SCALES, SUB)
        else:
            number = number - 8388608
        scale = of_groups(scale, SCALES, SUB)
        if ZEROS == 2:  # spelled as one operation, which else the compiler might make of it, or not
            offset = tl.load(zeros + own_groups + group[None, :], mask=known, other=0.0).to(tl.float32)
            number = tl.fma(number, scale, of_groups(offset, SCALES, SUB))
        else:
            number = number * scale
        w = tl.trans(number.to(x.dtype.element_ty))
        if WIDEN:
            w = w.to(tl.float32)
        inside = (step * BLOCK_K + k < columns)[None, :]
        at = own_x + step * BLOCK_K
        x0 = tl.load(at, mask=(row < rows)[:, None] & inside, other=0.0).to(w.dtype)
        sums0 = tl.dot(x0, w, sums0, input_precision=PRECISION)
        if TILES > 1:
            x1 = tl.load(at + 16 * columns, mask=(row + 16 < rows)[:, None] & inside, other=0.0).to(w.dtype)
            sums1 = tl.dot(x1, w, sums1, input_precision=PRECISION)
        if TILES > 2:
            x2 = tl.load(at + 32 * columns, mask=(row + 32 < rows)[:, None] & inside, other=0.0).to(w.dtype)
            sums2 = tl.dot(x2, w, sums2, input_precision=PRECISION)
            x3 = tl.load(at + 48 * columns, mask=(row + 48 < rows)[:, None] & inside, other=0.0).to(w.dtype)
            sums3 = tl.dot(x3, w, sums3, input_precision=PRECISION)
    out += split.to(tl.int64) * rows * channels
    store_sums(out, bias, sums0, row, channel, rows, channels, HAS_BIAS)
    if TILES > 1:
        store_sums(out, bias, sums1, row + 16, channel, rows, channels, HAS_BIAS)
    if TILES > 2:
        store_sums(out, bias, sums2, row + 32, channel, rows, channels, HAS_BIAS)
        store_sums(out, bias, sums3, row + 48, channel, rows, channels, HAS_BIAS)


@tuned(ADD_CONFIGS, ["channels"])
@triton.jit
def add_partials(
    partial,  # [SPLITS, M, N] float32
    bias,  # [N] a float type, or nothing
    out,  # [M, N]
    count,  # M * N
    channels,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK results, and adds their parts one after the other."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    total = tl.load(partial + at, mask=there, other=0.0)
    for _ in tl.static_range(1, SPLITS):  # type: ignore
        partial += count
        total += tl.load(partial + at, mask=there, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at % channels, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=there)


def linear_nbits(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    group: int,
    width: int,
    channels: int,
) -> Tensor:
    """x [..., k], weight uint8 [n, g, group * bits / 8], scales, zeros [n, g], bias [n] -> [..., n], as x."""
    columns, channels, groups = int(x.shape[-1]), int(weight.shape[0]), int(weight.shape[1])
    flat = x.reshape([-1, columns]).contiguous()
    weight, scales = weight.contiguous(), scales.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    bias = None if bias is None else bias.contiguous()
    rows, item = flat.shape[0], x.element_size()
    kind = NO_ZEROS if zeros is None else OFFSETS if zeros.is_floating_point() else INT_ZEROS
    parts, columns_per_block = splits(columns, channels, item), TABLE[item][0]
    out = torch.empty([rows, channels], dtype=x.dtype, device=x.device)
    sums = out
    if parts > 1:
        sums = torch.empty([parts, rows, channels], dtype=torch.float32, device=x.device)
    together = tiles(rows)
    wrap_triton(multiply_groups)[
        lambda meta: (triton.cdiv(rows, together * TILE) * triton.cdiv(channels, meta["BLOCK_N"]) * parts,)
    ](
        x=flat,
        weight=weight,
        scales=scales,
        zeros=zeros,
        bias=bias if parts == 1 else None,
        out=sums,
        rows=rows,
        channels=channels,
        columns=columns,
        groups=groups,
        row_bytes=groups * group * bits // 8,
        GROUP=group,
        BITS=bits,
        ZEROS=kind,
        HAS_BIAS=bias is not None and parts == 1,
        SPLITS=parts,
        TILES=together,
        SUB=math.gcd(group, columns_per_block),
        PRECISION=precision(x.dtype, INTERPRETED or torch.version.hip is not None),
        WIDEN=INTERPRETED,
    )
    if parts > 1:
        wrap_triton(add_partials)[lambda meta: (triton.cdiv(rows * channels, meta["BLOCK"]),)](
            partial=sums,
            bias=bias,
            out=out,
            count=rows * channels,
            channels=channels,
            HAS_BIAS=bias is not None,
            SPLITS=parts,
        )
    return out.reshape([*x.shape[:-1], channels])


register(OP, linear_nbits)
