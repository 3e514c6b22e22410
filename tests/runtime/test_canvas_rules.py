"""How many masks are decided, which, and on what."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from elision.passes.errors import ElisionError
from elision.runtime.canvas_plan import Canvas, canvas_ids
from elision.runtime.canvas_rules import EOS_RULES, RULES, Chooser, Draw, Pace, Rule, scored_of
from elision.runtime.canvas_step import Scored
from hypothesis import given, settings
from hypothesis import strategies as st

MASK, EOS, V = 9, 8, 10


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def logits_of(seed: int, rows: int = 6, vocabulary: int = V) -> np.ndarray:
    return generator(seed).normal(0, 2, (rows, vocabulary)).astype(np.float32)


def chosen(logits, rule=None, draw=None, held=None, k=V, whole=True, random=None, ends=(EOS,)):
    scored = scored_of(logits, k)
    if not whole:
        scored = Scored(scored.ids, scored.values, scored.log_sum, scored.entropy)
    held = np.zeros(len(logits), bool) if held is None else np.asarray(held)
    chooser = Chooser(rule or Rule(), draw or Draw(), MASK, ends)
    return chooser.choose(scored, held, random or generator())


def picked(logits, count, rule=None, **options):
    rule = rule or Rule()
    choices = chosen(logits, rule, **options)
    return Chooser(rule, Draw(), MASK, (EOS,)).pick(choices, count, generator(1)).tolist()


def softmax(logits):
    return torch.from_numpy(logits.astype(np.float64)).softmax(-1).numpy()


# ---- how many ------------------------------------------------------------------------------------------
def counts(rule, masks, steps, sections=None, most=99):
    canvas = Canvas(canvas_ids([1, 1], masks, MASK), MASK)
    pace = Pace(canvas, sections or [(0, len(canvas))], rule, steps)
    found = []
    while len(canvas.masks):
        wanted = pace.wanted()
        found.append(wanted)
        positions = canvas.masks[: min(wanted, most)]
        canvas.decide(positions, np.ones(len(positions), np.int64))
    return found


def test_equal_division():
    assert counts(Rule(schedule="equal"), 10, 4) == [3, 3, 2, 2]
    assert counts(Rule(schedule="equal"), 3, 5) == [1, 1, 1]


def test_even_division_makes_up_for_what_was_held_back():
    assert counts(Rule(schedule="even"), 10, 4) == [3, 3, 2, 2]
    assert counts(Rule(schedule="even"), 10, 4, most=2) == [3, 3, 3, 4, 2]
    assert counts(Rule(schedule="even"), 3, 5) == [1, 1, 1]


@pytest.mark.parametrize("masks, steps", [(10, 4), (16, 16), (5, 20), (40, 7)])
def test_linear_times(masks, steps):
    expected, left, times = [], masks, torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64).tolist()
    for i in range(steps):
        if not left:
            break
        count = int(left * (1 - times[i + 1] / times[i])) if i < steps - 1 else left
        expected.append(count)
        left -= count
    assert counts(Rule(schedule="linear"), masks, steps) == expected
    if steps > masks:
        assert 0 in expected


def test_steps_are_divided_among_sections():
    sections = [(2, 6), (6, 12)]
    assert counts(Rule(schedule="equal"), 10, 5, sections) == [2, 1, 1, 3, 3]
    assert counts(Rule(schedule="equal"), 10, 1, sections) == [4, 6]


def test_threshold_needs_no_schedule():
    assert counts(Rule("threshold"), 3, 1) == [1, 1, 1]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["even", "equal", "linear"]), st.integers(1, 30), st.integers(1, 40), st.integers(1, 9)
)
def test_every_schedule_ends(schedule, masks, steps, most):
    found = counts(Rule(schedule=schedule), masks, steps, most=most)
    assert min(found) >= (schedule != "linear" and len(found) <= steps and most > masks)
    if most >= masks:
        assert len(found) <= steps and sum(found) == masks


# ---- which ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(5))
def test_ranks(seed):
    logits = logits_of(seed)
    logits[:, MASK] = -4
    p = softmax(logits)
    best = p.max(1)
    second = np.sort(p, 1)[:, -2]
    for by, rank in {
        "confidence": best,
        "margin": best - second,
        "entropy": (p * np.log(p)).sum(1),
        "left": -np.arange(6.0),
        "threshold": best,
    }.items():
        choices = chosen(logits, Rule(by))
        assert choices.tokens.tolist() == p.argmax(1).tolist()
        np.testing.assert_allclose(choices.rank, rank, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(choices.probability, best, rtol=1e-5)
        if by != "threshold":
            assert picked(logits, 3, Rule(by)) == np.argsort(-rank, kind="stable")[:3].tolist()


def test_threshold_takes_all_above_it_and_one_at_least():
    logits = np.full((4, V), -3, np.float32)
    logits[[0, 1, 2, 3], [0, 1, 2, 3]] = [6, 0, 9, -2]
    assert picked(logits, 1, Rule("threshold", threshold=0.9)) == [2, 0]
    assert picked(logits, 1, Rule("threshold", threshold=1.0)) == [2]
    assert sorted(picked(logits, 1, Rule("threshold", threshold=0.0))) == [0, 1, 2, 3]


def test_equals_are_decided_from_the_left():
    assert picked(np.zeros((5, V), np.float32), 3) == [0, 1, 2]
    assert chosen(np.zeros((5, V), np.float32)).tokens.tolist() == [0] * 5


def test_random_order_comes_from_the_generator():
    logits = logits_of(0)
    expected = np.argsort(-generator(7).random(6))[:3].tolist()
    assert picked(logits, 3, Rule("random"), random=generator(7)) == expected


def test_positions_drawn_by_temperature():
    """As often as softmax(rank / T) says; without replacement."""
    rule = Rule(position_temperature=0.2)
    chooser, choices = Chooser(rule, Draw(), MASK), chosen(logits_of(3), rule)
    random, first = generator(5), np.zeros(6)
    for _ in range(4000):
        order = chooser.pick(choices, 6, random)
        assert sorted(order.tolist()) == list(range(6))
        first[order[0]] += 1
    expected = np.exp(choices.rank / 0.2)
    np.testing.assert_allclose(first / 4000, expected / expected.sum(), atol=0.03)


# ---- on what -------------------------------------------------------------------------------------------
@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(RULES),
    st.sampled_from(EOS_RULES),
    st.sampled_from([Draw(), Draw(0.7), Draw(1.3, noise="gumbel"), Draw(0.9, top_k=3), Draw(0.9, top_p=0.4)]),
)
def test_the_mask_is_never_chosen_nor_an_end_before_masks(seed, by, eos, draw):
    logits = logits_of(seed)
    logits[::2, MASK] += 8
    logits[1::2, EOS] += 8
    held = generator(seed).random(6) < 0.5
    choices = chosen(logits, Rule(by, eos=eos), draw, held, random=generator(seed))
    assert MASK not in choices.tokens
    assert np.isfinite(choices.probability).all() and not np.isnan(choices.rank).any()
    if eos == "hold":
        assert EOS not in choices.tokens[held]
    if eos == "last" and by != "threshold":
        order = choices.tokens[picked(logits, 6, Rule(by, eos=eos), draw=draw, random=generator(seed))] == EOS
        assert order.tolist() == sorted(order.tolist())


@pytest.mark.parametrize("by", RULES)
@pytest.mark.parametrize("eos", EOS_RULES)
def test_the_few_largest_are_enough(by, eos):
    rule, logits = Rule(by, eos=eos), logits_of(2, 20)
    logits[::3, MASK] += 9
    logits[::4, EOS] += 9
    held = generator(0).random(20) < 0.5
    needed = Chooser(rule, Draw(), MASK, (EOS,)).needed
    assert needed == 1 + (eos == "hold") + (2 if by == "margin" else 1)
    few = chosen(logits, rule, held=held, k=needed, whole=False)
    all_of_them = chosen(logits, rule, held=held, k=V)
    short = chosen(logits, rule, held=held, k=1)  # a model that gives fewer is asked for all
    for other in (few, short):
        assert other.tokens.tolist() == all_of_them.tokens.tolist()
        np.testing.assert_allclose(other.rank, all_of_them.rank)


def test_the_next_largest_stands_in_for_the_mask():
    logits = np.array([[0, 1, 2, 3, 0, 0, 0, 0, 5, 7]], np.float32)
    p = softmax(logits)[0]
    choices = chosen(logits, Rule("margin"))
    assert choices.tokens.tolist() == [EOS]
    np.testing.assert_allclose(choices.probability, p[EOS], rtol=1e-5)
    np.testing.assert_allclose(choices.rank, p[EOS] - p[3], rtol=1e-5)
    choices = chosen(logits, Rule("margin", eos="hold"), held=[True])
    assert choices.tokens.tolist() == [3]
    np.testing.assert_allclose(choices.rank, p[3] - p[2], rtol=1e-5)


def test_ends_last():
    logits = np.full((3, V), -3, np.float32)
    logits[[0, 1, 2], [EOS, 1, EOS]] = [9, 1, 8]
    assert picked(logits, 3) == [0, 2, 1]
    assert picked(logits, 3, Rule(eos="last")) == [1, 0, 2]
    assert picked(logits, 1, Rule("threshold", eos="last")) == [1]


def test_gumbel_noise():
    """exp(logits) / (-log u)^T, its largest; confidence without noise."""
    logits = logits_of(4)
    u = generator(11).random((6, V))
    noisy = np.exp(logits.astype(np.float64)) / (-np.log(u)) ** 0.8
    noisy[:, MASK] = -np.inf
    choices = chosen(logits, draw=Draw(0.8, noise="gumbel"), random=generator(11))
    assert choices.tokens.tolist() == noisy.argmax(1).tolist()
    np.testing.assert_allclose(choices.rank, softmax(logits)[np.arange(6), choices.tokens], rtol=1e-5)


def frequencies(draw, count=6000):
    logits = np.tile(np.array([3, 2.5, 2, 1, 0, -1, 1, 2.2, 0.3, 6], np.float32), (count, 1))
    choices = chosen(logits, draw=draw)
    return np.bincount(choices.tokens, minlength=V) / count, choices, logits[0].astype(np.float64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_tokens(temperature):
    found, choices, row = frequencies(Draw(temperature))
    row[MASK] = -np.inf
    p = softmax(row[None] / temperature)[0]
    np.testing.assert_allclose(found, p, atol=0.03)
    np.testing.assert_allclose(choices.probability, p[choices.tokens])
    found, _, _ = frequencies(Draw(1.0, noise="gumbel"))
    np.testing.assert_allclose(found, softmax(row[None])[0], atol=0.03)


def test_top_k_and_top_p():
    found, choices, row = frequencies(Draw(1.0, top_k=3))
    assert np.flatnonzero(found).tolist() == [0, 1, 7]
    p = softmax(row[None, [0, 1, 7]])[0]
    np.testing.assert_allclose(choices.probability[choices.tokens == 0], p[0])
    row[MASK] = -np.inf
    order = np.argsort(-row)
    shares = np.cumsum(softmax(row[None])[0][order])
    kept = order[: int((shares < 0.6).sum()) + 1]
    found, _, _ = frequencies(Draw(1.0, top_p=0.6))
    assert np.flatnonzero(found).tolist() == sorted(kept.tolist())
    found, _, _ = frequencies(Draw(1.0, top_p=1e-9))
    assert np.flatnonzero(found).tolist() == [0]


def test_large_draws_are_made_in_parts(monkeypatch):
    logits = logits_of(1, 30)
    for draw in (Draw(1.0), Draw(1.0, noise="gumbel")):
        whole = chosen(logits, Rule("margin"), draw, random=generator(3))
        monkeypatch.setattr("elision.runtime.canvas_rules.ROUND", V * 7)
        parts = chosen(logits, Rule("margin"), draw, random=generator(3))
        monkeypatch.undo()
        assert whole.tokens.tolist() == parts.tokens.tolist()
        np.testing.assert_allclose(whole.rank, parts.rank)


def test_no_candidates():
    nothing = np.zeros((0, V), np.float32)
    for draw in (Draw(), Draw(1.0), Draw(1.0, noise="gumbel")):
        for by in RULES:
            choices = chosen(nothing, Rule(by), draw)
            assert not len(choices.tokens)
            assert not len(Chooser(Rule(by), draw, MASK).pick(choices, 3, generator()))


def test_scored_of():
    logits = logits_of(6, 5, 50)
    logits[0, 3] = -np.inf
    scored = scored_of(logits, 4)
    values, ids = torch.from_numpy(logits).topk(4)
    assert scored.ids.tolist() == ids.tolist()
    np.testing.assert_array_equal(scored.values, values.numpy())
    exact = torch.from_numpy(logits.astype(np.float64))
    np.testing.assert_allclose(scored.log_sum, exact.logsumexp(1), rtol=1e-6)
    entropy = torch.distributions.Categorical(logits=exact).probs
    np.testing.assert_allclose(scored.entropy, torch.special.entr(entropy).sum(1), rtol=1e-5)
    assert scored.log_sum.dtype == scored.entropy.dtype == scored.values.dtype == np.float32


def test_broken_scores_are_named():
    logits = logits_of(0)
    logits[2, 2] = np.nan
    with pytest.raises(ElisionError, match="the model's scores are not finite"):
        chosen(logits)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Rule("confidense"), "unknown rule 'confidense'; did you mean 'confidence'"),
        (lambda: Rule(schedule="odd"), "unknown schedule 'odd'"),
        (lambda: Rule(eos="first"), "unknown rule for the end of text"),
        (lambda: Rule(threshold=1.5), "a threshold is between 0 and 1, not 1.5"),
        (lambda: Rule(position_temperature=-1), "a temperature of positions is 0 or more"),
        (lambda: Rule(epsilon=0), "epsilon lies between 0 and 1"),
        (lambda: Draw(-1), "temperature is 0 or more, not -1"),
        (lambda: Draw(float("nan")), "temperature is 0 or more"),
        (lambda: Draw(top_p=0), "top-p above 0"),
        (lambda: Draw(top_k=-1), "top-k is 0 or more"),
        (lambda: Draw(noise="pink"), "unknown noise 'pink'"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ElisionError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
