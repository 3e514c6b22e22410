"""Laws of the dropping ops, on random scores, and against an independent reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import reference_drop as reference

from . import onnx_call
from .cases import call

LAWS = settings(max_examples=40, deadline=None)
FEW = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 2**31)
ratios = st.sampled_from([0.0, 0.1, 0.25, 0.29, 0.5, 0.7, 1.0])


def scores(seed: int, rows: int, count: int, levels: int = 0) -> Tensor:
    """Random scores, some of them -1 (no candidates); with few levels many are equal."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(-1, levels, (rows, count), generator=generator).float()
    score = torch.rand(rows, count, generator=generator)
    return torch.where(torch.rand(rows, count, generator=generator) < 0.2, -1.0, score)


def best(score: list[float], count: int) -> set[int]:
    """The places of the `count` highest scores that are not negative, the first among equals."""
    order = sorted((place for place, s in enumerate(score) if s >= 0), key=lambda place: -score[place])
    return set(order[:count])


# ---- top_tokens ------------------------------------------------------------------------------------------
@LAWS
@given(seeds, st.integers(1, 24), st.integers(0, 26), st.sampled_from([0, 2, 4]))
def test_a_count_keeps_the_best_and_the_first_among_equals(
    seed: int, length: int, count: int, levels: int
) -> None:
    score = scores(seed, 3, length, levels)
    (flags,) = call("top_tokens", [score], {"count": count})
    assert torch.equal(flags < 0, score < 0)
    assert set(flags.unique().tolist()) <= {-1.0, 0.0, 1.0}
    for row in range(3):
        kept = set((flags[row] == 1).nonzero()[:, 0].tolist())
        assert kept == best(score[row].tolist(), count)


@LAWS
@given(seeds, st.integers(1, 24), ratios, st.sampled_from([0, 3]))
def test_a_ratio_is_of_the_candidates_of_each_row(seed: int, length: int, ratio: float, levels: int) -> None:
    score = scores(seed, 3, length, levels)
    among = scores(seed + 1, 3, length)
    (flags,) = call("top_tokens", [score, None, among], {"ratio": ratio})
    candidate = (score >= 0) & (among >= 0)
    assert torch.equal(flags >= 0, candidate)
    share = [int(n) * round(100 * ratio) // 100 for n in candidate.sum(1)]
    assert (flags == 1).sum(1).tolist() == share


@LAWS
@given(seeds, st.integers(1, 24), st.lists(st.integers(0, 30), min_size=3, max_size=3))
def test_every_row_has_its_own_count(seed: int, length: int, counts: list[int]) -> None:
    score = scores(seed, 3, length)
    (flags,) = call("top_tokens", [score, torch.tensor(counts).int()], {})
    for row, count in enumerate(counts):
        (alone,) = call("top_tokens", [score[row : row + 1]], {"count": count})
        assert torch.equal(flags[row], alone[0])


@LAWS
@given(seeds, st.integers(1, 24), st.integers(0, 24))
def test_shared_is_the_choice_of_the_first_row(seed: int, length: int, count: int) -> None:
    score = scores(seed, 3, length).abs()
    (flags,) = call("top_tokens", [score], {"count": count, "shared": True})
    (first,) = call("top_tokens", [score[:1]], {"count": count})
    assert torch.equal(flags, first.expand(3, -1))


def test_what_is_no_number_is_no_candidate() -> None:
    score = torch.tensor([[torch.nan, 0.1, 0.3, torch.nan]])
    assert call("top_tokens", [score], {"count": 1})[0].tolist() == [[-1, 0, 1, -1]]


@FEW
@given(seeds, st.integers(1, 16), st.integers(0, 18), st.sampled_from([0, 2]))
def test_onnx_keeps_the_same(seed: int, length: int, count: int, levels: int) -> None:
    score = scores(seed, 2, length, levels)
    found = onnx_call.run("top_tokens", [score], {"count": count})
    assert torch.equal(found[0], call("top_tokens", [score], {"count": count})[0])


# ---- adaptive_counts -------------------------------------------------------------------------------------
@LAWS
@given(seeds, st.integers(1, 24), st.integers(1, 26), st.sampled_from([0, 2, 4]))
def test_outliers_are_counted_as_numpy_would(seed: int, length: int, capacity: int, levels: int) -> None:
    score = scores(seed, 3, length, levels) ** 5
    (counts,) = call("adaptive_counts", [score], {"capacity": capacity})
    for row in range(3):
        mine = score[row][score[row] >= 0].double().numpy()
        if not len(mine):
            assert counts[row] == 0
            continue
        first, third = np.percentile(mine, [25, 75])
        found = int((mine > third + 1.5 * (third - first) + 1e-12).sum())
        assert int(counts[row]) == min(max(found, 1), capacity, len(mine))


@LAWS
@given(seeds, st.integers(1, 24), st.sampled_from([0.1, 0.5, 0.9, 1.0]), st.sampled_from([0, 4]))
def test_a_share_of_the_scores_takes_the_fewest_tokens(
    seed: int, length: int, mass: float, levels: int
) -> None:
    score = scores(seed, 3, length, levels)
    (counts,) = call("adaptive_counts", [score], {"capacity": length, "mass": mass})
    for row in range(3):
        mine = np.sort(score[row][score[row] >= 0].double().numpy())[::-1]
        count = int(counts[row])
        assert (count == 0) == (len(mine) == 0)
        if len(mine) and mine.sum() > 0:
            assert mine[:count].sum() >= mass * mine.sum() - 1e-9
            assert count == 1 or mine[: count - 1].sum() < mass * mine.sum() + 1e-9


@LAWS
@given(seeds, st.integers(1, 24), st.integers(0, 5), st.sampled_from([0.0, 0.7]))
def test_counts_know_nothing_of_other_rows_nor_of_padding(
    seed: int, length: int, more: int, mass: float
) -> None:
    score = scores(seed, 3, length)
    attrs = {"capacity": 8, "mass": mass}
    (counts,) = call("adaptive_counts", [score], attrs)
    wider = torch.cat([score, torch.full((3, more), -1.0)], 1)
    assert torch.equal(call("adaptive_counts", [wider], attrs)[0], counts)
    for row in range(3):
        assert (
            call("adaptive_counts", [score[row : row + 1]], attrs)[0].tolist()
            == counts[row : row + 1].tolist()
        )


@FEW
@given(seeds, st.integers(1, 16), st.sampled_from([0.0, 0.6]), st.sampled_from([0, 2]))
def test_onnx_counts_the_same(seed: int, length: int, mass: float, levels: int) -> None:
    score, attrs = scores(seed, 2, length, levels), {"capacity": 5, "mass": mass}
    found = onnx_call.run("adaptive_counts", [score], attrs)
    assert torch.equal(found[0], call("adaptive_counts", [score], attrs)[0])


# ---- drop_tokens -----------------------------------------------------------------------------------------
def draw(seed: int, length: int, padding: bool) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    flags = torch.randint(-1, 2, (3, length), generator=generator).float()
    valid = (torch.rand(3, length, generator=generator) > 0.3).float() if padding else None
    return flags, valid


@LAWS
@given(seeds, st.integers(1, 24), st.booleans(), st.integers(0, 24), st.integers(0, 2), st.integers(0, 2))
def test_the_map_and_its_checks_say_the_same(
    seed: int, length: int, padding: bool, count: int, prefix: int, suffix: int
) -> None:
    count = min(count, length)
    prefix = min(prefix, length)
    suffix = min(suffix, length - prefix)
    flags, valid = draw(seed, length, padding)
    attrs = {"count": count, "prefix": prefix, "suffix": suffix}
    slot, keep, source, size, fits = call("drop_tokens", [flags, valid], attrs)
    left = length - count
    assert keep.shape == size.shape == (3, left) and source.shape == (3, count)
    assert {slot.dtype, keep.dtype, source.dtype} == {torch.int32}
    for row in range(3):
        wanted = [
            bool(f != 0) and (valid is None or bool(valid[row, i] > 0)) for i, f in enumerate(flags[row])
        ]
        stays = [w or i < prefix or i >= length - suffix for i, w in enumerate(wanted)]
        places, gone = keep[row].tolist(), source[row].tolist()
        assert sorted([*places, *gone]) == list(range(length))
        assert places == sorted(places) and gone == sorted(gone)
        assert bool(fits[row]) == (sum(stays) <= left)
        assert size[row].tolist() == [float(wanted[p]) for p in places]
        expected = [-1] * length
        for number, place in enumerate(places):
            if stays[place]:
                expected[place] = number
        assert slot[row].tolist() == (expected if fits[row] else [0] * length)
        if fits[row]:
            assert all(p in places for p in range(length) if stays[p])


@LAWS
@given(seeds, st.integers(1, 20), st.integers(0, 6))
def test_padding_changes_nothing_for_the_real_tokens(seed: int, length: int, padding: int) -> None:
    flags, _ = draw(seed, length, False)
    flags = flags[:1]
    count = int((flags == 0).sum())
    slot, keep, _, size, fits = call("drop_tokens", [flags, None], {"count": count})
    assert bool(fits[0]) and (size == 1).all()
    total = length + padding
    where = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:length].sort().values
    wide, valid = torch.ones(1, total), torch.zeros(1, total)
    wide[0, where], valid[0, where] = flags[0], 1.0
    slot_, keep_, _, size_, fits_ = call("drop_tokens", [wide, valid], {"count": count})
    assert bool(fits_[0]) and int(size_.sum()) == keep.shape[1]
    real = size_[0] > 0
    assert torch.equal(keep_[0, real].long(), where[keep[0].long()])
    assert torch.equal(slot_[0, where] >= 0, slot[0] >= 0)
    assert (slot_[0, valid[0] == 0] == -1).all()


@FEW
@given(seeds, st.integers(1, 16), st.booleans(), st.integers(0, 2))
def test_onnx_makes_the_same_map(seed: int, length: int, padding: bool, prefix: int) -> None:
    flags, valid = draw(seed, length, padding)
    attrs = {"count": length // 3, "prefix": min(prefix, length)}
    found = onnx_call.run("drop_tokens", [flags, valid], attrs)
    assert all(torch.equal(a, b) for a, b in zip(found, call("drop_tokens", [flags, valid], attrs)))


# ---- tile_budgets ----------------------------------------------------------------------------------------
@LAWS
@given(
    seeds,
    st.sampled_from([(1, 2), (2, 1), (2, 2), (2, 3), (3, 1)]),
    st.sampled_from([(4, 4), (6, 6), (3, 5)]),
    st.sampled_from([0.1, 0.2, 0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.1, 0.5, 0.75, 1.0]),
    st.sampled_from([0, 1]),
)
def test_tiles_share_the_budget_by_largest_remainder(
    seed: int, grid: tuple[int, int], sides: tuple[int, int], rate: float, alpha: float, prefix: int
) -> None:
    tiles, patches = grid[0] * grid[1], sides[0] * sides[1]
    budget = patches * (tiles + 1) * round(100 * rate) // 100
    # Whole numbers add up exactly; they are large, so that remainders are hardly ever equal, or all nothing.
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(0, 10**5 if seed % 8 else 1, (2 * (tiles + 1), prefix + patches), generator=generator)
    attrs = {"rows": grid[0], "columns": grid[1], "height": sides[0], "width": sides[1]}
    attrs |= {"prefix": prefix, "budget": budget, "alpha": alpha}
    (counts,) = call("tile_budgets", [row.float()], attrs)
    region = reference.tile_of_patch(sides, grid)
    for image in range(2):
        whole = row[image * (tiles + 1), prefix:]
        found = counts[image * (tiles + 1) : (image + 1) * (tiles + 1)].tolist()
        first = min(patches, budget * round(100 * alpha) // 100)
        for_tiles = min(budget - first, tiles * patches)
        shares = [float(whole[region == tile].sum()) for tile in range(tiles)]
        expected = reference.largest_remainder(for_tiles, shares, patches)
        assert found == [budget - for_tiles, *expected] and sum(found) == budget


def test_equal_remainders_go_to_the_first_tile() -> None:
    shares = [14, 14, 12, 11, 10, 14]
    row = torch.zeros(7, 6)
    row[0] = torch.tensor(shares)
    attrs = {"rows": 2, "columns": 3, "height": 2, "width": 3, "budget": 25, "alpha": 0.0}
    (counts,) = call("tile_budgets", [row], attrs)
    assert counts.tolist() == [0, *reference.largest_remainder(25, shares, 6)]


@LAWS
@given(seeds, st.sampled_from([0.1, 0.25, 0.5]), st.sampled_from([0.1, 0.5, 0.75]), st.booleans())
def test_tile_counts_are_those_of_the_whole_rule(
    seed: int, rate: float, alpha: float, published: bool
) -> None:
    rows = torch.rand(5, 16, generator=torch.Generator().manual_seed(seed))
    attrs = {"rows": 2, "columns": 2, "height": 4, "width": 4, "alpha": alpha, "published": published}
    attrs["budget"] = 80 * round(100 * rate) // 100
    (counts,) = call("tile_budgets", [rows], attrs)
    rule = reference.hired_published_next if published else reference.hired
    kept = rule(rows[0], rows, rate, alpha, (2, 2))
    assert counts.tolist() == kept.sum(1).tolist()


@FEW
@given(seeds, st.integers(0, 80), st.sampled_from([0.0, 0.3, 1.0]), st.booleans())
def test_onnx_shares_the_same(seed: int, budget: int, alpha: float, published: bool) -> None:
    row = torch.rand(10, 17, generator=torch.Generator().manual_seed(seed))
    attrs = {"rows": 2, "columns": 2, "height": 4, "width": 4, "prefix": 1}
    attrs |= {"budget": budget, "alpha": alpha, "published": published}
    found = onnx_call.run("tile_budgets", [row], attrs)
    assert torch.equal(found[0], call("tile_budgets", [row], attrs)[0])


# ---- attention_rows --------------------------------------------------------------------------------------
def whole_softmax(q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None, causal: bool) -> Tensor:
    """float64 [B, H, N, M]."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q.double() @ k.double().transpose(2, 3) * (scale or q.shape[3] ** -0.5)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.double()
    if causal:
        past = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        logits = logits.masked_fill(~past, -torch.inf)
    return logits.softmax(-1)


cases = st.fixed_dictionaries(
    {
        "seed": seeds,
        "tokens": st.integers(1, 12),
        "heads": st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
        "mask": st.sampled_from(["none", "bool", "keys", "additive"]),
        "causal": st.booleans(),
        "scale": st.sampled_from([0.0, 0.3]),
        "sum": st.booleans(),
    }
)


def operands(p: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
    generator = torch.Generator().manual_seed(p["seed"])
    n, (heads, groups) = p["tokens"], p["heads"]
    q = torch.randn(2, heads, n, 8, generator=generator)
    k = torch.randn(2, groups, n, 8, generator=generator)
    mask: Tensor | None = None
    if p["mask"] == "bool":  # every token sees itself
        mask = (torch.rand(2, 1, n, n, generator=generator) > 0.4) | torch.eye(n, dtype=torch.bool)
    elif p["mask"] == "keys":
        first = torch.arange(n) == 0
        mask = (torch.rand(2, 1, 1, n, generator=generator) > 0.4) | first
    elif p["mask"] == "additive":
        mask = torch.randn(1, heads, n, n, generator=generator)
    attrs = {"causal": p["causal"], "scale": p["scale"], "heads": "sum" if p["sum"] else "mean"}
    return q, k, mask, attrs


def over_heads(rows: Tensor, p: dict[str, Any]) -> Tensor:
    return (rows.sum(1) if p["sum"] else rows.mean(1)).float()


@LAWS
@given(cases, st.data())
def test_a_row_is_that_row_of_the_whole_softmax(p: dict[str, Any], data: st.DataObject) -> None:
    q, k, mask, attrs = operands(p)
    first = data.draw(st.integers(0, p["tokens"] - 1))
    step = data.draw(st.integers(0, 4))
    whole = whole_softmax(q, k, mask, p["scale"] or None, p["causal"])
    chosen = whole[:, :, first::step] if step else whole[:, :, first : first + 1]
    expected = over_heads(chosen.mean(2), p)
    for run in (call, onnx_call.run):
        (found,) = run("attention_rows", [q, k, mask, None], {**attrs, "first": first, "step": step})
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@LAWS
@given(cases, st.data())
def test_the_last_row_is_that_of_the_last_token_that_is_no_padding(
    p: dict[str, Any], data: st.DataObject
) -> None:
    q, k, mask, attrs = operands(p)
    n = p["tokens"]
    lasts = [data.draw(st.integers(0, n - 1)) for _ in range(2)]
    valid = torch.zeros(2, n)
    for row, last in enumerate(lasts):
        valid[row, data.draw(st.integers(0, last)) : last + 1] = 1
    whole = whole_softmax(q, k, mask, p["scale"] or None, p["causal"])
    for given_valid, places in ((valid, lasts), (None, [n - 1, n - 1])):
        expected = over_heads(whole[torch.arange(2), :, places], p)
        (found,) = call("attention_rows", [q, k, mask, given_valid], {**attrs, "last": True})
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_the_class_row_is_the_reference_one() -> None:
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
    for heads in ("sum", "mean"):
        (found,) = call("attention_rows", [q, k], {"heads": heads})
        torch.testing.assert_close(found, reference.class_row(q, k, heads=heads))  # type: ignore[arg-type]


def test_bad_attributes_are_refused() -> None:
    with pytest.raises(ValueError, match="heads is one of"):
        call("attention_rows", [torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4)], {"heads": "max"})


@LAWS
@given(seeds, st.integers(1, 3))
def test_rows_that_do_not_fit_are_nan(seed: int, axis: int) -> None:
    x = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    fits = torch.tensor([1.0, 0.0, 1.0])
    (found,) = call("guard_rows", [x, fits], {"batch_axis": axis})
    assert found.select(axis, 1).isnan().all()
    for row in (0, 2):
        assert torch.equal(found.select(axis, row), x.select(axis, row))
