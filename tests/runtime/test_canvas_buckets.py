"""Few shapes: what fills a bucket up changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from elision.passes.errors import ElisionError
from elision.runtime.canvas_buckets import Bucketed
from elision.runtime.canvas_plan import canvas_ids
from elision.runtime.canvas_policies import NoCache, Window
from elision.runtime.canvas_sampler import Sampler

from .canvas_pairs import CONTEXT, MASK, TORCH_FIRST, V, opened, rows_of


def decided(model: Any, policy: Any, canvases: list[np.ndarray]) -> list[list[int]]:
    return [one.token_ids for one in Sampler(model, MASK, policy=policy).run(canvases)]


@pytest.mark.parametrize("runtime", TORCH_FIRST)
def test_scores_are_those_without_buckets(runtime: str) -> None:
    plain, rng = opened("modernbert", runtime).model, np.random.default_rng(0)
    model = Bucketed(plain, 8, 16)
    assert (model.capacity, model.vocabulary) == (CONTEXT - 1, V)
    ids = rng.integers(0, V, 21)
    for keep in (np.arange(3), np.arange(21), np.arange(0)):
        one, other = plain.refresh(3, ids, keep), model.refresh(3, ids, keep)
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_allclose(one.values, other.values, rtol=1e-4, atol=1e-4)
    part = rng.permutation(21)[:5]
    rows = rows_of(ids, part, 3)
    for whole in (False, True):
        one, other = plain.step(rows, np.arange(5), whole), model.step(rows, np.arange(5), whole)
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_allclose(one.entropy, other.entropy, rtol=1e-4, atol=1e-4)
        assert (other.logits is None) != whole


@pytest.mark.parametrize("policy", [Window(12, 4, 4), NoCache()], ids=["window", "none"])
def test_canvases_are_decided_alike_with_few_shapes(policy: Any) -> None:
    plain: Any = opened("modernbert", "torch").model
    model = Bucketed(plain, 8, 16)
    canvases = [canvas_ids([5, 3, 1][:count], 11 + count, MASK) for count in (1, 2, 3)]
    assert decided(model, policy, canvases) == decided(plain, policy, canvases)
    assert len(model.shapes) < 12
    for count, scored, width in model.shapes:
        assert count % 8 == scored % 8 == width % 8 == 0


def test_the_cache_of_the_canvas_is_not_touched_by_what_fills_up() -> None:
    plain: Any = opened("modernbert", "torch").model
    model = Bucketed(plain, 8, 16)
    for view in plain._rows.values():
        view[:] = np.nan
    ids = np.random.default_rng(1).integers(0, V, 9)
    model.refresh(4, ids, np.arange(9))
    for view in plain._rows.values():
        assert np.isfinite(view[:, 4:13]).all()
        assert np.isnan(view[:, :4]).all() and np.isnan(view[:, 13:-1]).all()
    scored = model.step(rows_of(ids, np.arange(3), 4), np.arange(3))
    assert np.isfinite(scored.values).all()


def test_buckets_of_nothing_are_refused() -> None:
    plain: Any = opened("modernbert", "torch").model
    with pytest.raises(ElisionError, match="1 or more rows"):
        Bucketed(plain, 0)
