"""From the scores of a matching to its map: who goes, and where everybody's slot is.

No sort: the rank of a token is the number of tokens before it, which is the same in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import size_class, tuned, wrap_triton

RANK_CONFIGS = [
    triton.Config({"BLOCK_I": 32, "BLOCK_J": 128}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_I": 16, "BLOCK_J": 256}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_I": 64, "BLOCK_J": 128}, num_warps=8, num_stages=2),
]
WRITE_CONFIGS = [
    triton.Config({"BLOCK_I": 64, "BLOCK_J": 64}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_I": 32, "BLOCK_J": 128}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_I": 64, "BLOCK_J": 128}, num_warps=8, num_stages=2),
]


@tuned(RANK_CONFIGS, ["length_class"])
@triton.jit
def rank_scores(
    best,  # [B, A] float32, no NaN
    rank,  # [B, A] int32
    count,
    length_class,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One program owns the ranks of BLOCK_I scores of one sample: 0 for the highest, the first among equals."""
    blocks = tl.cdiv(count, BLOCK_I)
    start = (tl.program_id(0) // blocks).to(tl.int64) * count
    i = (tl.program_id(0) % blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    mine = tl.load(best + start + i, mask=i < count, other=0.0)
    found = tl.zeros([BLOCK_I], tl.int32)
    for first in range(0, count, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        other = tl.load(best + start + j, mask=j < count, other=float("-inf"))
        ahead = (other[None, :] > mine[:, None]) | (
            (other[None, :] == mine[:, None]) & (j[None, :] < i[:, None])
        )
        found += tl.sum((ahead & (j < count)[None, :]).to(tl.int32), axis=1)
    tl.store(rank + start + i, found, mask=i < count)


@tuned(WRITE_CONFIGS, ["length_class"])
@triton.jit
def write_map(
    rank,  # [B, A] int32
    partner,  # [B, A] int32, below the number of B tokens
    slot,  # [B, N] int32
    keep,  # [B, N'] int32
    source,  # [B, N - N'] int32
    count,
    count_a,
    first_a,
    first_b,
    gone,
    end,
    length_class,
    PREFIX: tl.constexpr,
    ORIGINAL: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One program owns BLOCK_I positions of one sample and writes all that the map says of them.

    Positions PREFIX ... end-1 take part, the even ones are A. Slots in order of position (ORIGINAL), or: prefix,
    the A tokens that stay (by rank without a prefix, else by position), B, suffix."""
    blocks = tl.cdiv(count, BLOCK_I)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    position = (tl.program_id(0) % blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    there = position < count
    part = (position >= PREFIX) & (position < end)
    in_a = part & (position % 2 == 0)
    in_b = part & (position % 2 == 1)
    a = (position - first_a) // 2
    own = tl.load(rank + sample * count_a + a, mask=in_a, other=0)
    goes = in_a & (own < gone)
    mate = tl.load(partner + sample * count_a + a, mask=goes, other=0)

    # How many of those that go stand before a position: before its partner's, for a token that goes itself.
    before = tl.zeros([BLOCK_I], tl.int32)
    if ORIGINAL or PREFIX > 0:
        asked = tl.where(goes, first_b + 2 * mate, position)
        for first in range(0, count_a, BLOCK_J):
            j = first + tl.arange(0, BLOCK_J)
            other = tl.load(rank + sample * count_a + j, mask=j < count_a, other=0x7FFFFFFF)
            earlier = (other < gone)[None, :] & ((first_a + 2 * j)[None, :] < asked[:, None])
            before += tl.sum(earlier.to(tl.int32), axis=1)

    if ORIGINAL:
        place = tl.where(goes, first_b + 2 * mate, position) - before
    else:
        place = tl.where(position < PREFIX, position, position - gone)
        if PREFIX > 0:
            place = tl.where(in_a, PREFIX + a - before, place)
        else:
            place = tl.where(in_a, own - gone, place)
        partner_or_self = tl.where(goes, mate, (position - first_b) // 2)
        place = tl.where(in_b | goes, PREFIX + count_a - gone + partner_or_self, place)
    tl.store(slot + sample * count + position, place, mask=there)
    tl.store(keep + sample * (count - gone) + place, position, mask=there & (goes == 0))
    tl.store(source + sample * gone + own, position, mask=goes)


def select_and_write(
    best: Tensor,
    partner: Tensor,
    count: Any,
    gone: Any,
    prefix: int,
    suffix: int,
    sides: tuple[int, int],
    original: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """best [B, A] float32 without NaN, partner [B, A] int32 -> slot [B, N], keep [B, N'], source [B, N-N'] int32.

    The `gone` highest scores merge into their partners; `sides`: the first position of A and of B."""
    batch, count_a = best.shape
    device = best.device
    rank = torch.empty_like(partner)
    slot = torch.empty([batch, count], dtype=torch.int32, device=device)
    keep = torch.empty([batch, count - gone], dtype=torch.int32, device=device)
    source = torch.empty([batch, gone], dtype=torch.int32, device=device)
    wrap_triton(rank_scores)[lambda meta: (triton.cdiv(count_a, meta["BLOCK_I"]) * batch,)](
        best=best, rank=rank, count=count_a, length_class=size_class(count_a)
    )
    wrap_triton(write_map)[lambda meta: (triton.cdiv(count, meta["BLOCK_I"]) * batch,)](
        rank=rank,
        partner=partner,
        slot=slot,
        keep=keep,
        source=source,
        count=count,
        count_a=count_a,
        first_a=sides[0],
        first_b=sides[1],
        gone=gone,
        end=count - suffix,
        length_class=size_class(count),
        PREFIX=prefix,
        ORIGINAL=original,
    )
    return slot, keep, source
