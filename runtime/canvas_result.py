"""What comes out of a canvas: events while it is made, then a result, and a picture of what was computed when."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .canvas_plan import Canvas, Plan

FAR, BUFFER, ACTIVE, REFRESHED, DECIDED = range(5)
"""What a step did with a position: nothing; read its cached keys and values; computed it, in a cached step or in a
refresh; computed it and decided it."""


@dataclass
class Trace:
    """states: one uint8 [N] for each step, of the five above. positions, tokens, when (the step, from 0), confidence
    (the probability that the token had): of each decision, in order."""

    states: list[np.ndarray] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    when: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)

    def picture(self) -> np.ndarray:
        """uint8 [steps, N]."""
        return np.stack(self.states)

    def order(self, length: int) -> np.ndarray:
        """int64 [length]: the step in which each position was decided, -1 where none did."""
        found = np.full(length, -1, np.int64)
        found[self.positions] = self.when
        return found

    def add(
        self, plan: Plan, length: int, positions: np.ndarray, tokens: np.ndarray, confidence: np.ndarray
    ) -> None:
        states = np.full(length, FAR, np.uint8)
        states[: plan.run] = BUFFER
        states[plan.extras] = BUFFER
        states[plan.compute] = REFRESHED if plan.refresh else ACTIVE
        states[positions] = DECIDED
        self.when += [len(self.states)] * len(positions)
        self.states.append(states)
        self.positions += positions.tolist()
        self.tokens += tokens.tolist()
        self.confidence += confidence.tolist()


@dataclass
class Result:
    """token_ids: the whole canvas; new_tokens: what was decided of it, by position, the token that ends a text too.
    Both end where an early stop has cut them. finish: "masks" (none is left) or "eos" (cut).

    steps: denoising steps, refreshes included, those too that decided nothing. refreshes: how many of them. refreshed,
    stepped: tokens computed in refreshes and in cached steps; under guidance both of its texts count. full: what the
    full sampler computes in as many steps. Seconds: in the model's refreshes, in its steps (a share of the calls that
    several canvases have in common), and in all between them."""

    token_ids: list[int] = field(default_factory=list)
    new_tokens: list[int] = field(default_factory=list)
    finish: str = "masks"
    steps: int = 0
    refreshes: int = 0
    refreshed: int = 0
    stepped: int = 0
    full: int = 0
    refresh_seconds: float = 0.0
    step_seconds: float = 0.0
    rest_seconds: float = 0.0
    trace: Trace | None = None

    @property
    def computed(self) -> int:
        """Token computations."""
        return self.refreshed + self.stepped

    @property
    def seconds(self) -> float:
        return self.refresh_seconds + self.step_seconds + self.rest_seconds

    def to_json(self) -> dict[str, Any]:
        """All but the trace, as plain data."""
        return {
            "token_ids": self.token_ids,
            "new_tokens": self.new_tokens,
            "finish": self.finish,
            "steps": self.steps,
            "refreshes": self.refreshes,
            "token_computations": self.computed,
            "token_computations_refresh": self.refreshed,
            "token_computations_step": self.stepped,
            "token_computations_full": self.full,
            "seconds": {
                "refresh": self.refresh_seconds,
                "step": self.step_seconds,
                "rest": self.rest_seconds,
            },
        }

    def close(self, canvas: Canvas) -> None:
        """The texts, from a canvas that is done."""
        self.token_ids = canvas.ids.tolist()
        self.new_tokens = canvas.ids[~canvas.given].tolist()


@dataclass(frozen=True)
class Event:
    """One denoising step of one canvas. canvas: its number in the batch. step: from 1. positions, tokens int64 [n],
    confidence float64 [n] (the tokens' probabilities): what was decided, in this order; maybe nothing. length: of the
    canvas after it, shorter where an early stop has cut it. computed: its token computations. result: once the canvas
    is done."""

    canvas: int
    step: int
    refresh: bool
    positions: np.ndarray
    tokens: np.ndarray
    confidence: np.ndarray
    length: int
    computed: int
    result: Result | None = None
