"""Samplers over the doubles, and a plain full sampler to compare them with."""

from __future__ import annotations

import numpy as np
import torch
from elision.runtime.canvas_plan import canvas_ids
from elision.runtime.canvas_policies import Block, Delayed, Dual, NoCache, Prefix, Window
from elision.runtime.canvas_sampler import Sampler

from .canvas_models import Diffusion, EagerCanvas, make

MASK, EOS, V = 39, 38, 40
MODELS = {kind: make(kind) for kind in ("llada", "dream")}
POLICIES = {
    "contiguous": Window(8, 3, 4, form="contiguous"),
    "fixed": Window(8, 3, 4, slide=False, form="contiguous"),
    "scattered": Window(8, 3, 4, "scattered"),
    "full": Window(8, 3, 4, "scattered", "full"),
    "published": Window(8, 3, 4, compat="reference", form="contiguous"),
    "prefix": Prefix(6),
    "dual": Dual(6),
    "delayed": Delayed(4),
    "block": Block(6),
    "none": NoCache(),
}
PROMPT = [3, 1, 4, 1, 5]


def sampler(kind="llada", policy=None, capacity=96, **options) -> Sampler:
    model = EagerCanvas(MODELS[kind], capacity)
    return Sampler(model, MASK, policy=policy or POLICIES["contiguous"], shift=kind == "dream", **options)


def prompt_and_masks(new=16, prompt=PROMPT):
    return canvas_ids(prompt, new, MASK)


def logits_of(model: Diffusion, x: np.ndarray, shift: bool) -> np.ndarray:
    logits = model(torch.from_numpy(x)[None]).logits[0].numpy()
    return np.concatenate([logits[:1], logits[:-1]]) if shift else logits


def full_sampler(kind, ids, steps, by="confidence", guidance=0.0, noise=None, seed=0):
    """All positions at every step, nothing clever. noise: a temperature."""
    model, shift = MODELS[kind], kind == "dream"
    x, given = np.array(ids), np.array(ids) != MASK
    random = np.random.Generator(np.random.PCG64([seed, 0]))
    history, step = [], 0
    while (masks := np.flatnonzero(x == MASK)).size:
        logits = logits_of(model, x, shift)
        if guidance:
            without = logits_of(model, np.where(given, MASK, x), shift)
            logits = without + (guidance + 1) * (logits - without)
        p = torch.from_numpy(logits[masks]).softmax(-1).numpy()
        allowed = p.copy()
        allowed[:, MASK] = 0
        tokens = allowed.argmax(1)
        if noise:
            u = random.random(p.shape)
            tokens = (allowed / (-np.log(u)) ** noise).argmax(1)
        rank = {
            "confidence": p[np.arange(len(masks)), tokens],
            "threshold": p[np.arange(len(masks)), tokens],
            "entropy": (p * np.log(p)).sum(1),
            "margin": np.sort(allowed, 1)[:, -1] - np.sort(allowed, 1)[:, -2],
            "left": -masks,
            "random": random.random(len(masks)) if by == "random" else None,
        }[by]
        count = -(-len(masks) // max(1, steps - step)) if steps > step else len(masks)
        if by == "threshold":
            count = max(1, int((rank > 0.3).sum()))
        chosen = np.argsort(-rank, kind="stable")[:count]
        x[masks[chosen]] = tokens[chosen]
        history.append(dict(zip(masks[chosen].tolist(), tokens[chosen].tolist())))
        step += 1
    return history


def decisions(one: Sampler, ids, **options):
    return [
        dict(zip(event.positions.tolist(), event.tokens.tolist())) for event in one.stream([ids], **options)
    ]
