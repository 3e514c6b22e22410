"""Policies of a canvas: which positions are refreshed, computed, read and decided, and when.

Each makes plans (`canvas_plan.Plan`) for the same two graphs. What is decided among a plan's candidates is said by
`canvas_rules`, which knows nothing of policies. A policy has no state: `begin` gives one for each canvas.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from ..passes.errors import ElisionError
from ..passes.options import nearest
from ..passes.window import WindowOptions, check_window
from .canvas_plan import EMPTY, Canvas, Plan, refresh_plan, step_plan

CONTIGUOUS, SCATTERED = "contiguous", "scattered"
PREFIX, FULL = "prefix", "full"
REFERENCE = "reference"


class State(Protocol):
    """A policy at work on one canvas. sections: stretches (first, end) of the canvas that are finished one after the
    other; together they hold all masks, and the steps are divided among them."""

    sections: list[tuple[int, int]]

    def plan(self, wanted: int) -> Plan:
        """The next step. wanted: how many decisions the rule would like to make. At least one mask is left."""
        ...

    def decided(self, positions: np.ndarray) -> None:
        """After each step: int64 [n], what was decided (the canvas has it already)."""
        ...

    def cut(self) -> None:
        """The canvas has become shorter though it holds masks: the published early stop, of `Window` alone."""
        ...


class Policy(Protocol):
    """name: as in `--policy`. shift, of `begin`: logits of a position decide the next one."""

    name: ClassVar[str]

    def begin(self, canvas: Canvas, shift: bool = False) -> State: ...


class _State:
    """One section, nothing to remember."""

    def __init__(self, canvas: Canvas, shift: bool, block: int | None = None) -> None:
        self.canvas, self.shift = canvas, shift
        self.sections = [(0, len(canvas))] if block is None else _blocks(canvas, block)

    def decided(self, positions: np.ndarray) -> None:
        pass

    def cut(self) -> None:
        pass

    def section(self) -> tuple[int, int]:
        """The one that is worked on: that of the first mask."""
        return section_of(self.sections, int(self.canvas.masks[0]))

    def masks_below(self, end: int) -> np.ndarray:
        """The masked positions before `end`."""
        masks = self.canvas.masks
        return masks[: int(np.searchsorted(masks, end))]

    def refresh(self, extent: int, candidates: np.ndarray, exactly: int | None = None) -> Plan:
        return refresh_plan(extent, candidates, self.shift, exactly)

    def step(self, compute: np.ndarray, run: int, candidates: np.ndarray, extras: np.ndarray = EMPTY) -> Plan:
        return step_plan(compute, run, candidates, self.shift, extras)


def section_of(sections: list[tuple[int, int]], position: int) -> tuple[int, int]:
    """The section (first, end) that a position is in."""
    return sections[bisect_right(sections, position, key=lambda section: section[0]) - 1]


def _blocks(canvas: Canvas, size: int) -> list[tuple[int, int]]:
    """Blocks of `size` positions from the first mask on, those that hold masks."""
    first = int(canvas.masks[0])
    numbers = np.unique((canvas.masks - first) // size).tolist()
    lows = [first + number * size for number in numbers]
    return [(low, min(low + size, len(canvas))) for low in lows]


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ElisionError(f"{name} is 1 or more, not {value}")


@dataclass(frozen=True)
class Window:
    """Windowed diffusion (Window-Diffusion). A refresh begins each phase of `refresh` steps; the cached steps after it
    compute the first `active` masks, and what was decided in the phase, and read what else the window holds: all that
    is decided, and the first `window` masks. Masks beyond are far: never read by a cached step.

    form "contiguous" (the published Dream variant): the range from the first mask at the refresh to the `active`-th
    mask now (slide) or at the refresh. "scattered" (the published LLaDA variant): these masks alone, with those decided
    in the phase; one decided by the refresh is computed at the first cached step and then only read.

    extent "prefix": a refresh computes positions up to the mask after the window's last: what lies behind is never
    computed or read, given text included. "full" (as published for LLaDA): all of them, and decided tokens behind the
    window are read.

    A refresh decides among the first `active` masks (contiguous), the window's (scattered), or all (scattered, full).
    Where the window holds fewer masks than the rule wants to decide, the next refresh comes early.

    compat "reference": as published, a phase is never cut short (a step may find nothing to decide); contiguous: a
    window of `window` - 1 masks, and a refresh decides the first mask and no other. Even so, decided tokens are never
    overwritten, and no row lies outside the window."""

    name: ClassVar[str] = "window"
    window: int = WindowOptions.window
    active: int = WindowOptions.active
    refresh: int = WindowOptions.refresh
    form: str = SCATTERED
    extent: str = PREFIX
    slide: bool = True
    compat: str | None = None

    def __post_init__(self) -> None:
        """Raises ElisionError for numbers that no window has."""
        check_window(self.window, self.active, self.refresh)
        for what, value, known in (
            ("form", self.form, (CONTIGUOUS, SCATTERED)),
            ("extent", self.extent, (PREFIX, FULL)),
            ("compat", self.compat or REFERENCE, (REFERENCE,)),
        ):
            if value not in known:
                raise ElisionError(f"unknown {what} of a window {value!r}{nearest(value, known)}")
        if self.reference and self.form == CONTIGUOUS and self.window < 2:
            raise ElisionError("as published, a window of 1 token is empty: 2 is the smallest")

    @property
    def reference(self) -> bool:
        return self.compat == REFERENCE

    def begin(self, canvas: Canvas, shift: bool = False) -> State:
        state = _Contiguous if self.form == CONTIGUOUS else _Scattered
        return state(self, canvas, shift)


class _Windowed(_State):
    """done: steps of the phase so far. end: behind the last mask of the window and what is given after it. run, extras:
    what the cached steps of the phase see."""

    extras = EMPTY
    end = run = 0

    def __init__(self, policy: Window, canvas: Canvas, shift: bool) -> None:
        super().__init__(canvas, shift)
        self.policy = policy
        self.done = policy.refresh
        self.always = False

    def cut(self) -> None:
        self.always = True

    def plan(self, wanted: int) -> Plan:
        policy = self.policy
        if self.done < policy.refresh and not self.always:
            plan = self._cached()
            # As many candidates as the step can use, unless a refresh would have no more.
            enough = min(max(1, wanted), policy.active, len(self.canvas.masks))
            if policy.reference or len(plan.candidates) >= enough:
                self.done += 1
                return plan
        self.done = 1
        return self._refreshed()

    def look(self, masks: int) -> None:
        """From now on, the first `masks` masks and all that stands before the next are seen, with what a full refresh
        knows of the decided ones behind."""
        positions, length = self.canvas.masks, len(self.canvas)
        self.end = self.run = length if len(positions) <= masks else int(positions[masks])
        self.extras = EMPTY
        if self.policy.extent == FULL:
            self.extras = np.flatnonzero(~self.canvas.masked[self.end :]) + self.end

    def refreshed(self, candidates: np.ndarray, exactly: int | None = None) -> Plan:
        extent = len(self.canvas) if self.policy.extent == FULL else self.end
        return self.refresh(extent, candidates, exactly)

    def _refreshed(self) -> Plan:
        raise NotImplementedError

    def _cached(self) -> Plan:
        raise NotImplementedError


class _Contiguous(_Windowed):
    """first, fixed: the range of active positions at the refresh."""

    first = fixed = 0

    def _refreshed(self) -> Plan:
        policy, masks = self.policy, self.canvas.masks
        self.look(policy.window - 1 if policy.reference else policy.window)
        self.first = int(masks[0])
        self.fixed = self._behind(masks[: policy.active])
        if policy.reference:
            return self.refreshed(masks[:1], 1)
        return self.refreshed(masks[: policy.active])

    def _cached(self) -> Plan:
        policy = self.policy
        if policy.slide:
            active = self.masks_below(self.end)[: policy.active]
            end = self._behind(active)
        else:
            end = self.fixed
            active = self.masks_below(end)
        return self.step(np.arange(self.first, end), self.run, active, self.extras)

    def _behind(self, active: np.ndarray) -> int:
        """Where the range ends; at the window's end where it holds too few masks."""
        if len(active) < self.policy.active:
            return self.end
        return min(int(active[-1]) + 1, self.end)


class _Scattered(_Windowed):
    """kept: what was decided in the phase's cached steps. just: by its refresh, until the first cached step."""

    kept = EMPTY
    just = EMPTY

    def _refreshed(self) -> Plan:
        policy, masks = self.policy, self.canvas.masks
        self.kept = EMPTY
        self.look(policy.window)
        return self.refreshed(masks if policy.extent == FULL else masks[: policy.window])

    def decided(self, positions: np.ndarray) -> None:
        if self.done == 1:
            self.just = positions
            if self.policy.extent == FULL:
                self.look(self.policy.window)  # which a full refresh has moved
        else:
            self.just = EMPTY
            self.kept = np.union1d(self.kept, positions)

    def _cached(self) -> Plan:
        active = self.masks_below(self.end)[: self.policy.active]
        compute = np.sort(np.concatenate([active, self.kept, self.just]))
        if not len(compute):  # as published, a step with nothing to do
            compute = np.array([self.run - 1])
        return self.step(compute, self.run, active, self.extras)


@dataclass(frozen=True)
class Prefix:
    """Prefix cache (Fast-dLLM): at each block's start all is refreshed; a cached step computes from the block's start
    to the end of the canvas, and reads the prompt and the earlier blocks. Decided: masks of the block."""

    name: ClassVar[str] = "prefix"
    block: int = 32

    def __post_init__(self) -> None:
        _positive("a block", self.block)

    def begin(self, canvas: Canvas, shift: bool = False) -> State:
        return _Cached(canvas, shift, self.block, to_end=True)


@dataclass(frozen=True)
class Dual:
    """Dual cache (Fast-dLLM): at each block's start all is refreshed; a cached step computes the block, and reads all
    else, later masks too. Decided: masks of the block."""

    name: ClassVar[str] = "dual"
    block: int = 32

    def __post_init__(self) -> None:
        _positive("a block", self.block)

    def begin(self, canvas: Canvas, shift: bool = False) -> State:
        return _Cached(canvas, shift, self.block, to_end=False)


class _Cached(_State):
    def __init__(self, canvas: Canvas, shift: bool, block: int, to_end: bool) -> None:
        super().__init__(canvas, shift, block)
        self.to_end = to_end
        self.refreshed = -1  # the block that the last refresh was for

    def plan(self, wanted: int) -> Plan:
        low, high = self.section()
        candidates, length = self.masks_below(high), len(self.canvas)
        if self.refreshed != low:
            self.refreshed = low
            return self.refresh(length, candidates)
        return self.step(np.arange(low, length if self.to_end else high), length, candidates)


@dataclass(frozen=True)
class Delayed:
    """Delayed cache (dKV-Cache): all is refreshed every `refresh` steps; a cached step computes all masks and what was
    decided one step ago, and reads what was decided earlier. Decided: masks anywhere."""

    name: ClassVar[str] = "delayed"
    refresh: int = 8

    def __post_init__(self) -> None:
        _positive("the number of steps between refreshes", self.refresh)

    def begin(self, canvas: Canvas, shift: bool = False) -> State:
        return _Delayed(canvas, shift, self.refresh)


class _Delayed(_State):
    def __init__(self, canvas: Canvas, shift: bool, every: int) -> None:
        super().__init__(canvas, shift)
        self.every, self.done = every, every
        self.just = EMPTY

    def decided(self, positions: np.ndarray) -> None:
        self.just = positions

    def plan(self, wanted: int) -> Plan:
        masks, length = self.canvas.masks, len(self.canvas)
        if self.done >= self.every:
            self.done = 1
            return self.refresh(length, masks)
        self.done += 1
        return self.step(np.sort(np.concatenate([masks, self.just])), length, masks)


@dataclass(frozen=True)
class Block:
    """Semi-autoregressive decoding (LLaDA): every step computes all. Decided: masks of the first block that has any."""

    name: ClassVar[str] = "block"
    block: int = 32

    def __post_init__(self) -> None:
        _positive("a block", self.block)

    def begin(self, canvas: Canvas, shift: bool = False) -> State:
        return _Plain(canvas, shift, self.block)


@dataclass(frozen=True)
class NoCache:
    """The full sampler: every step computes all. Decided: masks anywhere."""

    name: ClassVar[str] = "none"

    def begin(self, canvas: Canvas, shift: bool = False) -> State:
        return _Plain(canvas, shift)


class _Plain(_State):
    def plan(self, wanted: int) -> Plan:
        return self.refresh(len(self.canvas), self.masks_below(self.section()[1]))


POLICIES: dict[str, Callable[..., Policy]] = {
    kind.name: kind for kind in (Window, Prefix, Dual, Delayed, Block, NoCache)
}


def policy_named(name: str, **options: Any) -> Policy:
    """The policy of `--policy`, with options of its own. Raises ElisionError for a name that is none."""
    if name not in POLICIES:
        raise ElisionError(f"unknown policy {name!r}{nearest(name, POLICIES)}")
    return POLICIES[name](**options)
