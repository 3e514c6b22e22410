"""The reference for dropping image tokens is itself right: what kept tokens take in, and FastV."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tests import reference_drop as drop
from tests.reference_draws import RATES, kept_of, keys, quick, scores

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
