"""Canvases decoded by compiled models, in both runtimes: the tokens of a plain full sampler where all is in the window,
and of the model's own layers over old keys and values where it is not."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from elision.kernels import cpu
from elision.passes.errors import ElisionError
from elision.runtime import canvas_open
from elision.runtime.canvas_open import Opened, open_canvas
from elision.runtime.canvas_plan import Canvas, Plan, canvas_ids
from elision.runtime.canvas_policies import Block, Delayed, Dual, NoCache, Prefix, Window
from elision.runtime.canvas_rules import RULES, Draw, Rule
from elision.runtime.canvas_sampler import Sampler
from hypothesis import given, settings
from hypothesis import strategies as st

from .canvas_models import EagerCanvas, make

MASK, EOS, POISON, V = 39, 38, 37, 40
CONTEXT = 64
RUNTIMES = ("torch", "onnxruntime")
NAMES = ("llada", "dream", "bert")
PAIRS = [(name, runtime) for name in NAMES for runtime in RUNTIMES]

EXACT = {
    "contiguous": Window(99, 99, 1),
    "scattered": Window(99, 99, 1, "scattered"),
    "full": Window(99, 99, 1, "scattered", "full"),
    "none": NoCache(),
}
POLICIES = {
    "contiguous": Window(8, 3, 4),
    "fixed": Window(8, 3, 4, slide=False),
    "scattered": Window(8, 3, 4, "scattered"),
    "full": Window(8, 3, 4, "scattered", "full"),
    "contiguous, full": Window(8, 3, 4, extent="full"),
    "published": Window(8, 3, 4, compat="reference"),
    "scattered, published": Window(8, 3, 4, "scattered", "full", compat="reference"),
    "prefix": Prefix(6),
    "dual": Dual(6),
    "delayed": Delayed(4),
    "block": Block(6),
    "none": NoCache(),
}


@functools.cache
def model_of(name: str) -> Any:
    """The token POISON is NaN where it is read, and never the best guess."""
    if name != "bert":
        model: Any = make(name, dtype=torch.float32)
        model.lm_head.weight[POISON] = 0
        model.embed_tokens.weight[POISON] = torch.nan
        return model
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = hf.BertConfig(
            vocab_size=V,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
        )
        model = hf.BertForMaskedLM(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    head.weight.normal_(0, 0.4, generator=torch.Generator().manual_seed(1))
    head.weight[POISON] = 0
    table.weight[POISON] = torch.nan
    return model


@functools.cache
def opened(name: str, runtime: str) -> Opened:
    mask = MASK if name == "bert" else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas_open, "compare", lambda model, facts: 0.0)  # it would find the poison
        return open_canvas(model_of(name), runtime=runtime, context=CONTEXT, mask=mask, threads=1)


def sampler(name: str, runtime: str, policy: Any, model: Any = None, **options: Any) -> Sampler:
    one = opened(name, runtime)
    facts = one.facts
    return Sampler(
        one.model if model is None else model,
        facts.mask,
        eos=facts.ends or (EOS,),
        policy=policy,
        shift=facts.shift,
        context=facts.positions,
        **options,
    )


def decisions(one: Sampler, ids: np.ndarray, **options: Any) -> list[dict[int, int]]:
    """Position and token of what each step decides."""
    return [
        dict(zip(event.positions.tolist(), event.tokens.tolist())) for event in one.stream([ids], **options)
    ]


PROMPT = canvas_ids([3, 1, 4, 1, 5], 16, MASK)
INFILL = np.array([MASK, 7, MASK, MASK, 9, 2, MASK, 6, MASK, MASK, MASK, 11, MASK])


# ---- the full sampler ----------------------------------------------------------------------------------
def logits_of(name: str, x: np.ndarray) -> np.ndarray:
    """[N, V], of the logits that decide each position."""
    logits = model_of(name)(torch.from_numpy(x)[None]).logits[0].double().numpy()
    return np.concatenate([logits[:1], logits[:-1]]) if name == "dream" else logits


@functools.cache
def full_sampler(
    name: str, canvas: tuple[int, ...], steps: int, by: str, guidance: float = 0.0, noise: float = 0.0
) -> list[dict[int, int]]:
    """All positions at every step, and nothing clever. noise: a temperature, of Gumbel noise."""
    x = np.array(canvas)
    given = x != MASK
    random = np.random.Generator(np.random.PCG64([0, 0]))
    history: list[dict[int, int]] = []
    while len(masks := np.flatnonzero(x == MASK)):
        logits = logits_of(name, x)
        if guidance:
            without = logits_of(name, np.where(given, MASK, x))
            logits = without + (guidance + 1) * (logits - without)
        p = torch.from_numpy(logits[masks]).softmax(-1).numpy()
        allowed = p.copy()
        allowed[:, MASK] = 0
        tokens = allowed.argmax(1)
        if noise:
            tokens = (allowed / (-np.log(random.random(p.shape))) ** noise).argmax(1)
        best = np.sort(allowed, 1)
        confidence = p[np.arange(len(masks)), tokens]
        rank = {
            "confidence": lambda: confidence,  # noqa: B023
            "threshold": lambda: confidence,  # noqa: B023
            "entropy": lambda: (p * np.log(p)).sum(1),  # noqa: B023
            "margin": lambda: best[:, -1] - best[:, -2],  # noqa: B023
            "left": lambda: -masks,
            "random": lambda: random.random(len(masks)),
        }[by]()
        left = steps - len(history)
        count = len(masks) if left < 1 else -(-len(masks) // left)
        if by == "threshold":
            count = max(1, int((confidence > 0.3).sum()))
        chosen = np.argsort(-rank, kind="stable")[:count]
        x[masks[chosen]] = tokens[chosen]
        history.append(dict(zip(masks[chosen].tolist(), tokens[chosen].tolist())))
    assert POISON not in x
    return history


@pytest.mark.parametrize("by", RULES)
@pytest.mark.parametrize(("name", "runtime"), PAIRS)
def test_all_in_the_window_is_the_full_sampler(name, runtime, by):
    for ids, steps in ((PROMPT, 16), (PROMPT, 5), (INFILL, 8)):
        expected = full_sampler(name, tuple(ids.tolist()), steps, by)
        for policy in EXACT.values():
            one = sampler(name, runtime, policy, rule=Rule(by, threshold=0.3), steps=steps)
            assert decisions(one, ids) == expected


@pytest.mark.parametrize("by", ["confidence", "entropy", "random"])
@pytest.mark.parametrize(("name", "runtime"), PAIRS)
def test_with_guidance_and_noise(name, runtime, by):
    """Where all logits are needed."""
    for guidance, noise in ((1.5, 0.0), (0.0, 0.7), (0.5, 1.1)):
        expected = full_sampler(name, tuple(PROMPT.tolist()), 6, by, guidance, noise)
        draw = Draw(noise, noise="gumbel")
        one = sampler(
            name, runtime, EXACT["contiguous"], rule=Rule(by), steps=6, guidance=guidance, draw=draw
        )
        assert decisions(one, PROMPT) == expected


# ---- windows -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "runtime"), [pair for pair in PAIRS if pair[0] != "bert"])
def test_the_tokens_of_the_models_own_layers(name, runtime, policy):
    """Over keys and values that are as old as the policy lets them be, step by step."""
    for ids, options in (
        (PROMPT, {}),
        (PROMPT, {"rule": Rule("entropy"), "steps": 7}),
        (PROMPT, {"rule": Rule("threshold", threshold=0.3)}),
        (INFILL, {"rule": Rule("margin", eos="hold"), "steps": 5}),
        (PROMPT, {"guidance": 1.0, "steps": 9}),
        (INFILL, {"draw": Draw(0.7, 6, 0.9), "rule": Rule("random"), "seed": 3}),
    ):
        double = EagerCanvas(in_double(name), CONTEXT)
        expected = decisions(sampler(name, runtime, POLICIES[policy], double, **options), ids)
        assert decisions(sampler(name, runtime, POLICIES[policy], **options), ids) == expected


@functools.cache
def in_double(name: str) -> Any:
    """The same weights."""
    double = make(name)
    double.load_state_dict(model_of(name).state_dict())
    return double


@pytest.mark.parametrize("policy", POLICIES)
def test_both_runtimes_say_the_same(policy):
    """Of the model whose layers are others': BERT."""
    for ids, options in (
        (PROMPT, {}),
        (PROMPT, {"rule": Rule("entropy"), "steps": 7}),
        (INFILL, {"steps": 4}),
    ):
        one, other = (
            decisions(sampler("bert", runtime, POLICIES[policy], **options), ids) for runtime in RUNTIMES
        )
        assert one == other


@pytest.mark.parametrize(("name", "runtime"), PAIRS)
def test_a_small_window_computes_less_and_still_decides_all(name, runtime):
    result = sampler(name, runtime, Window(8, 3, 4)).run([PROMPT])[0]
    assert result.steps == 16 and result.refreshes == 4
    assert result.computed < result.full == 16 * len(PROMPT)
    assert MASK not in result.token_ids and result.token_ids[:5] == PROMPT[:5].tolist()


# ---- batches -------------------------------------------------------------------------------------------
BATCH = [
    PROMPT,
    INFILL,
    canvas_ids([2], 7, MASK),
    canvas_ids([8, 8, 1], 11, MASK),
    np.array([MASK]),
]
exactly = pytest.mark.skipif(
    not cpu.available(), reason="without the C++ kernels sums depend on who else is in a call"
)


@exactly
@pytest.mark.parametrize("policy", ["contiguous", "scattered", "prefix", "dual", "delayed", "none"])
@pytest.mark.parametrize(("name", "runtime"), PAIRS)
def test_a_canvas_of_a_batch_has_the_tokens_it_has_alone(name, runtime, policy):
    for options in ({}, {"rule": Rule("entropy"), "steps": 4}, {"draw": Draw(1.2, 8), "seed": 1}):
        one = sampler(name, runtime, POLICIES[policy], batch=4, **options)
        alone = [last(one.stream([ids], numbers=[number])).token_ids for number, ids in enumerate(BATCH)]
        assert [result.token_ids for result in one.run(BATCH)] == alone
        order = [3, 0, 4, 2, 1]
        mixed: dict[int, Any] = {}
        for event in one.stream([BATCH[number] for number in order], numbers=order):
            if event.result is not None:
                mixed[order[event.canvas]] = event.result.token_ids
        assert [mixed[number] for number in range(len(BATCH))] == alone


def last(events: Any) -> Any:
    return [event.result for event in events][-1]


@exactly
@pytest.mark.parametrize(("name", "runtime"), PAIRS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_law_any_batch(name, runtime, data):
    batch = []
    for _ in range(data.draw(st.integers(1, 4))):
        ids = np.array(data.draw(st.lists(st.integers(0, 36), min_size=1, max_size=14)))
        masked = np.array(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
        masked[data.draw(st.integers(0, len(ids) - 1))] = True
        batch.append(np.where(masked, MASK, ids))
    policy = POLICIES[data.draw(st.sampled_from(list(POLICIES)))]
    options: dict[str, Any] = {
        "rule": Rule(data.draw(st.sampled_from(RULES)), threshold=0.3),
        "steps": data.draw(st.sampled_from([None, 1, 3])),
        "guidance": data.draw(st.sampled_from([0.0, 0.0, 1.0])),
        "early_stop": data.draw(st.booleans()),
        "batch": data.draw(st.integers(1, 4)),
    }
    one = sampler(name, runtime, policy, **options)
    results = one.run(batch)
    for number, ids in enumerate(batch):
        alone = last(one.stream([ids], numbers=[number]))
        assert (alone.token_ids, alone.computed) == (results[number].token_ids, results[number].computed)


# ---- what is never touched -----------------------------------------------------------------------------
class Poisoning:
    """A policy that does what another does, and destroys all that its plans do not see: masks outside become the token
    POISON, and what the caches hold outside becomes NaN. Of one canvas, from slot 0 on."""

    name = "window"

    def __init__(self, policy: Any, model: Any) -> None:
        self.policy, self.caches = policy, model._steps.caches.values()

    def begin(self, canvas: Canvas, shift: bool = False) -> Poisoning:
        self.canvas = canvas
        self.state = self.policy.begin(canvas, shift)
        self.sections, self.decided, self.cut = self.state.sections, self.state.decided, self.state.cut
        return self

    def plan(self, wanted: int) -> Plan:
        plan = self.state.plan(wanted)
        unseen = np.ones(CONTEXT, bool)
        unseen[: plan.run] = False
        unseen[plan.extras] = False
        far = unseen[: len(self.canvas)]
        masked = self.canvas.masked
        self.canvas.ids[masked] = np.where(far, POISON, MASK)[masked]
        for cache in self.caches:
            cache[:, unseen] = np.nan
        return plan


@pytest.mark.skipif(not cpu.available(), reason="the operators of the hosts read what they then hide")
@pytest.mark.parametrize("policy", ["contiguous", "fixed", "scattered", "full", "published", "dual"])
@pytest.mark.parametrize(("name", "runtime"), PAIRS)
def test_the_far_field_is_poisoned(name, runtime, policy):
    for options in ({}, {"rule": Rule("entropy"), "steps": 7}):
        expected = sampler(name, runtime, POLICIES[policy], **options).run([PROMPT])[0]
        assert POISON not in expected.token_ids
        model: Any = opened(name, runtime).model
        one = sampler(name, runtime, Poisoning(POLICIES[policy], model), **options)
        try:
            found = one.run([PROMPT])[0]
        finally:
            for cache in model._steps.caches.values():
                cache[:] = 0
        assert found.token_ids == expected.token_ids and found.computed == expected.computed


@pytest.mark.parametrize(("name", "runtime"), PAIRS)
def test_given_text_behind_the_window_is_not_read(name, runtime):
    """Until the window has come that far, whatever stands there."""
    tokens: Sequence[int]
    found = []
    for tokens in ([POISON] * 5, [4, 5, 6, 7, 8]):
        ids = np.concatenate([canvas_ids([3, 1, 4, 1, 5], 30, MASK), tokens])
        events = itertools.islice(sampler(name, runtime, Window(8, 3, 4)).stream([ids]), 20)
        found.append([(event.positions.tolist(), event.tokens.tolist()) for event in events])
    assert found[0] == found[1]


@pytest.mark.parametrize(("name", "runtime"), PAIRS)
def test_the_poison_works(name, runtime):
    """What is read is seen to be: the tests above would notice."""
    ids = PROMPT.copy()
    ids[1] = POISON
    with pytest.raises(ElisionError, match="scores are not finite"):
        sampler(name, runtime, NoCache()).run([ids])
