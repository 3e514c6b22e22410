"""Canvases of a batch: none knows of another."""

from __future__ import annotations

import numpy as np
from elision.runtime.canvas_result import ACTIVE, BUFFER, DECIDED, REFRESHED
from elision.runtime.canvas_rules import RULES, Draw, Rule
from hypothesis import given, settings
from hypothesis import strategies as st

from .canvas_runs import EOS, MASK, MODELS, POLICIES, prompt_and_masks, sampler


@st.composite
def canvases(draw):
    """Prompts and masks, or masks anywhere; of different lengths."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        ids = np.array(draw(st.lists(st.integers(0, 37), min_size=1, max_size=14)))
        masked = np.array(draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
        masked[draw(st.integers(0, len(ids) - 1))] = True
        found.append(np.where(masked, MASK, ids))
    return found


RUNS = st.fixed_dictionaries(
    {
        "rule": st.builds(
            Rule,
            st.sampled_from(RULES),
            st.sampled_from(["even", "equal", "linear"]),
            threshold=st.just(0.3),
            position_temperature=st.sampled_from([0.0, 0.0, 0.5]),
            eos=st.sampled_from(["free", "hold", "last"]),
        ),
        "draw": st.sampled_from([Draw(), Draw(), Draw(0.8), Draw(1.0, 5, 0.8), Draw(0.6, noise="gumbel")]),
        "steps": st.sampled_from([None, 1, 3, 9]),
        "guidance": st.sampled_from([0.0, 0.0, 1.0]),
        "early_stop": st.booleans(),
        "batch": st.integers(1, 4),
        "seed": st.integers(0, 3),
    }
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(MODELS)), st.sampled_from(list(POLICIES)), canvases(), RUNS, st.randoms())
def test_any_batch(kind, policy, batch, options, shuffle):
    """Each mask is decided once and nothing else is; a canvas alone, or in another order, gives the same."""
    make_one = lambda: sampler(kind, POLICIES[policy], capacity=60, eos=[7, EOS], **options)  # noqa: E731
    one = make_one()
    results = {}
    now = [np.array(ids) for ids in batch]
    steps = [0] * len(batch)
    for event in one.stream(batch, trace=True):
        ids = now[event.canvas]
        steps[event.canvas] += 1
        assert event.step == steps[event.canvas]
        assert (ids[event.positions] == MASK).all() and len(set(event.positions.tolist())) == len(
            event.positions
        )
        assert MASK not in event.tokens
        ids[event.positions] = event.tokens
        now[event.canvas] = ids[: event.length]
        if event.result is not None:
            results[event.canvas] = event.result
    for number, ids in enumerate(batch):
        result = results[number]
        assert result.token_ids == now[number].tolist() and MASK not in result.token_ids
        kept = ids[: len(result.token_ids)]
        assert (np.array(result.token_ids)[kept != MASK] == kept[kept != MASK]).all()
        assert result.new_tokens == np.array(result.token_ids)[kept == MASK].tolist()
        adds_up(result, steps[number], len(ids), 1 + bool(options["guidance"]))
    order = list(range(len(batch)))
    shuffle.shuffle(order)
    mixed = list(make_one().stream([batch[n] for n in order], numbers=order))
    for event in mixed:
        if event.result is not None:
            assert event.result.token_ids == results[order[event.canvas]].token_ids
    alone = [event.result for event in make_one().stream([batch[0]], numbers=[0])][-1]
    assert alone is not None and alone.token_ids == results[0].token_ids
    assert (alone.computed, alone.steps) == (results[0].computed, results[0].steps)


def adds_up(result, steps, length, twins):
    picture, trace = result.trace.picture(), result.trace
    assert result.steps == steps == len(picture) and picture.shape[1] == length
    assert result.full == steps * length * twins
    refreshes = [REFRESHED in row or (ACTIVE not in row and BUFFER not in row) for row in picture]
    computed = twins * int((picture >= ACTIVE).sum())
    assert result.computed == computed and result.refreshes <= sum(refreshes)
    assert result.computed <= result.full
    order = trace.order(length)
    assert (picture == DECIDED).sum() == len(trace.positions) == (order >= 0).sum()
    for position, when in zip(trace.positions, trace.when):
        assert picture[when, position] == DECIDED and order[position] == when
    assert len(trace.confidence) == len(trace.tokens) == len(trace.positions)
    assert all(0 <= confidence <= 1 for confidence in trace.confidence)


def test_steps_of_several_canvases_are_one_call():
    one = sampler(batch=3)
    one.run([prompt_and_masks(9), prompt_and_masks(9, [1]), prompt_and_masks(9, [2, 2])])
    calls = [kind for kind, _, _ in one.model.calls]  # type: ignore[attr-defined]
    assert calls.count("step") == 9 - 3 and calls.count("refresh") == 3 * 3


def test_canvases_wait_for_slots():
    batch = [prompt_and_masks(12, [n]) for n in range(5)]
    wide = sampler().run(batch)
    narrow = sampler(capacity=30)
    assert [one.token_ids for one in narrow.run(batch)] == [one.token_ids for one in wide]
    guided = sampler(capacity=30, guidance=0.5).run(batch)
    assert [one.token_ids for one in guided] == [one.token_ids for one in sampler(guidance=0.5).run(batch)]


def test_seeds():
    def said(seed, numbers=None):
        one = sampler(draw=Draw(1.5), seed=seed)
        events = one.stream([prompt_and_masks()], numbers=numbers)
        return [event.result for event in events][-1].token_ids

    assert said(1) == said(1) == said(1, [0])
    assert said(1) != said(2) and said(1) != said(1, [1])
