"""match_tokens in Triton against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from .numerics import DTYPES, WHERE, examples, kernel, reference, seeded

pytestmark = WHERE

BUDGETS = st.fixed_dictionaries(
    {
        "prefix": st.integers(0, 3),
        "suffix": st.integers(0, 3),
        "order": st.sampled_from(["published", "original"]),
    }
).flatmap(
    lambda rest: st.one_of(
        st.builds(lambda r: {"r": r, **rest}, st.integers(0, 40)),
        st.builds(lambda p: {"ratio": p / 10, **rest}, st.integers(0, 10)),
    )
)
SEEDS = st.integers(0, 2**20)


def same_map(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other, name in zip(found, expected, ("slot", "keep", "source"), strict=True):
        assert one.dtype == torch.int32
        assert torch.equal(one, other.int()), name


def is_map(slot: Tensor, keep: Tensor, source: Tensor) -> None:
    """Every position is kept or removed, once; a kept one's slot names it; slots are in range."""
    batch, count = slot.shape
    for b in range(batch):
        assert sorted([*keep[b].tolist(), *source[b].tolist()]) == list(range(count))
        assert slot[b, keep[b].long()].tolist() == list(range(keep.shape[1]))
        assert ((slot[b] >= 0) & (slot[b] < keep.shape[1])).all()


@examples(25)
@given(
    st.integers(1, 3),
    st.integers(7, 70),
    st.sampled_from([4, 16, 64, 256]),
    st.sampled_from(DTYPES),
    BUDGETS,
    SEEDS,
)
def test_ties_are_broken_as_the_reference_does(
    batch: int, count: int, width: int, dtype: torch.dtype, attrs: dict[str, Any], seed: int
) -> None:
    """Entries of ±1 in 4^k channels: every cosine is exact in every type, and many are equal."""
    metric = torch.randint(0, 2, (batch, count, width), generator=seeded(seed)) * 2.0 - 1.0
    metric[:, :, min(width, 6) :] = 1.0  # few different tokens
    same_map(
        kernel("match_tokens", metric.to(dtype), **attrs),
        reference("match_tokens", metric.to(dtype), **attrs),
    )


@examples(25)
@given(
    st.integers(1, 3),
    st.integers(7, 70),
    st.sampled_from([1, 5, 33, 64, 100]),
    st.sampled_from(DTYPES),
    BUDGETS,
    SEEDS,
)
def test_the_most_similar_pairs_merge(
    batch: int, count: int, width: int, dtype: torch.dtype, attrs: dict[str, Any], seed: int
) -> None:
    metric = torch.randn(batch, count, width, generator=seeded(seed)).to(dtype)
    # Where rounding decides, both may be right: leave those out.
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    first_a = attrs["prefix"] + attrs["prefix"] % 2
    first_b, end = attrs["prefix"] + 1 - attrs["prefix"] % 2, count - attrs["suffix"]
    scores = unit[:, first_a:end:2] @ unit[:, first_b:end:2].transpose(1, 2)
    if scores.numel():
        ordered = scores.sort(dim=-1).values
        best = ordered[..., -1].sort(dim=-1).values
        assume(ordered.shape[-1] < 2 or (ordered[..., -1] - ordered[..., -2]).min() > 1e-5)
        assume(best.shape[-1] < 2 or (best[:, 1:] - best[:, :-1]).min() > 1e-5)
    same_map(kernel("match_tokens", metric, **attrs), reference("match_tokens", metric, **attrs))


@pytest.mark.parametrize("order", ["published", "original"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e30, 0.0])
def test_any_metric_gives_a_map(poison: float, order: str) -> None:
    metric = torch.randn(2, 45, 8)
    metric[0, ::3] = poison
    metric[1, 5] = poison
    is_map(*kernel("match_tokens", metric, r=11, prefix=1, order=order))
    is_map(*kernel("match_tokens", torch.full((1, 45, 8), poison), r=11, order=order))


def test_a_strided_metric() -> None:
    wide = torch.randn(4, 50, 2, 24)
    for metric in (wide[:, :, 1], wide[::2, ::2, 0, ::3], wide[:, :, 0].transpose(0, 1)):
        same_map(kernel("match_tokens", metric, r=5), reference("match_tokens", metric, r=5))


def test_samples_do_not_see_each_other_and_runs_repeat() -> None:
    metric = torch.randn(3, 150, 32)
    first = kernel("match_tokens", metric, ratio=0.25, prefix=1)
    for one, other in zip(first, kernel("match_tokens", metric, ratio=0.25, prefix=1), strict=True):
        assert torch.equal(one, other)
    for b in range(3):
        alone = kernel("match_tokens", metric[b : b + 1], ratio=0.25, prefix=1)
        assert all(torch.equal(one[b], other[0]) for one, other in zip(first, alone, strict=True))
