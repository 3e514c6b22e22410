"""What a verification costs: the curve, smoothed, kept and found again; and the guard against what does not pay."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from elision.runtime import verify_costs
from elision.runtime.lm_step import Largest
from elision.runtime.speculation import Guard
from elision.runtime.verify_costs import VerifyCosts, costs_for, flat, measure, monotone
from hypothesis import given, settings
from hypothesis import strategies as st

numbers = st.lists(st.floats(-100, 100), max_size=12)
CURVE = VerifyCosts((1, 2, 4, 8), (10, 110), ((1.0, 2.0, 2.0, 6.0), (3.0, 3.0, 5.0, 9.0)))


class Timed:
    """Takes any rows, and remembers where they lie."""

    def __init__(self, capacity):
        self.capacity, self.vocabulary, self.largest_k = capacity, 5, 2
        self.given = []

    def largest(self, rows, keep=None):
        assert rows.slots.max() < self.capacity and rows.prefix.sum(1).max() <= self.capacity
        assert (rows.ids >= 0).all() and (rows.ids < self.vocabulary).all()
        self.given.append((len(rows), int(rows.prefix[0, 1])))
        return Largest(np.zeros((len(rows), 2), np.float32), np.zeros((len(rows), 2), np.int64))


# ---- smoothing -------------------------------------------------------------------------------------------
@given(numbers)
def test_monotone(values):
    found = monotone(values)
    assert len(found) == len(values)
    assert all(a <= b for a, b in itertools.pairwise(found))
    assert monotone(found) == pytest.approx(found)
    assert sum(found) == pytest.approx(sum(values), abs=1e-6)
    if values == sorted(values):
        assert found == values


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=9))
def test_monotone_is_the_closest(values):
    """The largest of the least means: i lies between all blocks that end at or after it and begin at or before it."""
    found = monotone(values)
    for i in range(len(values)):
        best = max(
            min(np.mean(values[low : high + 1]) for high in range(i, len(values))) for low in range(i + 1)
        )
        assert math.isclose(found[i], best, abs_tol=1e-9)


# ---- the curve -------------------------------------------------------------------------------------------
def test_what_was_measured_is_on_the_curve():
    for past, line in zip(CURVE.pasts, CURVE.seconds):
        curve = CURVE.curve(past, 8)
        assert len(curve) == 9 and [curve[rows] for rows in CURVE.rows] == list(line)


def test_between_and_beyond():
    assert CURVE.curve(10, 10) == [1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    assert CURVE.curve(60, 4) == [2.0, 2.0, 2.5, 3.0, 3.5]
    assert CURVE.curve(35, 2) == [1.5, 1.5, 2.25]
    assert CURVE.curve(0, 8) == CURVE.curve(10, 8) and CURVE.curve(9999, 8) == CURVE.curve(110, 8)
    assert CURVE.curve(10, 3) == CURVE.curve(10, 10)[:4]
    assert flat(0.5).curve(77, 200) == [0.5] * 201
    assert VerifyCosts((1,), (0,), ((2.0,),)).curve(5, 3) == [2.0] * 4


@given(st.data(), st.integers(1, 6), st.integers(1, 3), st.integers(0, 2000), st.integers(1, 150))
@settings(max_examples=50)
def test_curves_never_fall(data, sizes, lines, past, most):
    rows = (1, *sorted(data.draw(st.sets(st.integers(2, 64), min_size=sizes, max_size=sizes))))
    pasts = tuple(sorted(data.draw(st.sets(st.integers(0, 1500), min_size=lines, max_size=lines))))
    times = st.lists(st.floats(1e-4, 1), min_size=len(rows), max_size=len(rows))
    costs = VerifyCosts(rows, pasts, tuple(tuple(monotone(data.draw(times))) for _ in pasts))
    curve = costs.curve(past, most)
    assert len(curve) == most + 1 and min(curve) > 0
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(curve))
    assert VerifyCosts.from_json(json.loads(json.dumps(costs.to_json()))) == costs


# ---- measuring -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("capacity", [1, 2, 5, 16, 100, 130, 600, 2048])
def test_measuring_stays_within_the_cache(capacity):
    model, told = Timed(capacity), []
    found = measure(model, rounds=2, notify=told.append)
    assert found.rows[0] == 1 and found.rows[-1] <= max(1, capacity // 2)
    assert set(model.given) == {(rows, past) for rows in found.rows for past in found.pasts}
    assert len(model.given) == 3 * len(set(model.given)) and len(told) == len(found.pasts)
    assert all(a <= b for line in found.seconds for a, b in itertools.pairwise(line))
    assert VerifyCosts.from_json(json.loads(json.dumps(found.to_json()))) == found
    if capacity == 2048:
        assert found.rows == verify_costs.ROWS and found.pasts == verify_costs.PASTS


def test_the_time_is_that_of_the_calls(monkeypatch):
    """A clock that each call moves on by what it has rows, the first of each by more."""
    now, model = [0.0], Timed(400)
    monkeypatch.setattr(verify_costs.time, "perf_counter", lambda: now[0])
    plain = model.largest

    def largest(rows, keep=None):
        now[0] += len(rows) + (100 if (len(rows), int(rows.prefix[0, 1])) not in model.given else 0)
        return plain(rows, keep)

    model.largest = largest
    assert measure(model, (1, 2, 8), (64, 128)) == VerifyCosts(
        (1, 2, 8), (64, 128), ((1.0, 2.0, 8.0), (1.0, 2.0, 8.0))
    )


# ---- kept ------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ELISION_CACHE", str(tmp_path))
    return tmp_path


def kept(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file())


def test_kept_curves_are_found_again(folder):
    model = Timed(200)
    found = costs_for(model, "name", 1)
    (file,) = kept(folder)
    count = len(model.given)
    assert costs_for(model, "name", 1) == found and len(model.given) == count
    costs_for(model, "another", 1)
    costs_for(model, "name", 2)
    assert len(kept(folder)) == 3 and len(model.given) == 3 * count
    file.write_text(json.dumps(CURVE.to_json()))
    assert costs_for(model, "name", 1) == CURVE and len(model.given) == 3 * count
    again = costs_for(model, "name", 1, anew=True)
    assert len(model.given) == 4 * count and VerifyCosts.from_json(json.loads(file.read_text())) == again


def test_what_has_no_name_is_not_kept(folder):
    model = Timed(200)
    costs_for(model, None, 1)
    assert kept(folder) == [] and model.given


GOOD = json.loads(json.dumps(CURVE.to_json()))
DAMAGED = {
    "no json": "{",
    "nothing": "",
    "bytes": b"\xff\xfe\x00",
    "a list": "[1, 2]",
    "a number": "3",
    "no format": {key: value for key, value in GOOD.items() if key != "format"},
    "another format": GOOD | {"format": 99},
    "no rows": GOOD | {"rows": []},
    "rows from 2": GOOD | {"rows": [2, 3, 4, 8]},
    "rows in disorder": GOOD | {"rows": [1, 8, 4, 2]},
    "endless rows": '{"format": 1, "rows": [1, Infinity], "pasts": [0], "seconds": [[1, 1]]}',
    "pasts in disorder": GOOD | {"pasts": [110, 10]},
    "no pasts": GOOD | {"pasts": [], "seconds": []},
    "a line too few": GOOD | {"seconds": GOOD["seconds"][:1]},
    "a short line": GOOD | {"seconds": [[1, 2, 2], [1, 2, 2]]},
    "words": GOOD | {"seconds": [["a"] * 4] * 2},
    "no time": GOOD | {"seconds": [[0, 1, 1, 1]] * 2},
    "time goes back": GOOD | {"seconds": [[-1, 1, 1, 1]] * 2},
    "falling": GOOD | {"seconds": [[4, 3, 2, 1]] * 2},
    "no number": GOOD | {"seconds": [[1, math.nan, 2, 2]] * 2},
    "for ever": GOOD | {"seconds": [[1, 2, 2, math.inf]] * 2},
    "no lines": GOOD | {"seconds": None},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_are_measured_anew(folder, damage):
    model = Timed(200)
    costs_for(model, "name", 1)
    (file,) = kept(folder)
    bad = DAMAGED[damage]
    file.write_bytes(
        bad if isinstance(bad, bytes) else (bad if isinstance(bad, str) else json.dumps(bad)).encode()
    )
    count = len(model.given)
    found = costs_for(model, "name", 1)
    assert len(model.given) == 2 * count
    assert VerifyCosts.from_json(json.loads(file.read_text())) == found
    assert kept(folder) == [file]


# ---- the guard ---------------------------------------------------------------------------------------
def rounds(guard, count, tokens, seconds=1.0):
    """`count` rounds; whether each had a tree. A tree gives `tokens` in `seconds`, a plain round one in one."""
    wanted = []
    for _ in range(count):
        wanted.append(guard.wants())
        if wanted[-1]:
            guard.speculated(tokens, seconds, 1.0)
        else:
            guard.plain(1.0)
    return wanted


@pytest.mark.parametrize("tokens, seconds", [(2, 1.5), (3, 1.0), (1, 0.9), (1, 1.0)])
def test_what_pays_stays_on(tokens, seconds):
    assert all(rounds(Guard(), 300, tokens, seconds))


def runs(wanted):
    return [(on, len(list(group))) for on, group in itertools.groupby(wanted)]


def test_what_does_not_pay_is_tried_ever_more_rarely():
    found = runs(rounds(Guard(), 2000, 1, 1.5))
    assert found[:8] == [(True, 12), (False, 24), (True, 12), (False, 48), (True, 12), (False, 96), (True, 12),
                         (False, 192)]  # fmt: skip
    assert max(count for _, count in found) == 384
    assert runs(rounds(Guard(trial=3, pause=2, longest=5), 30, 1, 2.0))[:6] == [
        (True, 3), (False, 2), (True, 3), (False, 4), (True, 3), (False, 5),
    ]  # fmt: skip


def test_a_guard_changes_its_mind():
    guard = Guard()
    rounds(guard, 12 + 24 + 12 + 48, 1, 1.5)
    assert all(rounds(guard, 200, 3)), "pays now"
    late = rounds(guard, 200, 1, 1.5)
    assert late[0] and not all(late)
    assert next(count for on, count in runs(late) if not on) == 24  # the pauses are short again


def test_nothing_is_decided_before_anything_is_known():
    guard = Guard()
    for _ in range(100):
        assert guard.wants()
        guard.speculated(1, 9.0, 0.0)
