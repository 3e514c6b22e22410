"""Canvases decoded by every policy and rule, against a plain full sampler where they must agree with it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from elision.passes.errors import ElisionError
from elision.runtime.canvas_plan import Canvas
from elision.runtime.canvas_policies import Block, Delayed, Dual, NoCache, Prefix, Window
from elision.runtime.canvas_result import ACTIVE, BUFFER, DECIDED, FAR, REFRESHED
from elision.runtime.canvas_rules import RULES, Draw, Rule
from elision.runtime.canvas_sampler import Sampler

from .canvas_models import EagerCanvas, make
from .canvas_runs import EOS, MASK, MODELS, POLICIES, V, decisions, full_sampler, prompt_and_masks, sampler

# ---- exactness -----------------------------------------------------------------------------------------
EXACT = {
    "contiguous": Window(99, 99, 1, form="contiguous"),
    "scattered": Window(99, 99, 1, "scattered"),
    "full": Window(99, 99, 1, "scattered", "full"),
    "none": NoCache(),
    "delayed": Delayed(1),
    "block": Block(99),
}


@pytest.mark.parametrize("policy", EXACT)
@pytest.mark.parametrize("by", RULES)
@pytest.mark.parametrize("kind", MODELS)
def test_all_in_the_window_is_the_full_sampler(kind, by, policy):
    for ids, steps in ((prompt_and_masks(), 16), (prompt_and_masks(11, [2]), 4)):
        one = sampler(kind, EXACT[policy], rule=Rule(by, threshold=0.3), steps=steps)
        assert decisions(one, ids) == full_sampler(kind, ids, steps, by)


@pytest.mark.parametrize("by", RULES)
@pytest.mark.parametrize("kind", MODELS)
def test_with_guidance_and_noise(kind, by):
    for guidance, noise in ((1.5, 0), (0, 0.7), (0.5, 1.1)):
        draw = Draw(noise, noise="gumbel")
        rule = Rule(by, threshold=0.3)
        one = sampler(kind, EXACT["contiguous"], rule=rule, steps=6, guidance=guidance, draw=draw, seed=2)
        if by == "margin" and noise:
            continue  # of the tokens without noise; the plain sampler here does not say
        assert decisions(one, prompt_and_masks()) == full_sampler(
            kind, prompt_and_masks(), 6, by, guidance, noise, seed=2
        )


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "policy",
    [
        Window(99, 99, 9, form="contiguous"),
        Window(99, 99, 9, "scattered"),
        Dual(99),
        Prefix(99),
    ],
)
def test_a_step_that_computes_all_masks_after_nothing_changed(kind, policy):
    """A cached step after a refresh gives the same logits, where only keys and values of decided text are kept."""
    model = EagerCanvas(MODELS[kind])
    ids = prompt_and_masks()
    places = np.arange(len(ids))
    refreshed = model.refresh(4, ids, places, True).logits
    assert refreshed is not None
    refreshed = refreshed.copy()
    state = policy.begin(Canvas(ids, MASK), kind == "dream")
    state.plan(1)
    plan = state.plan(1)
    assert not plan.refresh
    stepped = model.step(plan.rows(ids, 4), np.arange(len(plan.compute)), True)
    assert stepped.logits is not None
    np.testing.assert_allclose(stepped.logits, refreshed[plan.compute], atol=1e-10)
    np.testing.assert_allclose(
        refreshed, MODELS[kind](torch.from_numpy(ids)[None]).logits[0].numpy(), atol=1e-10
    )


# ---- what is never touched -----------------------------------------------------------------------------
class Poisoning:
    """A policy that does what another does, and destroys all a plan says is not read: the ids of masks outside it
    become a token whose embedding is NaN, and all cached keys and values of positions outside it NaN."""

    name = "window"
    POISON = 37

    def __init__(self, policy, model: EagerCanvas):
        self.policy, self.model = policy, model

    def begin(self, canvas, shift=False):
        self.canvas = canvas
        self.state = self.policy.begin(canvas, shift)
        self.sections, self.decided, self.cut = self.state.sections, self.state.decided, self.state.cut
        return self

    def plan(self, wanted):
        plan = self.state.plan(wanted)
        seen = np.zeros(len(self.canvas), bool)
        seen[: plan.run] = True
        seen[plan.extras] = True
        self.canvas.ids[self.canvas.masked] = np.where(seen, MASK, self.POISON)[self.canvas.masked]
        self.model.cache[:, :, :, : len(seen)][:, :, :, torch.from_numpy(~seen)] = torch.nan
        if not plan.refresh:
            assert (self.canvas.ids[plan.compute] != self.POISON).all()
        return plan


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("policy", ["contiguous", "fixed", "scattered", "full", "published", "dual"])
def test_the_far_field_is_poisoned(kind, policy):
    rule = Rule(eos="hold")
    expected = sampler(kind, POLICIES[policy], rule=rule).run([prompt_and_masks()])[0]
    poisoned = make(kind)
    # The poison is none of the tokens that are decided: those are given, and computed.
    poisoned.embed_tokens.weight[Poisoning.POISON] = torch.nan
    if Poisoning.POISON in expected.token_ids:
        pytest.skip("this model says the token")
    model = EagerCanvas(poisoned)
    one = Sampler(model, MASK, policy=Poisoning(POLICIES[policy], model), shift=kind == "dream", rule=rule)
    found = one.run([prompt_and_masks()])[0]
    assert found.token_ids == expected.token_ids and found.computed == expected.computed


@pytest.mark.parametrize("kind", MODELS)
def test_positions_behind_the_window_never_reach_the_model(kind):
    """Given ones neither: here they hold the poison. In the default form, at a cached step or at a refresh."""
    model = make(kind)
    model.embed_tokens.weight[37] = torch.nan
    ids = np.concatenate([prompt_and_masks(30), [37] * 5])
    eager = EagerCanvas(model)
    one = Sampler(eager, MASK, policy=Window(8, 3, 4, form="contiguous"), shift=kind == "dream")
    for event in itertools.islice(one.stream([ids]), 21):
        masks = np.flatnonzero(ids == MASK)
        _, positions, passed = eager.calls[-1]
        limit = masks[8] if event.refresh else limit  # noqa: F821
        assert positions.max() < limit and 37 not in passed
        ids[event.positions] = event.tokens
        assert np.isfinite(event.confidence).all()


# ---- the rest ------------------------------------------------------------------------------------------
def test_counts_by_hand():
    """W 8, A 3, R 4, one token a step: 4 refreshes of 13, 17, 21 and 21 positions."""
    one = sampler(rule=Rule("left"))
    result = one.run([prompt_and_masks(16)], trace=True)[0]
    assert (result.steps, result.refreshes, result.refreshed) == (16, 4, 13 + 17 + 21 + 21)
    # A phase decides its first mask at the refresh; then 4, 5 and 6 are computed, at the canvas' end fewer.
    assert result.stepped == 3 * (4 + 5 + 6) + (4 + 4 + 4) and result.full == 16 * 21
    assert result.computed == sum(len(positions) for _, positions, _ in one.model.calls)  # type: ignore[attr-defined]
    assert result.seconds >= result.refresh_seconds + result.step_seconds > 0
    assert result.finish == "masks" and len(result.new_tokens) == 16
    picture = result.trace.picture()
    assert picture[0].tolist() == [REFRESHED] * 5 + [DECIDED] + [REFRESHED] * 7 + [FAR] * 8
    assert picture[1].tolist() == [BUFFER] * 5 + [ACTIVE, DECIDED, ACTIVE, ACTIVE] + [BUFFER] * 4 + [FAR] * 8
    told = result.to_json()
    assert told["token_computations"] == result.computed and told["token_computations_full"] == 336
    assert set(told["seconds"]) == {"refresh", "step", "rest"}


def test_a_schedule_that_wastes_steps_counts_them():
    ids = prompt_and_masks(6)
    linear = sampler(rule=Rule(schedule="linear"), steps=20).run([ids])[0]
    assert linear.steps > 6 and linear.full == linear.steps * len(ids)
    assert sampler(rule=Rule(schedule="even"), steps=20).run([ids])[0].steps == 6


def test_more_steps_where_a_window_offers_too_few():
    result = sampler(steps=2).run([prompt_and_masks(16)])[0]
    assert result.steps == 6  # 3 of 16 at a time


def test_guidance_moves_tokens():
    ids = prompt_and_masks()
    plain, guided = (sampler(guidance=s, rule=Rule("left")).run([ids])[0] for s in (0.0, 3.0))
    assert plain.token_ids != guided.token_ids
    assert guided.full == 2 * plain.full and guided.computed == 2 * plain.computed


@pytest.mark.parametrize("policy", ["contiguous", "scattered", "full", "delayed", "dual"])
def test_shifted_rows_are_computed(policy):
    """Each decision is by the row before it, of this very step: the simulation below is told only what was passed."""
    one = sampler("dream", POLICIES[policy])
    calls = one.model.calls  # type: ignore[attr-defined]
    for event in one.stream([prompt_and_masks()]):
        _, positions, _ = calls[-1]
        assert {max(0, p - 1) for p in event.positions.tolist()} <= set(positions.tolist())


def test_infilling():
    ids = np.array([MASK, 4, MASK, MASK, 7, 7, 2, MASK, 1, MASK])
    for kind, policy in itertools.product(MODELS, POLICIES):
        result = sampler(kind, POLICIES[policy]).run([ids])[0]
        found = np.array(result.token_ids)
        assert (found[ids != MASK] == ids[ids != MASK]).all() and MASK not in found
        assert result.new_tokens == found[ids == MASK].tolist()


def test_a_decided_end_is_no_prompt():
    """An end in the given text stops nothing."""
    result = sampler(eos=[EOS], early_stop=True).run([prompt_and_masks(6, [EOS, 2])])[0]
    assert len(result.token_ids) >= 3 and result.token_ids[:2] == [EOS, 2]


def test_early_stop():
    ids = prompt_and_masks(16)
    whole = sampler(rule=Rule("left")).run([ids])[0]
    end = whole.new_tokens[6]
    place = whole.new_tokens.index(end)
    one = sampler(rule=Rule("left"), eos=[end], early_stop=True)
    result = one.run([ids])[0]
    assert result.new_tokens == whole.new_tokens[: place + 1] and result.finish == "eos"
    assert result.steps == place + 1 and result.full == result.steps * len(ids)
    # One with masks before it does not stop anything yet.
    free = sampler(rule=Rule("confidence"))
    order = [int(event.positions[0]) for event in free.stream([ids])]
    late = next(n for n, p in enumerate(order) if p > min(order[n + 1 :], default=99))
    end = free.run([ids])[0].token_ids[order[late]]
    stopped = sampler(rule=Rule("confidence"), eos=[end], early_stop=True)
    cut = next(event for event in stopped.stream([ids]) if event.length < len(ids) or event.result)
    assert cut.step > late + 1
    assert cut.result is not None and end == cut.result.token_ids[-1]


def test_no_end_before_masks():
    end = sampler(rule=Rule("confidence")).run([prompt_and_masks()])[0].new_tokens[-1]
    one = sampler(eos=[end], rule=Rule(eos="hold"))
    left = set(range(5, 21))
    for event in one.stream([prompt_and_masks()]):
        for position, token in zip(event.positions.tolist(), event.tokens.tolist()):
            assert token != end or position == min(left)
        left -= set(event.positions.tolist())


def test_an_end_may_stand_first():
    """Decided from the left, no mask stands before any: nothing is forbidden."""
    plain = sampler(rule=Rule("left")).run([prompt_and_masks()])[0]
    end = plain.new_tokens[4]
    held = sampler(rule=Rule("left", eos="hold"), eos=[end]).run([prompt_and_masks()])[0]
    assert held.token_ids == plain.token_ids


class Numb(EagerCanvas):
    """Weights that are damaged."""

    def refresh(self, start, ids, keep, whole=False):
        scored = super().refresh(start, ids, keep, whole)
        scored.log_sum[0] = np.nan
        return scored


@pytest.mark.parametrize(
    "options, ids, message",
    [
        ({"steps": 0}, None, "at least 1 denoising step is needed, not 0"),
        ({"guidance": -1.0}, None, "guidance is 0 or more"),
        ({"seed": -1}, None, "the seed is 0 or more"),
        ({"batch": 0}, None, "the batch 1 or more"),
        ({"early_stop": True}, None, "an early stop needs a token that ends a text"),
        ({"early_stop": "reference", "eos": [1]}, None, "the published early stop"),
        ({"eos": [MASK]}, None, "cannot both be the mask and end a text"),
        ({}, [1, 2, 3], "the canvas has no mask"),
        ({}, [], "a canvas is one row of token ids"),
        ({}, [1, V, MASK], "ids outside the model's 0 to 39"),
        ({"context": 20}, [1] * 10 + [MASK] * 11, "are 21 positions, and the model's context 20"),
        ({}, [1] * 90 + [MASK] * 11, "are 101 positions and the cache has 96 slots"),
        ({"guidance": 1.0}, [1] * 40 + [MASK] * 11, "are 51 positions, twice for guidance, and the cache"),
    ],
)
def test_errors(options, ids, message):
    with pytest.raises(ElisionError, match=message) as caught:
        sampler(**options).stream([[1, MASK], [1, MASK] if ids is None else ids])
    assert "\n" not in str(caught.value)


def test_more_errors():
    with pytest.raises(ElisionError, match="the mask token 40 is not among the 40 ids"):
        Sampler(EagerCanvas(MODELS["llada"]), 40)
    with pytest.raises(ElisionError, match="1 canvases need as many numbers"):
        sampler().stream([[1, MASK]], numbers=[1, 2])
    with pytest.raises(ElisionError, match="the model's scores are not finite"):
        Sampler(Numb(MODELS["llada"]), MASK).run([[1, MASK]])


def test_a_stream_can_be_left():
    one = sampler()
    next(one.stream([prompt_and_masks()]))
    assert one.run([prompt_and_masks()])[0].token_ids == sampler().run([prompt_and_masks()])[0].token_ids


@pytest.mark.parametrize("kind, tied", [("llada", False), ("llada", True), ("dream", False), ("dream", True)])
def test_models_can_be_exported(kind, tied):
    model = make(kind, dtype=torch.float32, tie_word_embeddings=tied)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids).logits

    length = torch.export.Dim("length", min=2, max=128)
    program = torch.export.export(
        Logits(), (torch.arange(6)[None],), dynamic_shapes={"input_ids": {1: length}}
    )
    ids = torch.arange(11)[None]
    torch.testing.assert_close(program.module()(ids), model(ids).logits)
    assert model.config.to_dict()["mask_token_id"] == MASK
