"""restore_tokens in Triton: every position copies the row of its slot."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.gathers import RESTORE
from .launch import Rows, map_stride, register, size_class, tuned, wrap_triton

CONFIGS = [
    triton.Config({"BLOCK_N": 4, "BLOCK_F": 256}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_N": 8, "BLOCK_F": 128}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_N": 1, "BLOCK_F": 1024}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_N": 16, "BLOCK_F": 64}, num_warps=4, num_stages=2),
]


@tuned(CONFIGS, ["width", "length_class"])
@triton.jit
def gather_rows(
    y,  # [B or 1, S, F] of any element type
    slot,  # [B or 1, N] int32
    out,  # [B, N, F]
    y_stride_b,
    y_stride_n,
    y_stride_f,
    slot_stride,
    out_stride_b,
    out_stride_n,
    out_stride_f,
    count,
    slots,
    width,
    length_class,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One program owns BLOCK_N positions x BLOCK_F features of one sample; a slot outside 0 ... S-1 gives zeros."""
    columns = tl.cdiv(width, BLOCK_F)
    blocks = tl.cdiv(count, BLOCK_N) * columns
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    n = (block // columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    f = (block % columns) * BLOCK_F + tl.arange(0, BLOCK_F)
    there, wide = n < count, f < width
    place = tl.load(slot + sample * slot_stride + n, mask=there, other=-1)
    inside = (place >= 0) & (place < slots)
    features = f.to(tl.int64)[None, :]
    row = y + sample * y_stride_b + place.to(tl.int64)[:, None] * y_stride_n + features * y_stride_f
    values = tl.load(row, mask=inside[:, None] & wide[None, :], other=0)
    to = out + sample * out_stride_b + n.to(tl.int64)[:, None] * out_stride_n + features * out_stride_f
    tl.store(to, values, mask=there[:, None] & wide[None, :])


def restore_tokens(y: Tensor, slot: Tensor, *, axis: int, batch_axis: int) -> Tensor:
    """y with S tokens along `axis`, slot [B or 1, N] int32 -> N tokens, zeros where the slot is -1."""
    truth = y.dtype == torch.bool
    rows = Rows(y.view(torch.uint8) if truth else y, axis, batch_axis)
    slot = slot.to(torch.int32).contiguous()
    batch: Any = slot.shape[0] if rows.batch == 1 else rows.batch
    count = slot.shape[1]
    out = rows.empty(batch, count)
    y_strides, out_strides = rows.strides(rows.data), rows.strides(out)
    wrap_triton(gather_rows)[
        lambda meta: (triton.cdiv(count, meta["BLOCK_N"]) * triton.cdiv(rows.width, meta["BLOCK_F"]) * batch,)
    ](
        y=rows.data,
        slot=slot,
        out=out,
        y_stride_b=y_strides[0],
        y_stride_n=y_strides[1],
        y_stride_f=y_strides[2],
        slot_stride=map_stride(slot),
        out_stride_b=out_strides[0],
        out_stride_n=out_strides[1],
        out_stride_f=out_strides[2],
        count=count,
        slots=rows.count,
        width=rows.width,
        length_class=size_class(count),
    )
    restored = rows.finish(out)
    return restored.view(torch.bool) if truth else restored


register(RESTORE, restore_tokens)
