"""cached_attention in Triton: every row walks its own keys in logical order, in blocks with fixed bounds and splits.

A row's bits hang on its list of keys alone. Block b holds its keys b * BLOCK_N and on, wherever they lie; split s takes
the blocks s, s + SPLITS, s + 2 SPLITS ..., and what the splits found is put together in their order. Products are of
16 rows and heads, always by the same instructions. Where rows of one program see the same slots in a block (a common
prefix, mostly), its keys are read once for all of them, else once for each row (where branches of a tree part, or the
rows are of several sequences). Every 16 rows and heads read the cache again: no kernel for prompts of thousands."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.cached_attention import OP
from .launch import INTERPRETED, precision, register, register_in_place, tuned, wrap_triton

TILE = 16  # rows and heads of a program
SPLITS = 16
NO_BIAS, BY_DISTANCE, BY_KEY = 0, 1, 2

# (bytes of an element in products, widest head) -> keys per block, channels of a query at a time, warps. No choice:
# blocks decide what is added up in which order. Of a wide query only a part is in registers: each warp holds all rows.
TABLE: dict[tuple[int, int], tuple[int, int, int]] = {
    (2, 64): (64, 64, 4),
    (2, 128): (32, 64, 4),
    (2, 256): (32, 64, 4),
    (4, 64): (32, 64, 8),
    (4, 128): (32, 32, 4),
    (4, 256): (16, 32, 4),
}
CONFIGS = [
    triton.Config(
        {"BLOCK_N": keys, "BLOCK_C": channels, "ITEM": item, "WIDEST": widest}, num_warps=warps, num_stages=1
    )
    for (item, widest), (keys, channels, warps) in TABLE.items()
]
WRITE_CONFIGS = [triton.Config({"BLOCK_S": 64}, num_warps=n, num_stages=2) for n in (1, 2)]
COMBINE_CONFIGS = [triton.Config({"BLOCK_R": 4}, num_warps=4, num_stages=2)]


def fits(config: triton.Config, arguments: dict[str, Any]) -> bool:
    """Is the configuration meant for this element type and head width?"""
    widest = min(w for _, w in TABLE if w >= max(arguments["WIDTH"], arguments["BLOCK_E"]))
    item = 4 if arguments["MIXED"] else arguments["q"].element_size()
    return (config.kwargs["ITEM"], config.kwargs["WIDEST"]) == (item, widest)


@tuned(WRITE_CONFIGS, ["WIDTH", "OUT_WIDTH"])
@triton.jit
def write_rows(
    k,  # [HK, M, D] float32, float16 or bfloat16
    v,  # [HK, M, E]
    slots,  # [M] int32
    key_cache,  # [HK, C, D]
    value_cache,  # [HK, C, E]
    k_stride_h,
    k_stride_m,
    v_stride_h,
    v_stride_m,
    key_stride_h,
    key_stride_c,
    value_stride_h,
    value_stride_c,
    rows,
    shared,
    capacity,
    WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program owns one new row of one head. Of equal slots the last row writes; slots out of range are left."""
    m = (tl.program_id(0) // shared).to(tl.int64)
    h = (tl.program_id(0) % shared).to(tl.int64)
    slot = tl.load(slots + m)
    later = tl.zeros([BLOCK_S], tl.int32)
    for first in range(tl.program_id(0) // shared + 1, rows, BLOCK_S):
        other = first + tl.arange(0, BLOCK_S)
        later += (tl.load(slots + other, mask=other < rows, other=-1) == slot).to(tl.int32)
    mine = (slot >= 0) & (slot < capacity) & (tl.sum(later, axis=0) == 0)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    key = tl.load(k + h * k_stride_h + m * k_stride_m + d, mask=d < WIDTH, other=0.0)
    value = tl.load(v + h * v_stride_h + m * v_stride_m + e, mask=e < OUT_WIDTH, other=0.0)
    to = slot.to(tl.int64)
    key_cache += h * key_stride_h + to * key_stride_c
    value_cache += h * value_stride_h + to * value_stride_c
    tl.store(key_cache + d, key.to(key_cache.dtype.element_ty), mask=(d < WIDTH) & mine)
    tl.store(value_cache + e, value.to(value_cache.dtype.element_ty), mask=(e < OUT_WIDTH) & mine)


@triton.jit
def capped(x, cap):
    """cap * tanh(x / cap)."""
    fall = tl.exp2(tl.abs(x / cap) * -2.8853900817779268)
    bent = cap * ((1.0 - fall) / (1.0 + fall))
    return tl.where(x < 0, -bent, bent)


@triton.jit
def slots_of(slot, lanes):
    """For every key the slot that the rows `lanes` see there, -1 where they see none."""
    return tl.max(tl.where(lanes[:, None], slot, -1), axis=0)


@tuned(CONFIGS, ["WIDTH", "OUT_WIDTH", "MIXED"], fits)
@triton.jit
def attend_cache(
    q,  # [H, M, D] float32, float16 or bfloat16
    key_cache,  # [HK, C, D]
    value_cache,  # [HK, C, E]
    prefix,  # [M, 2] int32
    ancestors,  # [M, A] int32
    bias,  # [1 or H, T] float32, or nothing
    partial,  # [SPLITS, H, M, E] float32
    highest,  # [SPLITS, H, M] float32, to base 2
    total,  # [SPLITS, H, M] float32
    q_stride_h,
    q_stride_m,
    key_stride_h,
    key_stride_c,
    value_stride_h,
    value_stride_c,
    bias_stride,
    rows,
    heads,
    shared,
    columns,
    capacity,
    bias_length,
    scale,
    softcap,
    window,
    WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    MIXED: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ITEM: tl.constexpr,
    WIDEST: tl.constexpr,
):
    """One program owns one split of 16 / LANES rows x LANES heads that share their keys.

    MIXED: the caches have another type than q, and products are taken in float32. BIAS: 0 none, 1 by distance, 2 by
    position. A slot out of range is not seen. WIDEN: see launch.INTERPRETED."""
    ROWS: tl.constexpr = 16 // LANES
    HEAD_BLOCKS: tl.constexpr = (GROUP + LANES - 1) // LANES
    split = tl.program_id(0) % SPLITS
    block = tl.program_id(0) // SPLITS
    h = (block // HEAD_BLOCKS) % shared
    lane = tl.arange(0, 16)
    row = (block // HEAD_BLOCKS // shared) * ROWS + lane // LANES
    of_group = (block % HEAD_BLOCKS) * LANES + lane % LANES
    head = h * GROUP + of_group
    real = (row < rows) & (of_group < GROUP)
    c, e = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_E)
    query = q + head.to(tl.int64)[:, None] * q_stride_h + row.to(tl.int64)[:, None] * q_stride_m
    key_cache += h.to(tl.int64) * key_stride_h
    value_cache += h.to(tl.int64) * value_stride_h

    start = tl.load(prefix + row * 2, mask=real, other=0)
    run = tl.maximum(tl.load(prefix + row * 2 + 1, mask=real, other=0), 0)
    listing = ancestors + row.to(tl.int64)[:, None] * columns
    count = run
    for first in range(0, columns, 16):
        a = first + tl.arange(0, 16)
        listed = tl.load(listing + a[None, :], mask=real[:, None] & (a < columns)[None, :], other=-1)
        count += tl.sum((listed >= 0).to(tl.int32), axis=1)
    blocks = tl.cdiv(tl.max(count, axis=0), BLOCK_N)
    oldest = 0
    if WINDOWED:
        begins = tl.where(count > 0, tl.maximum(count - window, 0), 0x7FFFFFFF)
        oldest = tl.min(begins, axis=0) // BLOCK_N
    top = tl.full([16], float("-inf"), tl.float32)
    sums = tl.zeros([16, 16], tl.float32)  # of a row's weights, 16 times the same
    result = tl.zeros([16, BLOCK_E], tl.float32)
    for b in range(oldest + (split + SPLITS - oldest % SPLITS) % SPLITS, blocks, SPLITS):  # type: ignore
        t = b * BLOCK_N + tl.arange(0, BLOCK_N)
        seen = t[None, :] < count[:, None]
        further = t[None, :] - run[:, None]
        slot = tl.load(listing + further, mask=seen & (further >= 0), other=-1)
        slot = tl.where(further < 0, start[:, None] + t[None, :], slot)
        distance = count[:, None] - 1 - t[None, :]
        seen = seen & (slot >= 0) & (slot < capacity)
        if WINDOWED:
            seen = seen & (distance < window)
        slot = tl.where(seen, slot, -1)
        least = tl.min(tl.where(seen, slot, 0x7FFFFFFF), axis=0)
        apart = tl.max((least < tl.max(slot, axis=0)).to(tl.int32), axis=0)  # type: ignore
        passes = 1 + apart * (ROWS - 1)  # type: ignore

        logits = tl.zeros([16, BLOCK_N], tl.float32)
        for r in range(0, passes):
            lanes = (lane // LANES == r) | (apart == 0)
            at = slots_of(slot, lanes)
            found = tl.zeros([16, BLOCK_N], tl.float32)
            for first in range(0, WIDTH, BLOCK_C):
                d = first + c
                queries = tl.load(query + d[None, :], mask=real[:, None] & (d < WIDTH)[None, :], other=0.0)
                key = key_cache + tl.maximum(at, 0).to(tl.int64)[None, :] * key_stride_c + d[:, None]
                if WIDTH % BLOCK_C == 0:
                    keys = tl.load(key)  # slot 0 where none is seen: its logits are dropped
                else:
                    keys = tl.load(key, mask=(d < WIDTH)[:, None], other=0.0)
                if WIDEN or MIXED:
                    queries, keys = queries.to(tl.float32), keys.to(tl.float32)
                found = tl.dot(queries, keys, found, input_precision=PRECISION)
            logits = tl.where(lanes[:, None], found, logits)
        logits *= scale
        if CAPPED:
            logits = capped(logits, softcap)
        if BIAS > 0:
            if BIAS == 1:
                index = distance
            else:
                index = t[None, :] + distance * 0
            index = tl.minimum(tl.maximum(index, 0), bias_length - 1)
            logits += tl.load(
                bias + head[:, None] * bias_stride + index, mask=seen & real[:, None], other=0.0
            )
        logits = tl.where(seen, logits * 1.4426950408889634, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - base[:, None])
        fade = tl.exp2(top - base)[:, None]
        top = higher
        if not MIXED:
            weights = weights.to(value_cache.dtype.element_ty)
        if WIDEN:
            weights = weights.to(tl.float32)
        # Summed by a product too: how a plain sum goes through registers is the compiler's choice.
        ones = tl.full([BLOCK_N, 16], 1.0, weights.dtype)
        sums = tl.dot(weights, ones, sums * fade, input_precision=PRECISION)
        result *= fade  # by exactly 1.0 in rows that see nothing here
        for r in range(0, passes):
            lanes = (lane // LANES == r) | (apart == 0)
            at = slots_of(slot, lanes)
            values = tl.load(
                value_cache + at.to(tl.int64)[:, None] * value_stride_c + e[None, :],  # type: ignore
                mask=(at >= 0)[:, None] & (e < OUT_WIDTH)[None, :],  # type: ignore
                other=0.0,
            )
            if WIDEN or MIXED:
                values = values.to(tl.float32)
            own = tl.where(lanes[:, None], weights, 0.0).to(weights.dtype)
            result = tl.dot(own, values, result, input_precision=PRECISION)

    to = (split * heads + head).to(tl.int64) * rows + row
    tl.store(highest + to, top, mask=real)
    tl.store(total + to, tl.max(sums, axis=1), mask=real)
    some = real & (top > float("-inf"))
    to = partial + to[:, None] * OUT_WIDTH + e[None, :]
    tl.store(to, result, mask=some[:, None] & (e < OUT_WIDTH)[None, :])


@tuned(COMBINE_CONFIGS, ["OUT_WIDTH"])
@triton.jit
def combine_splits(
    partial,  # [SPLITS, H, M, E] float32, only where highest is finite
    highest,  # [SPLITS, H, M] float32
    total,  # [SPLITS, H, M] float32
    out,  # [H, M, E]
    count,  # H * M
    OUT_WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program owns BLOCK_R rows of the result, and adds what the splits found one after the other."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    e = tl.arange(0, BLOCK_E)
    wide = (e < OUT_WIDTH)[None, :]
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    for s in tl.static_range(SPLITS):  # type: ignore
        top = tl.maximum(top, tl.load(highest + s * count + r, mask=r < count, other=float("-inf")))
    base = tl.where(top == float("-inf"), 0.0, top)
    whole = tl.zeros([BLOCK_R], tl.float32)
    result = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    for s in tl.static_range(SPLITS):  # type: ignore
        own = tl.load(highest + s * count + r, mask=r < count, other=float("-inf"))
        some = own > float("-inf")
        weight = tl.exp2(own - base)
        whole = tl.fma(weight, tl.load(total + s * count + r, mask=some, other=0.0), whole)
        at = partial + (s * count + r)[:, None] * OUT_WIDTH + e[None, :]
        found = tl.load(at, mask=some[:, None] & wide, other=0.0)
        result = tl.fma(tl.broadcast_to(weight[:, None], [BLOCK_R, BLOCK_E]), found, result)
    result = result / tl.where(whole > 0, whole, 1.0)[:, None]
    to = out + r[:, None] * OUT_WIDTH + e[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=(r < count)[:, None] & wide)


def cached_attention_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    prefix: Tensor,
    ancestors: Tensor,
    bias: Tensor | None,
    *,
    scale: float,
    softcap: float,
    window: int,
    key_bias: bool,
) -> Tensor:
    """Operands as the op takes them -> out [1, H, M, E]; the new rows are written into the caches themselves."""
    heads, width, rows = int(q.shape[1]), int(q.shape[3]), q.shape[2]
    shared, capacity, out_width = int(key_cache.shape[0]), key_cache.shape[1], int(value_cache.shape[2])
    q, k, v = (x[0] if x.stride(-1) == 1 else x[0].contiguous() for x in (q, k, v))
    prefix, ancestors = prefix.contiguous(), ancestors.contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    group = heads // shared
    lanes = min(TILE, triton.next_power_of_2(group))
    mixed = key_cache.dtype != q.dtype
    block_e = max(16, triton.next_power_of_2(out_width))
    strides = {
        "key_stride_h": key_cache.stride(0),
        "key_stride_c": key_cache.stride(1),
        "value_stride_h": value_cache.stride(0),
        "value_stride_c": value_cache.stride(1),
    }
    wrap_triton(write_rows)[lambda meta: (rows * shared,)](
        k=k,
        v=v,
        slots=slots.contiguous(),
        key_cache=key_cache,
        value_cache=value_cache,
        k_stride_h=k.stride(0),
        k_stride_m=k.stride(1),
        v_stride_h=v.stride(0),
        v_stride_m=v.stride(1),
        **strides,
        rows=rows,
        shared=shared,
        capacity=capacity,
        WIDTH=width,
        OUT_WIDTH=out_width,
        BLOCK_D=triton.next_power_of_2(width),
        BLOCK_E=block_e,
    )
    partial = torch.empty([SPLITS, heads, rows, out_width], dtype=torch.float32, device=q.device)
    highest = torch.empty([SPLITS, heads, rows], dtype=torch.float32, device=q.device)
    total = torch.empty([SPLITS, heads, rows], dtype=torch.float32, device=q.device)
    programs = triton.cdiv(rows, TILE // lanes) * shared * triton.cdiv(group, lanes) * SPLITS
    wrap_triton(attend_cache)[lambda meta: (programs,)](
        q=q,
        key_cache=key_cache,
        value_cache=value_cache,
        prefix=prefix,
        ancestors=ancestors,
        bias=bias,
        partial=partial,
        highest=highest,
        total=total,
        q_stride_h=q.stride(0),
        q_stride_m=q.stride(1),
        **strides,
        bias_stride=0 if bias is None or bias.shape[0] == 1 else bias.stride(0),
        rows=rows,
        heads=heads,
        shared=shared,
        columns=ancestors.shape[1],
        capacity=capacity,
        bias_length=0 if bias is None else bias.shape[1],
        scale=scale or 1 / math.sqrt(width),
        softcap=softcap,
        window=window,
        WIDTH=width,
        OUT_WIDTH=out_width,
        BLOCK_E=block_e,
        GROUP=group,
        LANES=lanes,
        BIAS=NO_BIAS if bias is None else BY_KEY if key_bias else BY_DISTANCE,
        CAPPED=softcap > 0,
        WINDOWED=window > 0,
        MIXED=mixed,
        SPLITS=SPLITS,
        PRECISION=precision(
            torch.float32 if mixed else q.dtype, INTERPRETED or torch.version.hip is not None
        ),
        WIDEN=INTERPRETED,
    )
    out = torch.empty([1, heads, rows, out_width], dtype=q.dtype, device=q.device)
    wrap_triton(combine_splits)[lambda meta: (triton.cdiv(heads * rows, meta["BLOCK_R"]),)](
        partial=partial,
        highest=highest,
        total=total,
        out=out,
        count=heads * rows,
        OUT_WIDTH=out_width,
        BLOCK_E=block_e,
        SPLITS=SPLITS,
    )
    return out


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, *places: Any, **attrs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The same without writing into the operands -> out, new caches."""
    keys, values = (x.clone(memory_format=torch.contiguous_format) for x in (key_cache, value_cache))
    return cached_attention_(q, k, v, keys, values, *places, **attrs), keys, values


register(OP, cached_attention)
register_in_place(OP, cached_attention_, ("key_cache", "value_cache"))
