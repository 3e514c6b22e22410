"""merge_tokens in Triton: every slot gathers its sources along a chain, so nothing is added up by chance."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.merge_tokens import OP
from .launch import Rows, map_stride, register, size_class, tuned, wrap_triton

LINK_CONFIGS = [
    triton.Config({"BLOCK_E": 64, "BLOCK_J": 64}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_E": 32, "BLOCK_J": 128}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_E": 128, "BLOCK_J": 64}, num_warps=8, num_stages=2),
]
MERGE_CONFIGS = [
    triton.Config({"BLOCK_S": 8, "BLOCK_F": 128}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_S": 2, "BLOCK_F": 512}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_S": 1, "BLOCK_F": 1024}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_S": 16, "BLOCK_F": 64}, num_warps=4, num_stages=2),
]


@triton.jit
def size_of(size, position, mask, HAS_SIZE: tl.constexpr):
    """The sizes of these tokens, 0.0 where the mask is off; without sizes 1.0."""
    if HAS_SIZE:
        return tl.load(size + position, mask=mask, other=0.0)
    else:
        return tl.where(mask, 1.0, 0.0)


@tuned(LINK_CONFIGS, ["length_class"])
@triton.jit
def link_sources(
    slot,  # [B or 1, N] int32
    source,  # [B or 1, R] int32
    size,  # [B or 1, N] float32, or nothing
    follower,  # [B, S + R] int32
    slot_stride,
    source_stride,
    size_stride,
    count,
    left,
    gone,
    length_class,
    HAS_SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One program owns BLOCK_E entries of one sample's chains.

    Entry s < S: the first source that goes into slot s; entry S + j: the next one that goes where source j goes; -1:
    there is none. Sources that are dropped, weigh nothing or point outside are in no chain."""
    entries = left + gone
    blocks = tl.cdiv(entries, BLOCK_E)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    slot += sample * slot_stride
    source += sample * source_stride
    if HAS_SIZE:
        size += sample * size_stride
    entry = (tl.program_id(0) % blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    mine = entry - left
    of_source = (mine >= 0) & (mine < gone)
    position = tl.load(source + mine, mask=of_source, other=-1)
    inside = (position >= 0) & (position < count)
    goal = tl.where(mine < 0, entry, tl.load(slot + position, mask=inside, other=-1))
    after = tl.maximum(mine, -1)
    nearest = tl.full([BLOCK_E], 0x7FFFFFFF, tl.int32)
    for first in range(0, gone, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        where = tl.load(source + j, mask=j < gone, other=-1)
        valid = (where >= 0) & (where < count)
        target = tl.load(slot + where, mask=valid, other=-1)
        heavy = (target >= 0) & (size_of(size, where, valid, HAS_SIZE) > 0)
        fits = (target[None, :] == goal[:, None]) & heavy[None, :] & (j[None, :] > after[:, None])
        nearest = tl.minimum(nearest, tl.min(tl.where(fits, j[None, :], 0x7FFFFFFF), axis=1))
    nearest = tl.where(nearest == 0x7FFFFFFF, -1, nearest)
    tl.store(follower + sample * entries + entry, nearest, mask=entry < entries)


@tuned(MERGE_CONFIGS, ["width", "length_class"])
@triton.jit
def merge_rows(
    x,  # [B or 1, N, F] float32, float16 or bfloat16
    size,  # [B or 1, N] float32, or nothing
    keep,  # [B or 1, S] int32
    source,  # [B or 1, R] int32
    follower,  # [B, S + R] int32
    y,  # [B, S, F]
    new_size,  # [B, S] float32
    x_stride_b,
    x_stride_n,
    x_stride_f,
    size_stride,
    keep_stride,
    source_stride,
    y_stride_b,
    y_stride_n,
    y_stride_f,
    count,
    left,
    gone,
    width,
    length_class,
    HAS_SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One program owns BLOCK_S slots x BLOCK_F features of one sample, and walks the chains of these slots.

    Sums are float32, in the order of the chain. A slot without sources is a bit-exact copy of its token."""
    columns = tl.cdiv(width, BLOCK_F)
    blocks = tl.cdiv(left, BLOCK_S) * columns
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    s = (block // columns) * BLOCK_S + tl.arange(0, BLOCK_S)
    f = (block % columns) * BLOCK_F + tl.arange(0, BLOCK_F)
    there, wide = s < left, f < width
    x += sample * x_stride_b
    source += sample * source_stride
    follower += sample * (left + gone)
    if HAS_SIZE:
        size += sample * size_stride
    features = f.to(tl.int64)[None, :] * x_stride_f

    home = tl.load(keep + sample * keep_stride + s, mask=there, other=-1)
    inside = (home >= 0) & (home < count)
    own = size_of(size, home, inside, HAS_SIZE)
    token = x + home.to(tl.int64)[:, None] * x_stride_n + features
    kept = tl.load(token, mask=inside[:, None] & wide[None, :], other=0.0)
    total = tl.where((own > 0)[:, None], kept.to(tl.float32) * own[:, None], 0.0)
    received = tl.zeros([BLOCK_S], tl.float32)
    at = tl.load(follower + s, mask=there, other=-1)
    while tl.max(at, axis=0) >= 0:  # type: ignore[operator]
        on = at >= 0
        position = tl.load(source + at, mask=on, other=0)
        weight = size_of(size, position, on, HAS_SIZE)
        row = x + position.to(tl.int64)[:, None] * x_stride_n + features
        moved = tl.load(row, mask=on[:, None] & wide[None, :], other=0.0)
        total += moved.to(tl.float32) * weight[:, None]
        received += weight
        at = tl.load(follower + left + at, mask=on, other=-1)

    some = received > 0
    mean = (total / tl.where(some, own + received, 1.0)[:, None]).to(kept.dtype)
    out = y + sample * y_stride_b + s.to(tl.int64)[:, None] * y_stride_n
    out += f.to(tl.int64)[None, :] * y_stride_f
    tl.store(out, tl.where(some[:, None], mean, kept), mask=there[:, None] & wide[None, :])
    if block % columns == 0:
        tl.store(new_size + sample * left + s, own + received, mask=there)


def merge_tokens(
    x: Tensor,
    size: Tensor | None,
    slot: Tensor,
    keep: Tensor,
    source: Tensor,
    *,
    axis: int,
    batch_axis: int,
) -> tuple[Tensor, Tensor]:
    """x with N tokens along `axis`, size [B or 1, N] or None, a map -> y with S tokens, new size [B, S] float32."""
    rows = Rows(x, axis, batch_axis)
    slot, keep, source = (m.to(torch.int32).contiguous() for m in (slot, keep, source))
    weights = None if size is None else size.to(torch.float32).contiguous()
    batch: Any = rows.batch if slot.shape[0] == 1 else slot.shape[0]
    left, gone = keep.shape[1], source.shape[1]
    y = rows.empty(batch, left)
    new_size = torch.empty([batch, left], dtype=torch.float32, device=x.device)
    follower = torch.empty([batch, left + gone], dtype=torch.int32, device=x.device)
    size_stride = 0 if weights is None else map_stride(weights)
    wrap_triton(link_sources)[lambda meta: (triton.cdiv(left + gone, meta["BLOCK_E"]) * batch,)](
        slot=slot,
        source=source,
        size=weights,
        follower=follower,
        slot_stride=map_stride(slot),
        source_stride=map_stride(source),
        size_stride=size_stride,
        count=rows.count,
        left=left,
        gone=gone,
        length_class=size_class(rows.count),
        HAS_SIZE=weights is not None,
    )
    x_strides, y_strides = rows.strides(rows.data), rows.strides(y)
    wrap_triton(merge_rows)[
        lambda meta: (triton.cdiv(left, meta["BLOCK_S"]) * triton.cdiv(rows.width, meta["BLOCK_F"]) * batch,)
    ](
        x=rows.data,
        size=weights,
        keep=keep,
        source=source,
        follower=follower,
        y=y,
        new_size=new_size,
        x_stride_b=x_strides[0],
        x_stride_n=x_strides[1],
        x_stride_f=x_strides[2],
        size_stride=size_stride,
        keep_stride=map_stride(keep),
        source_stride=map_stride(source),
        y_stride_b=y_strides[0],
        y_stride_n=y_strides[1],
        y_stride_f=y_strides[2],
        count=rows.count,
        left=left,
        gone=gone,
        width=rows.width,
        length_class=size_class(rows.count),
        HAS_SIZE=weights is not None,
    )
    return rows.finish(y), new_size


register(OP, merge_tokens)
