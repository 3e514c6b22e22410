"""Plans: what each policy computes, reads and offers, whatever is decided."""

from __future__ import annotations

import numpy as np
import pytest
from elision.passes.errors import ElisionError
from elision.runtime.canvas_plan import Canvas, Plan, canvas_ids, refresh_plan, step_plan
from elision.runtime.canvas_policies import (
    POLICIES,
    Block,
    Delayed,
    Dual,
    NoCache,
    Prefix,
    Window,
    policy_named,
    section_of,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

MASK = 9


@st.composite
def windows(draw) -> Window:
    active = draw(st.integers(1, 8))
    return Window(
        max(2, active + draw(st.integers(0, 8))),  # 1 is no window in the published form
        active,
        draw(st.integers(1, 6)),
        draw(st.sampled_from(["contiguous", "scattered"])),
        draw(st.sampled_from(["prefix", "full"])),
        draw(st.booleans()),
        draw(st.sampled_from([None, None, "reference"])),
    )


others = st.one_of(
    st.integers(1, 9).map(Prefix),
    st.integers(1, 9).map(Dual),
    st.integers(1, 5).map(Delayed),
    st.integers(1, 9).map(Block),
    st.just(NoCache()),
)


@st.composite
def canvases(draw) -> np.ndarray:
    """A prompt and masks, or masks anywhere."""
    if draw(st.booleans()):
        return canvas_ids([1] * draw(st.integers(0, 6)), draw(st.integers(1, 24)), MASK)
    masked = draw(st.lists(st.booleans(), min_size=1, max_size=30))
    assume(any(masked))
    return np.where(masked, MASK, 1)


def ascending(positions: np.ndarray) -> bool:
    return bool((np.diff(positions) > 0).all())


def checked(plan: Plan, canvas: Canvas, written: set[int], shift: bool) -> set[int]:
    """What every plan keeps; the positions seen."""
    seen = {*range(plan.run), *plan.extras.tolist()}
    computed = set(plan.compute.tolist())
    assert computed and computed <= seen and max(seen) < len(canvas)
    assert ascending(plan.compute) and ascending(plan.candidates) and ascending(plan.extras)
    assert not len(plan.extras) or plan.extras[0] >= plan.run
    assert set(plan.candidates.tolist()) <= set(canvas.masks.tolist())
    assert set(plan.deciding.tolist()) <= computed
    assert plan.deciding.tolist() == [max(0, p - 1) if shift else p for p in plan.candidates.tolist()]
    places, inverse = plan.scored()
    assert len(set(places.tolist())) == len(places)
    assert plan.compute[places[inverse]].tolist() == plan.deciding.tolist()
    if plan.refresh:
        assert plan.compute.tolist() == list(range(plan.extent))
        assert computed == seen or plan.extent == len(canvas)
    else:
        assert seen <= written | computed, "a slot is read that nobody wrote"
    return seen


@settings(max_examples=300, deadline=None)
@given(st.one_of(windows(), others), canvases(), st.booleans(), st.integers(1, 5), st.integers(0, 99))
def test_every_plan(policy, ids, shift, wanted, seed):
    """Everything is decided, some of it at each step (but in the published form); bounds hold."""
    random = np.random.default_rng(seed)
    canvas = Canvas(ids, MASK)
    state = policy.begin(canvas, shift)
    window = policy if isinstance(policy, Window) else None
    written: set[int] = set()
    once: set[int] = set()
    for step in range(len(ids) * 8):
        if not len(canvas.masks):
            break
        plan = state.plan(wanted)
        seen = checked(plan, canvas, written, shift)
        assert step or plan.refresh
        masked = set(canvas.masks.tolist())
        if window is not None:
            if window.extent == "prefix" or not plan.refresh:
                assert len(masked & seen) <= window.window
            if not plan.refresh:
                computed = masked & set(plan.compute.tolist())
                assert len(plan.candidates) <= window.active
                if window.form == "scattered" or window.slide:
                    assert len(computed) <= window.active * (1 + shift)
            if not window.reference:
                at_hand = min(window.active, len(masked), wanted)
                assert len(plan.candidates) >= at_hand
        else:
            assert len(plan.candidates)
        low, high = section_of(state.sections, min(masked))
        assert all(low <= p < high for p in plan.candidates.tolist())
        written = written | set(plan.compute.tolist())
        count = min(len(plan.candidates), wanted if plan.exactly is None else plan.exactly)
        chosen = random.permutation(plan.candidates)[:count]
        assert not once & set(chosen.tolist())
        once |= set(chosen.tolist())
        canvas.decide(chosen, np.ones(len(chosen), np.int64))
        state.decided(np.sort(chosen))
    assert not len(canvas.masks) and once == set(np.flatnonzero(ids == MASK).tolist())


def story(policy, ids, decisions, shift=False, wanted=1):
    """For each step: (refresh, computed, seen, candidates), given what is decided."""
    canvas = Canvas(ids, MASK)
    state = policy.begin(canvas, shift)
    told = []
    for decided in decisions:
        plan = state.plan(wanted)
        seen = [*range(plan.run), *plan.extras.tolist()]
        told.append((plan.refresh, plan.compute.tolist(), seen, plan.candidates.tolist()))
        assert set(decided) <= set(plan.candidates.tolist())
        canvas.decide(np.array(decided, np.int64), np.ones(len(decided), np.int64))
        state.decided(np.array(decided, np.int64))
    return told


def span(low: int, high: int) -> list[int]:
    return list(range(low, high))


def test_contiguous_window():
    told = story(Window(5, 2, 4, form="contiguous"), canvas_ids([1, 1], 10, MASK), [[3], [2], [5], [4], [6]])
    assert told == [
        (True, span(0, 7), span(0, 7), [2, 3]),
        (False, span(2, 5), span(0, 7), [2, 4]),
        (False, span(2, 6), span(0, 7), [4, 5]),
        (False, span(2, 7), span(0, 7), [4, 6]),  # decided ones stay to the end of the phase
        (True, span(0, 11), span(0, 11), [6, 7]),
    ]


def test_contiguous_window_that_does_not_slide():
    told = story(
        Window(5, 2, 4, slide=False, form="contiguous"), canvas_ids([1, 1], 10, MASK), [[3], [2], [4]]
    )
    assert told == [
        (True, span(0, 7), span(0, 7), [2, 3]),
        (False, span(2, 4), span(0, 7), [2]),
        (True, span(0, 9), span(0, 9), [4, 5]),  # early: nothing was left
    ]


def test_contiguous_window_as_published():
    policy = Window(5, 2, 3, compat="reference", form="contiguous")
    told = story(policy, canvas_ids([1, 1], 10, MASK), [[2], [3], [], [4]])
    assert told == [
        (True, span(0, 6), span(0, 6), [2]),
        (False, span(2, 5), span(0, 6), [3, 4]),
        (False, span(2, 6), span(0, 6), [4, 5]),
        (True, span(0, 8), span(0, 8), [4]),
    ]


def test_scattered_window():
    ids = canvas_ids([1, 1], 10, MASK)
    told = story(Window(5, 2, 4, "scattered"), ids, [[5], [2], [4], [3], [6]])
    assert told == [
        (True, span(0, 7), span(0, 7), span(2, 7)),
        (False, [2, 3, 5], span(0, 7), [2, 3]),  # 5 was decided by the refresh
        (False, [2, 3, 4], span(0, 7), [3, 4]),
        (False, [2, 3, 4, 6], span(0, 7), [3, 6]),
        (True, span(0, 11), span(0, 11), span(6, 11)),
    ]


def test_scattered_window_with_full_refreshes():
    ids = canvas_ids([1, 1], 10, MASK)
    told = story(Window(4, 2, 3, "scattered", "full"), ids, [[9], [2], [3], [11]])
    assert told == [
        (True, span(0, 12), span(0, 12), span(2, 12)),
        (False, [2, 3, 9], [*span(0, 6), 9], [2, 3]),
        (False, [2, 3, 4], [*span(0, 6), 9], [3, 4]),
        (True, span(0, 12), span(0, 12), [4, 5, 6, 7, 8, 10, 11]),
    ]


def test_the_next_refresh_comes_early_where_a_window_runs_dry():
    ids = canvas_ids([], 12, MASK)
    refreshed = [
        step[0] for step in story(Window(4, 4, 99, form="contiguous"), ids, [[n] for n in range(12)])
    ]
    assert refreshed == [True, False, False, False] * 3
    refreshed = [
        step[0]
        for step in story(
            Window(4, 4, 99, form="contiguous"), ids, [[n, n + 1] for n in range(0, 12, 2)], wanted=2
        )
    ]
    assert refreshed == [True, False] * 3
    # The last mask: a refresh has no more of them than the step.
    refreshed = [
        step[0] for step in story(Window(4, 4, 99, form="contiguous"), ids[:3], [[0], [1], [2]], wanted=2)
    ]
    assert refreshed == [True, False, False]


def test_prefix_and_dual():
    ids, decisions = canvas_ids([1, 1], 6, MASK), [[3], [2], [4], [6]]
    assert story(Prefix(3), ids, [*decisions, [5]]) == [
        (True, span(0, 8), span(0, 8), [2, 3, 4]),
        (False, span(2, 8), span(0, 8), [2, 4]),
        (False, span(2, 8), span(0, 8), [4]),
        (True, span(0, 8), span(0, 8), [5, 6, 7]),
        (False, span(5, 8), span(0, 8), [5, 7]),
    ]
    assert story(Dual(3), ids, decisions)[:3] == [
        (True, span(0, 8), span(0, 8), [2, 3, 4]),
        (False, span(2, 5), span(0, 8), [2, 4]),
        (False, span(2, 5), span(0, 8), [4]),
    ]


def test_delayed():
    told = story(Delayed(3), canvas_ids([1, 1], 4, MASK), [[4], [2], [3], [5]])
    assert told == [
        (True, span(0, 6), span(0, 6), span(2, 6)),
        (False, span(2, 6), span(0, 6), [2, 3, 5]),
        (False, [2, 3, 5], span(0, 6), [3, 5]),
        (True, span(0, 6), span(0, 6), [5]),
    ]


def test_block_and_none():
    ids = canvas_ids([1], 4, MASK)
    assert story(Block(2), ids, [[2], [1], [3], [4]]) == [
        (True, span(0, 5), span(0, 5), candidates) for candidates in ([1, 2], [1], [3, 4], [4])
    ]
    assert story(NoCache(), ids, [[2], [1]]) == [
        (True, span(0, 5), span(0, 5), candidates) for candidates in ([1, 2, 3, 4], [1, 3, 4])
    ]


def test_blocks_are_counted_from_the_first_mask_and_hold_masks():
    ids = np.array([1, MASK, 1, MASK, 1, 1, 1, 1, 1, 1, MASK, MASK])
    state = Dual(3).begin(Canvas(ids, MASK))
    assert state.sections == [(1, 4), (10, 12)]
    assert [section_of(state.sections, p) for p in (1, 3, 10, 11)] == [(1, 4), (1, 4), (10, 12), (10, 12)]


def test_given_text_behind_the_window():
    """Unread until the window reaches it, or, with full refreshes, read throughout."""
    ids = np.array([1, MASK, MASK, MASK, 1, MASK, 1, 1])
    told = story(Window(2, 1, 3, form="contiguous"), ids, [[1], [2], [3], [5]])
    assert [step[2] for step in told] == [span(0, 3), span(0, 3), span(0, 8), span(0, 8)]
    told = story(Window(2, 1, 3, extent="full", form="contiguous"), ids, [[1], [2]])
    assert [step[2] for step in told] == [span(0, 8), [0, 1, 2, 4, 6, 7]]


def test_shift_adds_the_rows_before():
    plan = step_plan(np.array([4, 7]), 8, np.array([4, 7]), True)
    assert plan.compute.tolist() == [3, 4, 6, 7] and plan.deciding.tolist() == [3, 6]
    plan = refresh_plan(4, np.array([0, 1, 3]), True)
    assert plan.deciding.tolist() == [0, 0, 2]
    places, inverse = plan.scored()
    assert places.tolist() == [0, 2] and inverse.tolist() == [0, 0, 1]


def test_rows():
    plan = step_plan(np.array([1, 3]), 2, np.array([3]), False, np.array([3, 5]))
    rows = plan.rows(np.array([5, 6, 7, 8, 9, 4]), 10)
    assert rows.ids.tolist() == [6, 8] and rows.positions.tolist() == [1, 3]
    assert rows.slots.tolist() == [11, 13] and rows.prefix.tolist() == [[10, 2]] * 2
    assert rows.ancestors.tolist() == [[13, 15]] * 2
    plan = step_plan(np.array([1]), 2, np.array([1]), False)
    assert plan.rows(np.array([5, 6]), 0).ancestors.tolist() == [[-1]]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Window(4, 8), "a window of 4 tokens has no room for 8 active ones"),
        (lambda: Window(active=0), "at least 1 token is active, not 0"),
        (lambda: Window(refresh=0), "a refresh every 1 or more steps, not 0"),
        (lambda: Window(form="contigous"), "did you mean 'contiguous'"),
        (lambda: Window(extent="half"), "unknown extent"),
        (lambda: Window(compat="exact"), "unknown compat"),
        (lambda: Window(1, 1, form="contiguous", compat="reference"), "2 is the smallest"),
        (lambda: Prefix(0), "a block is 1 or more, not 0"),
        (lambda: Dual(0), "a block is 1 or more"),
        (lambda: Block(-1), "a block is 1 or more"),
        (lambda: Delayed(0), "steps between refreshes is 1 or more"),
        (lambda: policy_named("windw"), "unknown policy 'windw'; did you mean 'window'"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ElisionError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_names():
    assert list(POLICIES) == ["window", "prefix", "dual", "delayed", "block", "none"]
    assert policy_named("window", window=9, active=3) == Window(9, 3)
