"""The reference for dropping image tokens is itself right."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests import reference_drop as drop

GRIDS = [(1, 2), (2, 2), (3, 1)]
RATES = st.one_of(st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.floats(0, 1))
SIDES = st.sampled_from([2, 3, 4, 6])
quick = settings(max_examples=80, deadline=None)


def scores(*shape: int, seed: int = 0, levels: int = 0) -> Tensor:
    """Random scores; with levels so few that many are equal, and sums of them exact."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(0, levels, shape, generator=generator).float()
    return torch.rand(shape, generator=generator)


def keys(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kept_of(mask: Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in mask]


# The class token's row


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


# VisionZip


def test_visionzip_by_hand() -> None:
    row = torch.tensor([[0.0, 9, 1, 2, 8, 3, 0]])
    angle = torch.tensor([[0.0, 0, 0.1, 2, 0, 2.1, 1.9]])
    key = torch.stack([angle.cos(), angle.sin()], -1)
    zipped = drop.visionzip(row, key, 2, 2)
    # Left: 0 2 3 5 6, every second: 0 and 3.
    assert kept_of(zipped.kept) == [[1, 4]]
    assert zipped.targets.tolist() == [[0, 3]]
    assert zipped.assigned.tolist() == [[0, -1, 0, 1, -1, 1, 1]]
    x = torch.tensor([[[1.0], [2], [3], [4], [5], [6], [8]]])
    assert drop.visionzip_features(x, *zipped)[0, :, 0].tolist() == [2, 5, 1 + 3, 4 + 7]
    assert drop.visionzip_features(x, *zipped, mean=True)[0, :, 0].tolist() == [2, 5, 2, 6]


def test_equal_keys_go_to_the_first_target() -> None:
    zipped = drop.visionzip(torch.zeros(1, 8), torch.ones(1, 8, 5), 2, 3)
    assert kept_of(zipped.kept) == [[0, 1]]
    assert zipped.targets.tolist() == [[2, 4, 6]]
    assert zipped.assigned.tolist() == [[-1, -1, 0, 0, 1, 0, 2, 0]]
    for seed in range(20):  # and rounding does not part them
        key = keys(1, 1, 67, seed=seed).expand(1, 8, 67) * torch.linspace(0.3, 0.7, 8)[:, None]
        assert drop.visionzip(torch.zeros(1, 8), key, 2, 3).assigned.equal(zipped.assigned)
    assert drop.visionzip(torch.zeros(1, 8), torch.zeros(1, 8, 5), 2, 3).assigned.equal(zipped.assigned)


def test_all_and_nothing_of_visionzip() -> None:
    row, key, x = scores(2, 6), keys(2, 6, 3), keys(2, 6, 4, seed=1)
    everything = drop.visionzip(row, key, 6, 0)
    assert everything.kept.all() and everything.targets.shape == (2, 0)
    nothing = drop.visionzip(row, key, 0, 0)
    assert not nothing.kept.any() and (nothing.assigned == -1).all()
    own_slots = drop.visionzip(row, key, 0, 6)
    assert own_slots.assigned.tolist() == [list(range(6))] * 2
    for mean in (False, True):
        assert torch.equal(drop.visionzip_features(x, *everything, mean=mean), x)
        assert drop.visionzip_features(x, *nothing, mean=mean).shape == (2, 0, 4)
        assert torch.equal(drop.visionzip_features(x, *own_slots, mean=mean), x)
    for dominant, contextual in ((4, 3), (7, 0), (-1, 2), (2, -1)):
        with pytest.raises(ValueError):
            drop.visionzip(row, key, dominant, contextual)


@quick
@given(st.integers(1, 3), st.integers(1, 12), st.integers(0, 99), st.sampled_from([0, 2]), st.data())
def test_visionzip_covers_every_token_once(
    pictures: int, patches: int, seed: int, levels: int, data: st.DataObject
) -> None:
    dominant = data.draw(st.integers(0, patches))
    contextual = data.draw(st.integers(min(1, patches - dominant), patches - dominant))
    row, key = scores(pictures, patches, seed=seed, levels=levels), keys(pictures, patches, 3, seed=seed)
    x = keys(pictures, patches, 2, seed=seed + 1)
    zipped = drop.visionzip(row, key, dominant, contextual)
    assert torch.equal(zipped.kept.sum(1), torch.full((pictures,), dominant))
    assert torch.equal(zipped.kept, zipped.assigned == -1)
    assert int(zipped.assigned.max()) < max(1, contextual)
    published = drop.visionzip_features(x, *zipped)
    averaged = drop.visionzip_features(x, *zipped, mean=True)
    for t in range(pictures):
        others = [p for p in range(patches) if not zipped.kept[t, p]]
        targets = [others[i * (len(others) // contextual)] for i in range(contextual)]
        assert zipped.targets[t].tolist() == targets
        groups: list[list[int]] = [[] for _ in targets]
        for p in others:
            if p in targets:
                assert zipped.assigned[t, p] == targets.index(p)
            else:
                near = [float(F.cosine_similarity(key[t, p], key[t, target], 0)) for target in targets]
                assert near[int(zipped.assigned[t, p])] >= max(near) - 1e-6
                groups[int(zipped.assigned[t, p])].append(p)
        summed = [x[t, p] + (x[t, g].mean(0) if g else 0) for p, g in zip(targets, groups)]
        means = [x[t, [p, *g]].mean(0) for p, g in zip(targets, groups)]
        torch.testing.assert_close(published[t], torch.stack([*x[t][zipped.kept[t]], *summed]))
        torch.testing.assert_close(averaged[t], torch.stack([*x[t][zipped.kept[t]], *means]))
        alone = drop.visionzip(row[t : t + 1], key[t : t + 1], dominant, contextual)
        assert all(torch.equal(one[0], many[t]) for one, many in zip(alone, zipped))
    # Weighted by how many went in, means carry the whole sum of the tokens.
    sizes = F.one_hot(zipped.assigned + 1, contextual + 1)[:, :, 1:].sum(1)
    weights = torch.cat([torch.ones(pictures, dominant), sizes], 1).double()
    torch.testing.assert_close((averaged * weights[..., None]).sum(1), x.sum(1))


# PruMerge


def test_prumerge_by_hand() -> None:
    row = torch.tensor([[0.5, 0.0, 0.25, 0.125]])
    angle = torch.tensor([[0.0, 0.1, 0.3, 2.0]])
    key = torch.stack([angle.cos(), angle.sin()], -1)
    x = torch.tensor([[[1.0], [10], [100], [1000]]])
    kept, merged = drop.prumerge(row, key, x, 2, 2)
    assert kept_of(kept) == [[0, 2]]
    # Nearest to 0: 1 and 2 (a kept one); to 2: 1 and 0.
    assert merged[0, :, 0].tolist() == [1 + 0 * 10 + 0.25 * 100, 100 + 0 * 10 + 0.5 * 1]
    kept, merged = drop.prumerge(row, key, x, 2, 2, mean=True)
    assert merged[0, :, 0].tolist() == [(0.5 * 1 + 0.25 * 100) / 0.75, (0.25 * 100 + 0.5 * 1) / 0.75]


def test_all_and_nothing_of_prumerge() -> None:
    row, key, x = scores(2, 6), keys(2, 6, 3), keys(2, 6, 4, seed=1)
    kept, merged = drop.prumerge(row, key, x, 6)  # neighbours are at most all others
    assert kept.all()
    everyone = (row[..., None] * x).sum(1, keepdim=True)
    torch.testing.assert_close(merged, x + everyone - row[..., None] * x)
    kept, merged = drop.prumerge(row, key, x, 0)
    assert not kept.any() and merged.shape == (2, 0, 4)
    for mean in (False, True):
        assert torch.allclose(drop.prumerge(row, key, x, 6, 0, mean=mean)[1], x)
        assert torch.equal(drop.prumerge(torch.zeros(2, 6), key, x, 6, 3, mean=mean)[1], x)
        assert torch.allclose(drop.prumerge(row[:, :1], key[:, :1], x[:, :1], 1, mean=mean)[1], x[:, :1])
    for keep, neighbours in ((7, 2), (-1, 2), (2, -1)):
        with pytest.raises(ValueError):
            drop.prumerge(row, key, x, keep, neighbours)


def test_equal_keys_are_near_in_order() -> None:
    x = torch.tensor([[[1.0], [2], [4], [8], [16]]])
    kept, merged = drop.prumerge(torch.ones(1, 5), torch.ones(1, 5, 3), x, 3, 2)
    assert kept_of(kept) == [[0, 1, 2]]
    assert merged[0, :, 0].tolist() == [1 + 2 + 4, 2 + 1 + 4, 4 + 1 + 2]


@quick
@given(st.integers(1, 3), st.integers(1, 10), st.integers(0, 10), st.integers(0, 99), st.data())
def test_prumerge_in_loops(
    pictures: int, patches: int, neighbours: int, seed: int, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(0, patches))
    row, key = scores(pictures, patches, seed=seed).double(), keys(pictures, patches, 3, seed=seed)
    x = keys(pictures, patches, 2, seed=seed + 1)
    kept, merged = drop.prumerge(row, key, x, keep, neighbours)
    _, averaged = drop.prumerge(row, key, x, keep, neighbours, mean=True)
    assert torch.equal(kept.sum(1), torch.full((pictures,), keep))
    assert merged.shape == averaged.shape == (pictures, keep, 2)
    for t in range(pictures):
        for i, p in enumerate(kept_of(kept)[t]):
            near = {o: float(F.cosine_similarity(key[t, p], key[t, o], 0)) for o in range(patches) if o != p}
            taken = sorted(near, key=lambda o: -near[o])[:neighbours]
            total = x[t, p] + sum(row[t, o] * x[t, o] for o in taken)
            torch.testing.assert_close(merged[t, i], total)
            weight = row[t, [p, *taken]]
            torch.testing.assert_close(averaged[t, i], weight @ x[t, [p, *taken]] / weight.sum())
        alone = drop.prumerge(row[t : t + 1], key[t : t + 1], x[t : t + 1], keep, neighbours)
        assert torch.equal(alone[0][0], kept[t])
        torch.testing.assert_close(alone[1][0], merged[t])


def test_a_token_is_not_its_own_neighbour() -> None:
    x = torch.tensor([[[1.0], [2]]])
    _, merged = drop.prumerge(torch.ones(1, 2), torch.tensor([[[1.0], [-1]]]), x, 2, 1)
    assert merged[0, :, 0].tolist() == [3, 3]


def test_prumerge_counts_the_outliers_of_each_picture() -> None:
    row = torch.arange(8.0).repeat(3, 1)  # quartiles 1.75 and 5.25, fence 10.5
    row[0, 7] = 10.5  # on it
    row[1, 7] = 10.6
    row[2, 5:] = 100  # quartile 3 is now 100
    assert drop.prumerge_count(row).tolist() == [0, 1, 0]
    assert drop.prumerge_count(torch.ones(2, 5)).tolist() == [0, 0]
    # A faint picture beside a bright one has outliers of its own.
    faint = torch.tensor([[1.0, 1, 1, 1, 1, 1, 1, 2]])
    both = torch.cat([faint, 100 * scores(1, 8)])
    assert drop.prumerge_count(both)[0] == drop.prumerge_count(faint)[0] == 1
    assert drop.prumerge_count(both.reshape(1, 16)) == 0


# FastV


def test_fastv_by_hand() -> None:
    row = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.4, 0.1, 0.2, 0.3]])
    assert kept_of(drop.fastv(row, 0.5)) == [[1, 2], [0, 3]]
    assert kept_of(drop.fastv(torch.ones(1, 4), 0.25)) == [[0, 1, 2]]
    assert drop.fastv(row, 0.0).all()
    assert not drop.fastv(row, 1.0).any()
    assert drop.fastv(scores(1, 10), 0.75).sum() == 2  # 2.5: the even number
    assert drop.fastv(scores(1, 10), 0.65).sum() == 4  # 3.5
    assert drop.fastv(scores(1, 576), 0.75).sum() == 144
    for ratio in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError):
            drop.fastv(row, ratio)


# All that choose by a score


@quick
@given(st.integers(1, 4), st.integers(1, 16), RATES, st.integers(0, 99), st.data())
def test_samples_do_not_see_each_other(
    batch: int, patches: int, rate: float, seed: int, data: st.DataObject
) -> None:
    row = scores(batch, patches, seed=seed, levels=data.draw(st.sampled_from([0, 3])))
    mask = drop.fastv(row, rate)
    assert torch.equal(mask.sum(1), torch.full((batch,), round(round(patches * (1 - rate), 9))))
    order = data.draw(st.permutations(range(batch)))
    assert torch.equal(drop.fastv(row[order], rate), mask[order])
    assert torch.equal(drop.prumerge_count(row[order]), drop.prumerge_count(row)[order])
    for t in range(batch):
        assert torch.equal(drop.fastv(row[t : t + 1], rate)[0], mask[t])
        assert drop.prumerge_count(row[t : t + 1])[0] == drop.prumerge_count(row)[t]


@quick
@given(st.lists(st.sampled_from([0.0, -0.0, 0.5, 1.0]), min_size=1, max_size=12), RATES, st.data())
def test_of_equal_scores_the_first_are_kept(values: list[float], rate: float, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(values))))
    row, moved = torch.tensor([values]), torch.tensor([[values[i] for i in order]])
    count = math.floor(round(rate * len(values), 9))
    for scored in (row, moved):
        expected = sorted(sorted(range(len(values)), key=lambda i: (-scored[0, i].item(), i))[:count])
        assert kept_of(drop.hired_published_15(scored, rate)) == [expected]
        assert kept_of(drop.visionzip(scored, torch.ones(1, len(values), 2), count, 0).kept) == [expected]
    # Whatever their order, the scores that are kept are the same.
    kept = [scored[drop.hired_published_15(scored, rate)].sort().values for scored in (row, moved)]
    assert torch.equal(*kept)
    # All equal: a permutation changes nothing at all.
    equal = torch.full((1, len(values)), values[0])
    assert kept_of(drop.fastv(equal, 1 - rate)) == [list(range(int(drop.fastv(equal, 1 - rate).sum())))]
    assert torch.equal(drop.hired_published_15(equal[:, order], rate), drop.hired_published_15(equal, rate))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_keep_their_dtype(dtype: torch.dtype) -> None:
    row, key, x = scores(2, 8), keys(2, 8, 3).to(dtype), keys(2, 8, 4).to(dtype)
    for mean in (False, True):
        assert drop.visionzip_features(x, *drop.visionzip(row, key, 3, 2), mean=mean).dtype == dtype
        assert drop.prumerge(row, key, x, 3, 2, mean=mean)[1].dtype == dtype
