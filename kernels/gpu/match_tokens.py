"""match_tokens in Triton: similarity with a running maximum, so that the [A, B] matrix never exists."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lengths import removable
from ..ops.match_tokens import OP, check_order, identity, sides
from .launch import INTERPRETED, register, size_class, tuned, wrap_triton
from .selection import select_and_write

# bytes of an element -> channels per step, and (A per block, B per block, warps, stages) to choose from. The step is
# one and the same for all choices: which products are added up in which order must not hang on the tuning.
TABLE: dict[int, tuple[int, tuple[tuple[int, int, int, int], ...]]] = {
    2: (64, ((64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (64, 64, 8, 2), (64, 128, 8, 2))),
    4: (32, ((64, 64, 8, 2), (32, 64, 4, 3), (128, 64, 8, 2))),
}
CONFIGS = [
    triton.Config(
        {"BLOCK_A": a, "BLOCK_B": b, "BLOCK_D": step, "ITEM": item}, num_warps=warps, num_stages=stages
    )
    for item, (step, choices) in TABLE.items()
    for a, b, warps, stages in choices
]


def fits(config: triton.Config, arguments: dict[str, Any]) -> bool:
    """Is the configuration meant for this element type?"""
    return config.kwargs["ITEM"] == arguments["metric"].element_size()


@triton.jit
def inverse_length(squares):
    """1 / the length of a row from its sum of squares; a row of zeros stays zero. Rounded as IEEE says."""
    return tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(squares), 1e-12))


@tuned(CONFIGS, ["width", "length_class"], fits)
@triton.jit
def best_partner(
    metric,  # [B, N, D] float32, float16 or bfloat16
    best,  # [B, A] float32
    partner,  # [B, A] int32
    stride_b,
    stride_n,
    stride_d,
    count_a,
    count_b,
    first_a,
    first_b,
    width,
    length_class,
    WIDEN: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ITEM: tl.constexpr,
):
    """One program owns BLOCK_A tokens of A of one sample: their highest cosine over B, and the first B that has it.

    Tokens of A and B stand at first_a + 2 i and first_b + 2 j. A score that is no number counts as -3.
    WIDEN: see launch.INTERPRETED."""
    blocks = tl.cdiv(count_a, BLOCK_A)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * BLOCK_A + tl.arange(0, BLOCK_A)
    base = metric + sample * stride_b
    a_rows = base + (first_a + 2 * i).to(tl.int64)[:, None] * stride_n
    highest = tl.full([BLOCK_A], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK_A], tl.int32)
    a_squares = tl.zeros([BLOCK_A], tl.float32)
    for first in range(0, count_b, BLOCK_B):
        j = first + tl.arange(0, BLOCK_B)
        b_rows = base + (first_b + 2 * j).to(tl.int64)[:, None] * stride_n
        product = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
        a_squares = tl.zeros([BLOCK_A], tl.float32)
        b_squares = tl.zeros([BLOCK_B], tl.float32)
        for low in range(0, width, BLOCK_D):
            d = low + tl.arange(0, BLOCK_D)
            inside = (d < width)[None, :]
            a = tl.load(a_rows + d[None, :] * stride_d, mask=(i < count_a)[:, None] & inside, other=0.0)
            b = tl.load(b_rows + d[None, :] * stride_d, mask=(j < count_b)[:, None] & inside, other=0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            # "ieee": tensor-core shortcuts for float32 would blur which tokens are alike.
            product = tl.dot(a, tl.trans(b), product, input_precision="ieee")
            a_wide, b_wide = a.to(tl.float32), b.to(tl.float32)
            a_squares += tl.sum(a_wide * a_wide, axis=1)
            b_squares += tl.sum(b_wide * b_wide, axis=1)
        score = product * inverse_length(b_squares)[None, :]
        score = tl.where((j < count_b)[None, :] & (score == score), score, float("-inf"))
        top = tl.max(score, axis=1)
        place = tl.min(tl.where(score == tl.expand_dims(top, 1), j[None, :], 0x7FFFFFFF), axis=1)
        where = tl.where(top > highest, place, where)
        highest = tl.maximum(top, highest)
    highest = highest * inverse_length(a_squares)
    highest = tl.where(highest >= -2.0, highest, -3.0)  # no number fails the comparison too
    at = sample * count_a + i
    tl.store(best + at, highest, mask=i < count_a)
    tl.store(partner + at, where, mask=i < count_a)


def match_tokens(
    metric: Tensor, *, r: int, ratio: float, prefix: int, suffix: int, order: str
) -> tuple[Tensor, Tensor, Tensor]:
    """metric [B, N, D] -> slot [B, N], keep [B, N'], source [B, N-N'], all int32; see the op."""
    check_order("match_tokens", order)
    batch, count, width = metric.shape
    gone: Any = removable(count, r, ratio, prefix + suffix)
    if gone == 0:
        return identity(batch, count, metric.device)
    first_a, first_b = sides(prefix)
    end = count - suffix
    count_a, count_b = (end - first_a + 1) // 2, (end - first_b + 1) // 2
    best = torch.empty([batch, count_a], dtype=torch.float32, device=metric.device)
    partner = torch.empty([batch, count_a], dtype=torch.int32, device=metric.device)
    wrap_triton(best_partner)[lambda meta: (triton.cdiv(count_a, meta["BLOCK_A"]) * batch,)](
        metric=metric,
        best=best,
        partner=partner,
        stride_b=metric.stride(0),
        stride_n=metric.stride(1),
        stride_d=metric.stride(2),
        count_a=count_a,
        count_b=count_b,
        first_a=first_a,
        first_b=first_b,
        width=width,
        length_class=size_class(count),
        WIDEN=INTERPRETED,
    )
    return select_and_write(
        best, partner, count, gone, prefix, suffix, (first_a, first_b), order == "original"
    )


register(OP, match_tokens)
