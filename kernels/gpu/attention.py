"""attention in Triton: softmax over blocks of keys as they come, log(size) of every key added to its logits."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.attention import OP
from .launch import INTERPRETED, precision, register, size_class, tuned, wrap_triton

LOG2E = math.log2(math.e)
NO_MASK, BOOL_MASK, ADDED_MASK = 0, 1, 2

# (bytes of an element, widest head, is there a mask) -> keys per block, and (queries per block, warps, stages) to
# choose from. The block of keys is one and the same for all choices: it decides what is added up in which order.
# tests/kernels/gpu/test_ahead_of_time.py compiles all of these: none may need more registers than there are.
TABLE: dict[tuple[int, int, bool], tuple[int, tuple[tuple[int, int, int], ...]]] = {
    (2, 64, False): (64, ((64, 4, 2), (64, 4, 3), (128, 8, 2))),
    (2, 64, True): (32, ((64, 4, 2), (32, 4, 2), (64, 8, 2), (128, 8, 2))),
    (2, 128, False): (32, ((64, 4, 2), (32, 4, 2))),
    (2, 128, True): (32, ((64, 4, 2), (128, 8, 2))),
    (2, 256, False): (32, ((32, 4, 2), (64, 8, 2))),
    (2, 256, True): (32, ((32, 4, 2), (32, 8, 2))),
    (4, 64, False): (16, ((32, 4, 2), (16, 4, 2), (32, 8, 2), (64, 8, 2))),
    (4, 64, True): (16, ((32, 4, 2), (16, 4, 2), (32, 8, 2), (64, 8, 2))),
    (4, 128, False): (16, ((32, 4, 2), (32, 8, 2))),
    (4, 128, True): (16, ((32, 8, 2), (16, 4, 1))),
    (4, 256, False): (16, ((16, 4, 2), (16, 8, 2))),
    (4, 256, True): (16, ((16, 8, 2),)),
}
CONFIGS = [
    triton.Config(
        {"BLOCK_M": rows, "BLOCK_N": keys, "ITEM": item, "WIDEST": widest, "MASKED": masked},
        num_warps=warps,
        num_stages=stages,
    )
    for (item, widest, masked), (keys, choices) in TABLE.items()
    for rows, warps, stages in choices
]


def fits(config: triton.Config, arguments: dict[str, Any]) -> bool:
    """Is the configuration meant for this element type, head width and mask?"""
    wide = max(arguments["BLOCK_D"], arguments["BLOCK_E"])
    widest = min(w for _, w, _ in TABLE if w >= wide)
    meant = tuple(config.kwargs[name] for name in ("ITEM", "WIDEST", "MASKED"))
    return meant == (arguments["q"].element_size(), widest, arguments["MASK"] != NO_MASK)


@tuned(CONFIGS, ["query_class", "key_class", "BLOCK_D", "BLOCK_E", "MASK"], fits)
@triton.jit
def attend(
    q,  # [Z, H, n, D] float32, float16 or bfloat16
    k,  # [Z, HK, m, D]
    v,  # [Z, HK, m, E]
    mask,  # [Z or 1, H or 1, n or 1, m or 1] uint8 or a float type, or nothing
    size,  # one row of m float32 for every (z, h), or nothing
    out,  # [Z, H, n, E]
    q_stride_z,
    q_stride_h,
    q_stride_n,
    k_stride_z,
    k_stride_h,
    k_stride_m,
    v_stride_z,
    v_stride_h,
    v_stride_m,
    mask_stride_z,
    mask_stride_h,
    mask_stride_n,
    mask_stride_m,
    size_stride_z,
    size_stride_h,
    heads,
    group,
    n,
    m,
    scale,  # times log2(e): the softmax is taken to base 2
    query_class,
    key_class,
    WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_SIZE: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ITEM: tl.constexpr,
    WIDEST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One program owns BLOCK_M queries of one head, and reads all keys that they may see.

    MASK: 0 none, 1 bool (as uint8), 2 added to the logits. A query that may attend to nothing gets zeros. Keys of
    size 0 are not attended to and may hold anything. WIDEN: see launch.INTERPRETED."""
    blocks = tl.cdiv(n, BLOCK_M)
    block = tl.program_id(0) % blocks
    if CAUSAL:
        block = blocks - 1 - block  # the longest rows first
    z = ((tl.program_id(0) // blocks) // heads).to(tl.int64)
    h = ((tl.program_id(0) // blocks) % heads).to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q += z * q_stride_z + h * q_stride_h
    k += z * k_stride_z + (h // group) * k_stride_h
    v += z * v_stride_z + (h // group) * v_stride_h
    real = rows < n
    queries = tl.load(
        q + rows.to(tl.int64)[:, None] * q_stride_n + d[None, :],
        mask=real[:, None] & (d < WIDTH)[None, :],
        other=0.0,
    )
    if WIDEN:
        queries = queries.to(tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    end = m
    if CAUSAL:
        end = tl.minimum(m, (block + 1) * BLOCK_M)
    for first in range(0, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        wanted = keys < m
        weight = tl.full([BLOCK_N], 1.0, tl.float32)
        if HAS_SIZE:
            weight = tl.load(size + z * size_stride_z + h * size_stride_h + keys, mask=wanted, other=0.0)
            wanted = wanted & (weight > 0)
        columns = tl.load(
            k + keys.to(tl.int64)[None, :] * k_stride_m + d[:, None],
            mask=wanted[None, :] & (d < WIDTH)[:, None],
            other=0.0,
        )
        if WIDEN:
            columns = columns.to(tl.float32)
        logits = tl.dot(queries, columns, input_precision=PRECISION) * scale
        if HAS_SIZE:
            logits += tl.log2(weight)[None, :]
        seen = real[:, None] & wanted[None, :]
        if CAUSAL:
            seen = seen & (keys[None, :] <= rows[:, None])
        if MASK > 0:
            at = mask + z * mask_stride_z + h * mask_stride_h + rows.to(tl.int64)[:, None] * mask_stride_n
            entry = tl.load(at + keys.to(tl.int64)[None, :] * mask_stride_m, mask=seen, other=0)
            if MASK == 1:
                seen = seen & (entry != 0)
            else:
                # The least float32 must stay finite in base 2, where it means "least"; -inf means "never".
                added = entry.to(tl.float32)
                seen = seen & (added != float("-inf"))
                logits += tl.maximum(added * 1.4426950408889634, -3.0e38)
        logits = tl.where(seen, logits, float("-inf"))
        top = tl.maximum(highest, tl.max(logits, axis=1))
        base = tl.where(top == float("-inf"), 0.0, top)
        share = tl.exp2(logits - base[:, None])
        fade = tl.exp2(highest - base)
        values = tl.load(
            v + keys.to(tl.int64)[:, None] * v_stride_m + e[None, :],
            mask=wanted[:, None] & (e < OUT_WIDTH)[None, :],
            other=0.0,
        )
        total = total * fade + tl.sum(share, axis=1)
        share = share.to(values.dtype)
        if WIDEN:
            share, values = share.to(tl.float32), values.to(tl.float32)
        result = tl.dot(share, values, result * fade[:, None], input_precision=PRECISION)
        highest = top
    result = result / tl.where(total > 0, total, 1.0)[:, None]
    to = out + ((z * heads + h) * n + rows)[:, None] * OUT_WIDTH + e[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=real[:, None] & (e < OUT_WIDTH)[None, :])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    size: Tensor | None,
    *,
    scale: float,
    causal: bool,
) -> Tensor:
    """q [..., h, n, d], k [..., hk, m, d], v [..., hk, m, e], mask, size as the op takes them -> [..., h, n, e]."""
    lead, n, m = q.shape[:-3], q.shape[-2], k.shape[-2]
    heads, width, out_width = int(q.shape[-3]), int(q.shape[-1]), int(v.shape[-1])
    q, k, v = (_four(x) for x in (q, k, v))
    out = torch.empty([*q.shape[:3], out_width], dtype=q.dtype, device=q.device)
    kind, mask_strides = NO_MASK, (0, 0, 0, 0)
    if mask is not None:
        kind = BOOL_MASK if mask.dtype == torch.bool else ADDED_MASK
        mask = mask.view(torch.uint8) if kind == BOOL_MASK else mask
        mask = mask.reshape([1] * (len(lead) + 3 - mask.dim()) + list(mask.shape))
        if len(lead) != 1:
            mask = mask.expand([*lead, *mask.shape[-3:]]).reshape([-1, *mask.shape[-3:]])
        mask_strides = tuple(0 if mask.shape[a] == 1 else mask.stride(a) for a in range(4))
    size_strides = (0, 0)
    if size is not None:
        size = size.to(torch.float32)
        if len(lead) > 1 and size.shape[0] != 1:
            size = size.reshape([size.shape[0], *[1] * (len(lead) - 1), m]).expand([*lead, m]).reshape(-1, m)
        size = size.contiguous()
        step = 0 if size.shape[0] == 1 else size.stride(0)
        size_strides = (step, 0) if lead else (0, step)  # without a batch axis, axis 0 is that of the heads
    batch = q.shape[0]
    wrap_triton(attend)[lambda meta: (triton.cdiv(n, meta["BLOCK_M"]) * heads * batch,)](
        q=q,
        k=k,
        v=v,
        mask=mask,
        size=size,
        out=out,
        q_stride_z=q.stride(0),
        q_stride_h=q.stride(1),
        q_stride_n=q.stride(2),
        k_stride_z=k.stride(0),
        k_stride_h=k.stride(1),
        k_stride_m=k.stride(2),
        v_stride_z=v.stride(0),
        v_stride_h=v.stride(1),
        v_stride_m=v.stride(2),
        mask_stride_z=mask_strides[0],
        mask_stride_h=mask_strides[1],
        mask_stride_n=mask_strides[2],
        mask_stride_m=mask_strides[3],
        size_stride_z=size_strides[0],
        size_stride_h=size_strides[1],
        heads=heads,
        group=heads // int(k.shape[1]),
        n=n,
        m=m,
        scale=(scale or 1 / math.sqrt(width)) * LOG2E,
        query_class=size_class(n),
        key_class=size_class(m),
        WIDTH=width,
        OUT_WIDTH=out_width,
        BLOCK_D=max(16, triton.next_power_of_2(width)),
        BLOCK_E=max(16, triton.next_power_of_2(out_width)),
        HAS_SIZE=size is not None,
        MASK=kind,
        CAUSAL=causal,
        PRECISION=precision(q.dtype, INTERPRETED or torch.version.hip is not None),
        WIDEN=INTERPRETED,
    )
    return out.reshape([*lead, heads, n, out_width])


def _four(x: Tensor) -> Tensor:
    """x [..., h, n, d] as [Z, h, n, d] with rows of adjacent elements."""
    x = x if x.dim() == 4 else x.reshape([-1, *x.shape[-3:]])
    return x if x.stride(-1) == 1 else x.contiguous()


register(OP, attention)
