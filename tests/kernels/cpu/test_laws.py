"""Laws of the kernels on drawn sizes: what holds whatever the reference does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from elision.kernels import cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ..cases import call
from .draws import Draw, compare, kernel, margin

if cpu.available():
    cpu.kernels()

LAWS = settings(max_examples=60, deadline=None)

budgets = st.fixed_dictionaries(
    {
        "r": st.integers(0, 60),
        "prefix": st.integers(0, 3),
        "suffix": st.integers(0, 3),
        "order": st.sampled_from(["published", "original"]),
    }
)
seeds, counts, widths = (
    st.integers(0, 2**31),
    st.integers(1, 300),
    st.sampled_from([1, 3, 8, 15, 16, 17, 33, 64]),
)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def check_map(slot: Tensor, keep: Tensor, source: Tensor, size: Tensor | None) -> None:
    """Every token is kept or removed once, every slot's token lies in it, only padding is dropped."""
    count = slot.shape[1]
    assert torch.equal(torch.cat([keep, source], 1).sort(1).values, torch.arange(count).expand_as(slot).int())
    assert torch.equal(slot.gather(1, keep.long()), torch.arange(keep.shape[1]).expand_as(keep).int())
    assert bool(((slot >= -1) & (slot < max(1, keep.shape[1]))).all())
    if size is None:
        assert bool((slot >= 0).all())
    else:
        assert bool((size.expand_as(slot)[slot == -1] == 0).all())


def similarity(metric: Tensor, slot: Tensor, keep: Tensor, source: Tensor) -> Tensor:
    """Cosine of every merged token and the one it joins, in float64."""
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    home = keep.gather(1, slot.gather(1, source.long()).long())
    rows = [unit.gather(1, i.long().unsqueeze(-1).expand(-1, -1, unit.shape[-1])) for i in (source, home)]
    return (rows[0] * rows[1]).sum(-1)


@LAWS
@given(seeds, counts, widths, dtypes, budgets)
def test_a_matching_reaches_the_similarity_of_the_reference(
    seed: int, count: int, width: int, dtype: torch.dtype, attrs: dict[str, Any]
) -> None:
    """Near ties may fall either way, so what is compared is how alike the merged tokens are."""
    torch.manual_seed(seed)
    metric = torch.randn(2, count, width).to(dtype)
    found, wanted = kernel("match_tokens", [metric], attrs), call("match_tokens", [metric], attrs)
    check_map(*found, None)
    reached, best = similarity(metric, *found), similarity(metric, *wanted)
    assert reached.shape == best.shape
    torch.testing.assert_close(reached, best, rtol=0, atol=2e-6)
    if margin(metric, None, attrs["prefix"], attrs["suffix"]) > 2e-6:
        assert all(torch.equal(one, other) for one, other in zip(found, wanted))


@LAWS
@given(seeds, counts, widths, budgets, st.sampled_from([0.0, torch.nan, torch.inf]))
def test_a_padded_matching_is_that_of_the_real_tokens_alone(
    seed: int, count: int, width: int, attrs: dict[str, Any], filler: float
) -> None:
    torch.manual_seed(seed)
    size = (torch.rand(1, count) > 0.4).float()
    metric = torch.randn(1, count, width)
    metric[size == 0] = filler
    slot, keep, source = kernel("match_padded_tokens", [metric, size], attrs)
    check_map(slot, keep, source, size)
    if source.shape[1] == 0:
        assert torch.equal(slot, torch.arange(count).int()[None])
        return
    where = size[0].nonzero()[:, 0]
    alone_slot, alone_keep, alone_source = kernel("match_tokens", [metric[:, where]], attrs)
    assert torch.equal(slot[:, where], alone_slot)
    assert torch.equal(keep[:, : alone_keep.shape[1]].long(), where[alone_keep.long()])
    assert torch.equal(source[:, : alone_source.shape[1]].long(), where[alone_source.long()])


@LAWS
@given(seeds, st.integers(2, 300), st.sampled_from([3, 8, 15, 17, 33, 64]), budgets)
def test_equal_tokens_score_equally_wherever_they_stand(
    seed: int, count: int, width: int, attrs: dict[str, Any]
) -> None:
    """Rows out of three directions: every score is a tie, which position breaks, to the bit."""
    torch.manual_seed(seed)
    metric = torch.randn(3, width)[torch.randint(0, 3, (2, count))]
    slot, keep, source = kernel("match_tokens", [metric], attrs)
    check_map(slot, keep, source, None)
    prefix, end = attrs["prefix"], count - attrs["suffix"]
    for sample in range(2):
        a = list(range(prefix + prefix % 2, end, 2))
        b = list(range(prefix + 1 - prefix % 2, end, 2))
        # Equal rows are one kind: a token's score depends on its kind and on the kinds that there are in B.
        twins = {
            i: next((j for j in b if torch.equal(metric[sample, i], metric[sample, j])), None) for i in a
        }
        joined = [i for i in source[sample].tolist() if twins.get(i) is not None]
        assert joined == source[sample].tolist()[: len(joined)], "tokens with an equal partner go first"
        for twin in set(twins.values()):
            kind = [i for i in joined if twins[i] == twin]
            assert kind == sorted(kind), "by position"
        homes = keep[sample].gather(0, slot[sample, joined].long()).tolist()
        assert homes == [twins[i] for i in joined], "into the first equal one"


@LAWS
@given(seeds, st.integers(1, 120), widths, budgets)
def test_samples_do_not_see_each_other(seed: int, count: int, width: int, attrs: dict[str, Any]) -> None:
    torch.manual_seed(seed)
    metric, order = torch.randn(4, count, width), torch.randperm(4)
    size = torch.randint(0, 3, (4, count)).float()
    q = torch.randn(4, 2, count, 8)
    for op, operands, more in (
        ("match_tokens", [metric], attrs),
        ("match_padded_tokens", [metric, size], attrs),
        ("mean_heads", [q], {}),
        ("attention", [q, q, q, None, size], {"causal": bool(seed % 2)}),
        ("merge_tokens", [metric, size, *kernel("match_padded_tokens", [metric, size], attrs)], {"axis": 1}),
    ):
        shuffled = [None if t is None else t[order] for t in operands]
        for one, other in zip(kernel(op, shuffled, more), kernel(op, operands, more)):
            assert torch.equal(one, other[order])


@LAWS
@given(seeds, counts, widths, dtypes)
def test_removing_nothing_changes_nothing(seed: int, count: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    x = torch.randn(2, count, width).to(dtype)
    size = torch.randint(0, 3, (2, count)).float()
    for maps in (
        kernel("match_tokens", [x], {"r": 0}),
        kernel("match_padded_tokens", [x, size], {"ratio": 0.0}),
        kernel("match_padded_tokens", [x, size], {"r": 9, "prefix": count}),
    ):
        assert torch.equal(maps[0], torch.arange(count).int().expand(2, count))
        y, new_size = kernel("merge_tokens", [x, size, *maps], {"axis": 1})
        assert torch.equal(y, x) and torch.equal(new_size, size)
        assert torch.equal(kernel("restore_tokens", [y, maps[0]], {"axis": 1})[0], x)


@LAWS
@given(seeds, st.integers(2, 300), st.integers(1, 150), widths)
def test_a_merge_keeps_the_total(seed: int, count: int, r: int, width: int) -> None:
    torch.manual_seed(seed)
    x, size = torch.randn(2, count, width), torch.randint(1, 5, (2, count)).float()
    maps = kernel("match_tokens", [x], {"r": r})
    y, new_size = kernel("merge_tokens", [x, size, *maps], {"axis": 1})
    assert torch.equal(new_size.sum(1), size.sum(1))
    torch.testing.assert_close(
        (y * new_size.unsqueeze(-1)).sum(1), (x * size.unsqueeze(-1)).sum(1), rtol=1e-4, atol=1e-3
    )


@LAWS
@given(seeds, st.integers(1, 60), st.integers(1, 90), widths, dtypes, st.booleans())
def test_attention_is_the_reference(
    seed: int, n: int, m: int, width: int, dtype: torch.dtype, causal: bool
) -> None:
    torch.manual_seed(seed)
    q, k, v = torch.randn(2, 4, n, width), torch.randn(2, 2, m, width), torch.randn(2, 2, m, 9)
    size = torch.randint(0, 4, (2, m)).float()
    size[:, 0] = 1
    operands = [*(t.to(dtype) for t in (q, k, v)), None, size]
    draw = Draw(f"attention {n} {m} {width}", "attention", operands, {"causal": causal})
    compare(draw, kernel("attention", operands, {"causal": causal}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("at", [0, 7, 600])
def test_a_nan_in_a_query_or_key_is_not_hidden(dtype: torch.dtype, at: int) -> None:
    """600 keys are two blocks: what came before must not be forgotten either."""
    q, k, v = (torch.randn(1, 1, n, 8).to(dtype) for n in (3, 601, 601))
    broken = k.clone()
    broken[0, 0, at, 0] = torch.nan
    assert bool(kernel("attention", [q, broken, v], {})[0].isnan().all())
    q[0, 0, 1] = torch.nan
    found = kernel("attention", [q, k, v], {})[0][0, 0].isnan().any(1)
    assert found.tolist() == [False, True, False]
