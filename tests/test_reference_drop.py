"""The reference for dropping image tokens is itself right."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import reference_drop as drop
from tests.reference_draws import GRIDS, RATES, SIDES, kept_of, keys, quick, scores


@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_class_row_is_that_row_of_the_whole_softmax(scale: float | None) -> None:
    q, k = keys(2, 3, 7, 4, seed=1), keys(2, 3, 7, 4, seed=2)
    whole = (q @ k.transpose(-1, -2) * (0.5 if scale is None else scale)).softmax(-1)[:, :, 0]
    torch.testing.assert_close(drop.class_row(q, k, scale), whole.sum(1))
    torch.testing.assert_close(drop.class_row(q, k, scale, "mean"), whole.mean(1))
    torch.testing.assert_close(drop.class_row(q, k).sum(1), torch.full((2,), 3.0, dtype=torch.float64))


def test_heads_that_are_not_split_are_one_wide_head() -> None:
    q, k = keys(1, 3, 7, 4, seed=1), keys(1, 3, 7, 4, seed=2)
    wide_q, wide_k = (v.transpose(1, 2).reshape(1, 1, 7, 12) for v in (q, k))
    expected = ((q @ k.transpose(-1, -2)).sum(1) / 12**0.5).softmax(-1)[:, 0]
    torch.testing.assert_close(drop.class_row(wide_q, wide_k), expected)


# Largest remainder


def test_largest_remainder_by_hand() -> None:
    assert drop.largest_remainder(10, [1, 1, 1], 10) == [4, 3, 3]  # equal remainders: the first
    assert drop.largest_remainder(10, [0.1, 0.2, 0.7], 10) == [1, 2, 7]
    assert drop.largest_remainder(5, [3, 2, 2], 5) == [2, 2, 1]  # 2.14, 1.43, 1.43
    assert drop.largest_remainder(10, [8, 1, 1], 5) == [5, 3, 2]  # three are cut off the first
    assert drop.largest_remainder(9, [8, 3, 1, 0], 4) == [
        4,
        4,
        1,
        0,
    ]  # the cap bites once more: 5 * 3/4 is 3.75
    assert drop.largest_remainder(7, [1, 0, 0], 4) == [4, 2, 1]  # nothing to go by: equal parts
    assert drop.largest_remainder(3, [0, 0], 4) == [2, 1]
    assert drop.largest_remainder(0, [1, 2], 4) == [0, 0]
    assert drop.largest_remainder(8, [1, 2], 4) == [4, 4]
    assert drop.largest_remainder(0, [], 4) == []
    assert drop.largest_remainder(0, [1], 0) == [0]


@pytest.mark.parametrize(
    "total, shares", [(9, [1, 1]), (-1, [1]), (1, []), (1, [-1.0, 2]), (1, [math.nan]), (1, [math.inf])]
)
def test_what_largest_remainder_refuses(total: int, shares: list[float]) -> None:
    with pytest.raises(ValueError):
        drop.largest_remainder(total, shares, 4)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=7), st.integers(0, 40), st.data())
def test_largest_remainder_adds_up(shares: list[float], cap: int, data: st.DataObject) -> None:
    total = data.draw(st.integers(0, cap * len(shares)))
    counts = drop.largest_remainder(total, shares, cap)
    assert sum(counts) == total
    assert all(0 <= count <= cap for count in counts)
    for share, count in zip(shares, counts):
        for other, other_count in zip(shares, counts):
            assert share <= other or count >= other_count  # a larger share never gets less
    assert drop.largest_remainder(total, [share * 4 for share in shares], cap) == counts
    # Below the cap nobody is off its quota by a whole token.
    if sum(shares) > 0 and max(counts) < cap:
        quotas = [total * share / math.fsum(shares) for share in shares]
        assert all(abs(count - quota) < 1 + 1e-6 for count, quota in zip(counts, quotas))


# HiRED


def test_the_published_15_rule_looks_at_the_first_sample_only() -> None:
    row = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.4, 0.1, 0.2, 0.3]])
    assert kept_of(drop.hired_published_15(row, 0.5)) == [[1, 2], [1, 2]]
    assert kept_of(drop.hired_published_15(row.flip(0), 0.5)) == [[0, 3], [0, 3]]
    assert kept_of(drop.hired_published_15(row, 0.7)) == [[1, 2], [1, 2]]  # floor(2.8)
    assert drop.hired_published_15(row, 1.0).all()
    assert not drop.hired_published_15(row, 0.2).any()  # floor(0.8)
    assert kept_of(drop.hired_published_15(torch.ones(2, 4), 0.5)) == [[0, 1], [0, 1]]


@quick
@given(st.integers(2, 4), st.integers(1, 20), RATES, st.integers(0, 99))
def test_published_15_depends_on_the_first_sample(batch: int, patches: int, rate: float, seed: int) -> None:
    row = scores(batch, patches, seed=seed)
    mask = drop.hired_published_15(row, rate)
    other = torch.cat([row[:1], scores(batch - 1, patches, seed=seed + 1)])
    assert torch.equal(mask, drop.hired_published_15(other, rate))
    assert torch.equal(mask, drop.hired_published_15(row[:1], rate).expand(batch, -1))


def test_strips_are_not_tiles() -> None:
    strips = torch.arange(576) // 144
    tiles = drop.tile_of_patch((24, 24), (2, 2))
    assert (strips == tiles).float().mean() == 0.5
    assert strips[: 6 * 24].unique().tolist() == [0]
    # In a grid of one column the strips are the tiles; in a grid of one row they are not.
    assert torch.equal(drop.tile_of_patch((24, 24), (3, 1)), torch.arange(576) // 192)
    assert (drop.tile_of_patch((24, 24), (1, 2)) == torch.arange(576) // 288).float().mean() == 0.5


def test_a_patch_belongs_to_the_tile_of_its_centre() -> None:
    assert drop.tile_of_patch((2, 2), (2, 2)).tolist() == [0, 1, 2, 3]
    assert drop.tile_of_patch((1, 3), (1, 2)).tolist() == [0, 1, 1]  # on the border: the later one
    assert drop.tile_of_patch((4, 1), (3, 1)).tolist() == [0, 1, 1, 2]
    assert drop.tile_of_patch((2, 1), (3, 1)).tolist() == [0, 2]  # no centre in the middle
    assert drop.tile_of_patch((3, 4), (2, 2)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]


def one_corner() -> tuple[Tensor, Tensor]:
    """All attention of the full image in its top right quarter, 4 x 4 patches, and equal scores in the pictures."""
    row = torch.zeros(4, 4)
    row[:2, 2:] = 1
    return row.flatten(), torch.ones(5, 16)


def test_hired_spends_on_the_right_tile_and_the_published_rule_on_strips() -> None:
    row, rows = one_corner()
    # Budget 0.2 * 80 = 16, of which 8 for the full image.
    assert drop.hired(row, rows, 0.2, 0.5, (2, 2)).sum(1).tolist() == [8, 0, 8, 0, 0]
    # 8 votes: the corner's patches in rows 0 and 1, then by index 0, 1 and 4, 5: four for each of two strips.
    assert drop.hired_published_next(row, rows, 0.2, 0.5, (2, 2)).sum(1).tolist() == [8, 4, 4, 0, 0]


def test_the_published_rule_counts_votes_and_does_not_weigh_them() -> None:
    row = torch.tensor([9.0, 1, 0, 0, 2, 2, 0, 0])
    rows = torch.ones(3, 8)
    # Budget 12, 6 for the tiles. Strips of 4: sums 10 and 4, but of the best four patches two in each.
    assert drop.hired_published_next(row, rows, 0.5, 0.5, (1, 2)).sum(1).tolist() == [6, 3, 3]
    assert drop.hired(row, rows, 0.5, 0.5, (2, 1), (4, 2)).sum(1).tolist() == [6, 4, 2]  # 4.29 and 1.71


def test_the_published_rule_loses_budget_to_floors_and_clamps() -> None:
    # Floors: three tiles with a vote each share 4, and three of these are spent.
    spread = torch.tensor([1.0, 0, 1, 0, 1, 0])
    published = drop.hired_published_next(spread, scores(4, 6), 1 / 3, 0.5, (3, 1))
    assert published.sum(1).tolist() == [4, 1, 1, 1]
    ours = drop.hired(spread, scores(4, 6), 1 / 3, 0.5, (3, 1), (3, 2))
    assert ours.sum(1).tolist() == [4, 2, 1, 1]
    # The clamp: 64 of 80 patches, of which the full image is to get 32 or 48, and two tiles with all the votes.
    row, rows = torch.arange(16.0), scores(5, 16)
    assert drop.hired_published_next(row, rows, 0.8, 0.5, (2, 2)).sum(1).tolist() == [16, 0, 0, 16, 16]
    assert drop.hired_published_next(row, rows, 0.8, 0.75, (2, 2)).sum(1).tolist() == [16, 0, 0, 0, 16]
    # Sums 10, 18, 42 and 50: the last two are capped, 10 and 18 share the 16 that are left.
    for alpha in (0.5, 0.75):
        assert drop.hired(row, rows, 0.8, alpha, (2, 2)).sum(1).tolist() == [16, 6, 10, 16, 16]


def test_a_grid_that_does_not_divide_the_patches() -> None:
    row, rows = scores(16), scores(4, 16)
    with pytest.raises(ValueError, match="strips"):
        drop.hired_published_next(row, rows, 0.1, 0.5, (3, 1))
    # Tiles of 1, 2 and 1 rows of patches, equal scores.
    assert drop.hired(torch.ones(16), rows, 0.25, 0.5, (3, 1)).sum(1).tolist() == [8, 2, 4, 2]
    assert drop.hired(row, rows, 0.1, 0.5, (3, 1)).sum() == 6


def test_without_votes_the_published_tiles_get_nothing() -> None:
    row, rows = scores(4), scores(3, 4)
    assert drop.hired_published_next(row, rows, 0.5, 0.8, (1, 2)).sum(1).tolist() == [4, 0, 0]
    assert drop.hired(row, rows, 0.5, 0.8, (1, 2)).sum(1).tolist()[0] == 4


def test_equal_tiles_are_equal_however_they_are_summed() -> None:
    row = torch.tensor([0.3, 0.2, 0.1, 0.1, 0.2, 0.3], dtype=torch.float64)
    assert row[:3].tolist() != row[3:].tolist() and 0.3 + 0.2 + 0.1 < 0.1 + 0.2 + 0.3
    assert drop.hired(row, scores(3, 6), 1 / 18, 0.0, (2, 1), (2, 3)).sum(1).tolist() == [0, 1, 0]


def test_what_the_tiles_cannot_take_goes_to_the_full_image() -> None:
    counts = drop.hired(scores(4), scores(3, 4), 0.75, 0.0, (1, 2)).sum(1)
    assert counts.tolist() == [1, 4, 4]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rule", [drop.hired, drop.hired_published_next])
def test_all_and_nothing_of_hired(rule, grid: tuple[int, int]) -> None:
    count = 1 + grid[0] * grid[1]
    row, rows = scores(36), scores(count, 36)
    for alpha in (0.0, 0.5, 1.0):
        assert rule(row, rows, 1.0, alpha, grid).all()
        assert not rule(row, rows, 0.0, alpha, grid).any()
        assert not rule(row, rows, 0.9 / (36 * count), alpha, grid).any()  # less than one token
    assert not rule(row, rows, 0.2, 1.0, grid)[1:].any()
    for bad in ((-0.1, 0.5), (1.1, 0.5), (math.nan, 0.5), (0.5, -0.1), (0.5, 2.0)):
        with pytest.raises(ValueError):
            rule(row, rows, *bad, grid)
    with pytest.raises(ValueError, match="rows_final"):
        rule(row, rows[:-1], 0.5, 0.5, grid)


def test_a_picture_that_is_not_square_says_its_shape() -> None:
    with pytest.raises(ValueError, match="2 x 2"):
        drop.hired(scores(6), scores(3, 6), 0.5, 0.5, (1, 2))
    assert drop.hired(scores(6), scores(3, 6), 0.5, 0.5, (1, 2), (2, 3)).sum() == 9


def test_shares_are_not_cut_by_rounding_errors() -> None:
    assert 0.29 * 100 < 29 and (1 - 0.9) * 10 < 1  # as floats
    assert drop.hired_published_15(scores(1, 100), 0.29).sum() == 29
    # One vote, for the first tile; 2 tokens of 20 for the tiles.
    row = torch.arange(10.0).flip(0)
    assert drop.hired_published_next(row, scores(3, 10), 2 / 3, 0.9, (1, 2)).sum(1).tolist() == [10, 2, 0]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(GRIDS), SIDES, RATES, RATES, st.integers(0, 99), st.sampled_from([0, 1, 3]))
def test_hired_spends_its_budget(
    grid: tuple[int, int], side: int, rate: float, alpha: float, seed: int, levels: int
) -> None:
    tiles, patches = grid[0] * grid[1], side * side
    row, rows = (
        scores(patches, seed=seed, levels=levels),
        scores(tiles + 1, patches, seed=seed, levels=levels),
    )
    ours = drop.hired(row, rows, rate, alpha, grid)
    budget = math.floor(round(rate * patches * (tiles + 1), 9))
    assert ours.sum() == budget
    for scores_of_one, kept in zip(rows, ours):  # the best of each picture
        if kept.any() and not kept.all():
            assert scores_of_one[kept].min() >= scores_of_one[~kept].max()
    if patches % tiles == 0:
        published = drop.hired_published_next(row, rows, rate, alpha, grid)
        assert published.sum() <= budget
        full = math.floor(round(alpha * budget, 9))
        assert published[0].sum() == (patches if rate == 1 else min(patches, full))
        assert ours[0].sum() >= published[0].sum()


@quick
@given(st.sampled_from(GRIDS), SIDES, RATES, st.randoms(use_true_random=False), st.integers(0, 99))
def test_the_budget_of_a_tile_knows_no_order_in_its_region(grid, side, rate, shuffle, seed) -> None:
    tiles, patches = grid[0] * grid[1], side * side
    row, rows = scores(patches, seed=seed), scores(tiles + 1, patches, seed=seed)
    moved = row.clone()
    region = drop.tile_of_patch((side, side), grid)
    for tile in range(tiles):
        places = (region == tile).nonzero()[:, 0].tolist()
        moved[places] = row[shuffle.sample(places, len(places))]
    assert torch.equal(drop.hired(row, rows, rate, 0.5, grid), drop.hired(moved, rows, rate, 0.5, grid))
