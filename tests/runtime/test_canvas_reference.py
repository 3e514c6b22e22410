"""The published loops of windowed diffusion, written straight from the notes (shared/design/windowed_diffusion.md,
sections 2 and 3) over a plain simulation with old keys and values, against `Sampler`, step by step.

Two things differ from what is published: the mask token is never chosen, and guidance works at cached steps.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from elision.runtime.canvas_policies import Window
from elision.runtime.canvas_rules import Draw, Rule
from elision.runtime.canvas_sampler import Sampler

from .canvas_models import Diffusion, EagerCanvas, make

MASK = 39
BY_STEP = list[dict[int, int]]  # for each step: position -> token


class Simulation:
    """One canvas; keys and values of a position stay what they were when it was last computed."""

    def __init__(self, model: Diffusion, length: int) -> None:
        self.model, self.cache = model, model.cache(length)

    def __call__(self, x: list[int], rows: list[int], seen: list[int]) -> np.ndarray:
        """Logits [len(rows), V]; mask's are the lowest."""
        at = torch.tensor(rows)
        ids = torch.tensor(x)[at]
        logits = self.model.stale(ids, at, self.cache, at, [(torch.arange(len(rows)), torch.tensor(seen))])
        return logits.numpy()


def softmax(row: np.ndarray) -> np.ndarray:
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def best_token(row: np.ndarray) -> int:
    row = row.copy()
    row[MASK] = -np.inf
    return int(row.argmax())


def masks_of(x: list[int]) -> list[int]:
    return [i for i, token in enumerate(x) if token == MASK]


def published_l(
    model: Diffusion,
    x: list[int],
    window: int,
    active_tokens: int,
    cycle: int,
    steps: int,
    cfg: float = 0.0,
    temperature: float = 0.0,
    seed: int = 0,
) -> BY_STEP:
    """Section 2: the LLaDA variant."""
    x = list(x)
    n = len(x)
    prompt = [i for i, token in enumerate(x) if token != MASK]
    total = len(masks_of(x))
    counts = [total // steps + (i < total % steps) for i in range(steps)]
    simulation, blind = Simulation(model, n), Simulation(model, n)
    random = np.random.Generator(np.random.PCG64([seed, 0]))
    window_idx: list[int] = []
    active_idx: list[int] = []
    in_phase: list[int] = []
    history: BY_STEP = []

    def forward(rows: list[int], seen: list[int]) -> np.ndarray:
        c = simulation(x, rows, seen)
        if not cfg:
            return c
        u = blind([MASK if i in prompt else token for i, token in enumerate(x)], rows, seen)
        return u + (cfg + 1) * (c - u)

    for i in range(steps):
        if not masks_of(x):
            break
        refresh = i % cycle == 0
        rows = list(range(n)) if refresh else active_idx
        logits = dict(zip(rows, forward(rows, rows if refresh else window_idx)))
        candidates = [p for p in rows if x[p] == MASK]
        noise = random.random((len(candidates), 40)) if temperature else None
        choice = {}
        for j, p in enumerate(candidates):
            row = logits[p].astype(np.float64)
            if noise is None:
                token = best_token(row)
            else:
                token = best_token(np.log(np.exp(row) / (-np.log(noise[j])) ** temperature))
            choice[p] = (softmax(row)[token], token)
        assert len(candidates) >= counts[i], "here the published code overwrites what is decided"
        chosen = sorted(choice, key=lambda p: -choice[p][0])[: counts[i]]
        for p in chosen:
            x[p] = choice[p][1]
        history.append({p: x[p] for p in chosen})
        if refresh:
            undecoded = masks_of(x)
            decoded = [p for p in range(n) if x[p] != MASK]
            window_idx = sorted(decoded + undecoded[:window])
            active_idx = sorted(undecoded[:active_tokens] + chosen)
            in_phase = []
        else:
            in_phase += chosen
            active_idx = sorted(masks_of(x)[:active_tokens] + in_phase)
    return history


def published_d(
    model: Diffusion,
    x: list[int],
    outer: int,
    inner: int,
    cycle: int,
    steps: int,
    slide: bool = True,
    shift: bool = True,
    eos: int | None = None,
) -> BY_STEP:
    """Section 3: the Dream variant. eos: with early_stop."""
    x = list(x)
    given = len(x) - len(masks_of(x))
    times = np.linspace(1, 1e-3, steps + 1)
    simulation = Simulation(model, len(x))
    found = False
    extent = first = last = 0
    history: BY_STEP = []
    for i in range(steps):
        masks = masks_of(x)
        if not masks:
            break
        k = int(len(masks) * (1 - times[i + 1] / times[i])) if i < steps - 1 else len(masks)
        if i % cycle == 0 or found:
            rank = 0
            extent = 0
            for token in x:
                rank += token == MASK
                extent += token != MASK or rank < outer
            first = masks[0]
            last = masks[inner - 1] + 1 if len(masks) >= inner else extent
            rows = list(range(extent))
            logits = simulation(x, rows, rows)
            if shift:
                logits = np.concatenate([logits[:1], logits[:-1]])
            chosen = [first]
            tokens = {first: best_token(logits[first])}
        else:
            if slide:
                last = masks[inner - 1] + 1 if len(masks) >= inner else extent
            rows = list(range(first, min(last, extent)))  # beyond the prefix the published code breaks
            logits = simulation(x, rows, list(range(extent)))
            if shift:
                logits = np.concatenate([logits[:1], logits[:-1]])
            tokens, certain = {}, {}
            for row, p in zip(logits, rows):
                if x[p] == MASK:
                    tokens[p] = best_token(row)
                    p_all = softmax(row)
                    certain[p] = float((p_all * np.log(p_all)).sum())
            k = k if eos is None else 1
            chosen = sorted(tokens, key=lambda p: -certain[p])[:k]
        for p in chosen:
            x[p] = tokens[p]
        history.append({p: x[p] for p in chosen})
        if eos is not None and eos in x[given:]:
            x = x[: x.index(eos, given) + 1]
            found = True
    return history


def ours(model: Diffusion, x: list[int], steps: int, shift: bool, **options) -> BY_STEP:
    """The first `steps` steps."""
    sampler = Sampler(EagerCanvas(model), MASK, steps=steps, shift=shift, **options)
    history = []
    for event in sampler.stream([x]):
        history.append(dict(zip(event.positions.tolist(), event.tokens.tolist())))
        if len(history) == steps:
            break
    return history


def canvas(seed: int, new: int, prompt: int = 4) -> list[int]:
    return [*np.random.default_rng(seed).integers(0, 38, prompt).tolist(), *[MASK] * new]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "numbers",
    [(12, 4, 4, 20), (16, 6, 3, 9), (8, 5, 2, 20), (40, 40, 5, 7), (20, 1, 6, 20), (10, 3, 1, 13)],
    ids=str,
)
def test_llada_variant(numbers, seed):
    window, active, cycle, steps = numbers
    model = make("llada", seed)
    x = canvas(seed, 20)
    policy = Window(window, active, cycle, form="scattered", extent="full", compat="reference")
    found = ours(model, x, steps, False, policy=policy, rule=Rule(schedule="equal"))
    assert found == published_l(model, x, window, active, cycle, steps)
    assert sum(map(len, found)) == 20


@pytest.mark.parametrize(
    "options", [{"cfg": 1.5}, {"temperature": 0.8}, {"cfg": 0.5, "temperature": 1.2}], ids=str
)
@pytest.mark.parametrize("seed", range(2))
def test_llada_variant_with_guidance_and_noise(options, seed):
    model, x = make("llada", seed), canvas(seed, 18)
    policy = Window(12, 4, 4, form="scattered", extent="full", compat="reference")
    found = ours(
        model,
        x,
        12,
        False,
        policy=policy,
        rule=Rule(schedule="equal"),
        seed=seed,
        guidance=options.get("cfg", 0.0),
        draw=Draw(options.get("temperature", 0.0), noise="gumbel"),
    )
    assert found == published_l(model, x, 12, 4, 4, 12, **options, seed=seed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("slide", [False, True])
@pytest.mark.parametrize(
    "numbers", [(12, 4, 4, 20), (16, 6, 3, 8), (8, 8, 5, 12), (40, 3, 9, 30), (2, 1, 2, 20)], ids=str
)
def test_dream_variant(numbers, slide, seed):
    outer, inner, cycle, steps = numbers
    model, x = make("dream", seed), canvas(seed, 20)
    policy = Window(outer, inner, cycle, slide=slide, compat="reference", form="contiguous")
    rule = Rule("entropy", "linear")
    found = ours(model, x, steps, True, policy=policy, rule=rule)
    assert found == published_d(model, x, outer, inner, cycle, steps, slide)


def test_a_published_phase_may_find_nothing_to_decide():
    model, x = make("dream", 1), canvas(1, 20)
    policy = Window(12, 3, 8, slide=False, compat="reference", form="contiguous")
    found = ours(model, x, 10, True, policy=policy, rule=Rule("entropy", "linear"))
    assert found == published_d(model, x, 12, 3, 8, 10, slide=False)
    assert {} in found


def test_dream_variant_without_shift():
    model, x = make("llada", 5), canvas(5, 20)
    policy = Window(12, 4, 4, compat="reference", form="contiguous")
    found = ours(model, x, 16, False, policy=policy, rule=Rule("entropy", "linear"))
    assert found == published_d(model, x, 12, 4, 4, 16, shift=False)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("slide", [False, True])
def test_dream_variant_that_stops_early(slide, seed):
    model, x = make("dream", seed), canvas(seed, 20)
    policy = Window(12, 6, 5, slide=slide, compat="reference", form="contiguous")
    rule = Rule("entropy", "linear")
    plain = published_d(model, x, 12, 6, 5, 60, slide)
    late = [token for step in plain[2:9] for token in step.values()]
    eos = late[-1]  # some token that does come up
    found = ours(model, x, 60, True, policy=policy, rule=rule, eos=[eos], early_stop="reference")
    assert found == published_d(model, x, 12, 6, 5, 60, slide, eos=eos)
    assert sum(map(len, found)) < 20
