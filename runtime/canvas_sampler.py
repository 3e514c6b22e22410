"""Decodes canvases: a policy plans each step, a `CanvasModel` computes it, a rule decides masks.

Canvases of a batch are admitted as soon as there are slots for them. In a round each makes one denoising step: those
that are refreshed one by one, then the cached steps of all others in one call. No canvas knows of another: its plans,
its random numbers and what its rows see are its own.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..passes.errors import ElisionError
from .canvas_plan import Canvas, Plan
from .canvas_policies import CONTIGUOUS, REFERENCE, Policy, State, Window
from .canvas_result import Event, Result, Trace
from .canvas_rules import Chooser, Draw, Pace, Rule, scored_of
from .canvas_step import CanvasModel, Scored
from .lm_step import Slots, joined


@dataclass(eq=False)
class _Running:
    """starts: the first slot of the canvas, and under guidance that of its twin, whose given text is masked. plan,
    wanted: of the step that is made."""

    number: int
    canvas: Canvas
    length: int  # before any cut
    state: State
    pace: Pace
    random: np.random.Generator
    result: Result
    starts: list[int]
    plan: Plan
    wanted: int = 0
    ended: bool = False  # the published early stop has cut it

    def texts(self, mask_id: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first slot, ids) of the canvas, then of its twin."""
        yield self.starts[0], self.canvas.ids
        if len(self.starts) > 1:
            yield self.starts[1], np.where(self.canvas.given, mask_id, self.canvas.ids)


class Sampler:
    """model: what computes. mask_id: the token that stands for what is to be decided. eos: ids that end a text.

    steps: denoising steps for each canvas, as far as policy and rule allow (more where the policy offers too few masks;
    fewer where the rule takes more); None: one for each mask. guidance: s of u + (s + 1)(c - u), where c are the logits
    and u those of the same canvas with its given text masked. shift: logits of a position decide the next.

    early_stop: the canvas is cut behind the first token of `eos` that has no mask before it, and ends. "reference": as
    published, for the contiguous `Window` alone: it is cut behind the first one anywhere, each cached step decides one
    token, and after a cut every step is a refresh.

    context: positions that the model can tell apart. batch: canvases at a time. Raises ElisionError for what cannot be
    meant."""

    def __init__(
        self,
        model: CanvasModel,
        mask_id: int,
        *,
        eos: Sequence[int] = (),
        policy: Policy | None = None,
        rule: Rule | None = None,
        draw: Draw | None = None,
        steps: int | None = None,
        guidance: float = 0.0,
        shift: bool = False,
        seed: int = 0,
        early_stop: bool | str = False,
        context: int | None = None,
        batch: int = 8,
    ) -> None:
        self.model, self.mask_id, self.ends = model, mask_id, tuple(eos)
        self.policy: Policy = policy if policy is not None else Window()
        self.rule, self.draw = rule or Rule(), draw or Draw()
        self.steps, self.guidance, self.shift, self.seed = steps, guidance, shift, seed
        self.early_stop, self.context, self.batch = early_stop, context, batch
        if not 0 <= mask_id < model.vocabulary:
            raise ElisionError(
                f"the mask token {mask_id} is not among the {model.vocabulary} ids of the model"
            )
        if mask_id in self.ends:
            raise ElisionError(f"token {mask_id} cannot both be the mask and end a text")
        if steps is not None and steps < 1:
            raise ElisionError(f"at least 1 denoising step is needed, not {steps}")
        if not (math.isfinite(guidance) and guidance >= 0):
            raise ElisionError(f"guidance is 0 or more, not {guidance}")
        if seed < 0 or batch < 1:
            raise ElisionError("the seed is 0 or more, and the batch 1 or more")
        if early_stop and not self.ends:
            raise ElisionError("an early stop needs a token that ends a text, and the model names none")
        if isinstance(early_stop, str) and not (
            early_stop == REFERENCE
            and isinstance(self.policy, Window)
            and self.policy.reference
            and self.policy.form == CONTIGUOUS
        ):
            raise ElisionError(
                "the published early stop is one of the contiguous window in the published form; "
                "early_stop is False, True or 'reference'"
            )
        self.chooser = Chooser(self.rule, self.draw, mask_id, self.ends)
        self.twins = 2 if guidance else 1
        self.whole = bool(guidance) or self.chooser.whole(model.largest_k)

    def run(self, canvases: Sequence[Sequence[int] | np.ndarray], *, trace: bool = False) -> list[Result]:
        """The results of `stream`, in the order of the canvases."""
        results: dict[int, Result] = {}
        for event in self.stream(canvases, trace=trace):
            if event.result is not None:
                results[event.canvas] = event.result
        return [results[number] for number in range(len(canvases))]

    def stream(
        self,
        canvases: Sequence[Sequence[int] | np.ndarray],
        *,
        numbers: Sequence[int] | None = None,
        trace: bool = False,
    ) -> Iterator[Event]:
        """Decides all masks of the canvases (ids, with the mask token wherever something is to be decided); yields what
        each step has decided. numbers: of the random streams, so that a canvas draws the same in any batch (default:
        its place in the batch). Raises ElisionError for a canvas that cannot be made, before any is."""
        for canvas in canvases:
            self._check(np.asarray(canvas, np.int64))
        if numbers is not None and (len(numbers) != len(canvases) or min(numbers, default=0) < 0):
            raise ElisionError(f"{len(canvases)} canvases need as many numbers, each 0 or more")
        return self._rounds(canvases, range(len(canvases)) if numbers is None else numbers, trace)

    def _check(self, ids: np.ndarray) -> None:
        length, model = ids.size, self.model
        if ids.ndim != 1 or not length:
            raise ElisionError("a canvas is one row of token ids")
        if not (ids == self.mask_id).any():
            raise ElisionError("the canvas has no mask: nothing is to be decided")
        if ids.min() < 0 or ids.max() >= model.vocabulary:
            raise ElisionError(f"the canvas has ids outside the model's 0 to {model.vocabulary - 1}")
        if self.context is not None and length > self.context:
            raise ElisionError(
                f"prompt and new tokens are {length} positions, and the model's context {self.context}"
            )
        if length * self.twins > model.capacity:
            twice = ", twice for guidance," if self.twins > 1 else ""
            raise ElisionError(
                f"prompt and new tokens are {length} positions{twice} and the cache has {model.capacity} slots"
            )

    def _rounds(
        self, canvases: Sequence[Sequence[int] | np.ndarray], numbers: Sequence[int], trace: bool
    ) -> Iterator[Event]:
        waiting = deque(range(len(canvases)))
        active: list[_Running] = []
        slots = Slots(self.model.capacity)
        while waiting or active:
            begun = time.perf_counter()
            while waiting and len(active) < self.batch:
                ids = canvases[waiting[0]]
                starts = self._take(slots, len(ids))
                if starts is None:
                    break
                number = waiting.popleft()
                active.append(self._begin(number, ids, numbers[number], starts, trace))
            spent, events = self._round(active)
            for one, event in zip(active, events):
                if event.result is not None:
                    for start in one.starts:
                        slots.give_back(start)
            rest = (time.perf_counter() - begun - spent) / len(active)
            for one in active:
                one.result.rest_seconds += rest
            active = [one for one, event in zip(active, events) if event.result is None]
            yield from events

    def _take(self, slots: Slots, length: int) -> list[int] | None:
        """The first slots of as many runs of `length` as a canvas needs, None where they are not free now."""
        starts: list[int] = []
        for _ in range(self.twins):
            start = slots.take(length)
            if start is None:
                for other in starts:
                    slots.give_back(other)
                return None
            starts.append(start)
        return starts

    def _begin(
        self, number: int, ids: Sequence[int] | np.ndarray, stream: int, starts: list[int], trace: bool
    ) -> _Running:
        canvas = Canvas(ids, self.mask_id)
        state = self.policy.begin(canvas, self.shift)
        steps = len(canvas.masks) if self.steps is None else self.steps
        pace = Pace(canvas, state.sections, self.rule, steps)
        random = np.random.Generator(np.random.PCG64([self.seed, stream]))
        result = Result(trace=Trace() if trace else None)
        nothing = canvas.masks[:0]
        plan = Plan(True, nothing, 0, nothing, nothing, nothing)
        return _Running(number, canvas, len(canvas), state, pace, random, result, starts, plan)

    def _round(self, active: list[_Running]) -> tuple[float, list[Event]]:
        """One denoising step of each; (seconds in the model, what was decided)."""
        for one in active:
            one.wanted = one.pace.wanted()
            if self.early_stop == REFERENCE:
                one.wanted = 1
            one.plan = one.state.plan(one.wanted)
        spent, events = 0.0, {}
        for one in active:
            if one.plan.refresh:
                scored, seconds = self._refresh(one)
                one.result.refresh_seconds += seconds
                spent += seconds
                events[one.number] = self._settle(one, scored)
        stepping = [one for one in active if not one.plan.refresh]
        if stepping:
            parts, seconds = self._step(stepping)
            spent += seconds
            total = sum(len(one.plan.compute) for one in stepping)
            for one, scored in zip(stepping, parts):
                one.result.step_seconds += seconds * len(one.plan.compute) / total
                events[one.number] = self._settle(one, scored)
        return spent, [events[one.number] for one in active]

    def _refresh(self, one: _Running) -> tuple[Scored, float]:
        """The scores of the candidates, and the seconds in the model."""
        plan = one.plan
        places, inverse = plan.scored()
        seconds, found = 0.0, []
        for start, ids in one.texts(self.mask_id):
            ids = ids[: plan.extent]
            begun = time.perf_counter()
            scored = self.model.refresh(start, ids, places, self.whole)
            seconds += time.perf_counter() - begun
            # A result is good until the next call, which the twin's is.
            found.append(_copied(scored) if self.twins > 1 else scored)
        return _rows_of(self._guided(found), inverse), seconds

    def _step(self, stepping: list[_Running]) -> tuple[list[Scored], float]:
        """`_refresh`, of the cached steps of several canvases in one call."""
        rows, keep, cuts, inverses, base, scored_rows = [], [], [], [], 0, 0
        for one in stepping:
            places, inverse = one.plan.scored()
            if not len(places):
                places = np.zeros(1, np.int64)  # no candidates, as published; a call scores something
            inverses.append(inverse)
            for start, ids in one.texts(self.mask_id):
                rows.append(one.plan.rows(ids, start))
                keep.append(base + places)
                cuts.append((scored_rows, scored_rows + len(places)))
                base += len(one.plan.compute)
                scored_rows += len(places)
        call, kept = joined(rows), np.concatenate(keep)
        begun = time.perf_counter()
        scored = self.model.step(call, kept, self.whole)
        seconds = time.perf_counter() - begun
        parts = [scored.of(slice(low, high)) for low, high in cuts]
        twins = self.twins
        groups = [parts[n : n + twins] for n in range(0, len(parts), twins)]
        return [_rows_of(self._guided(part), inverse) for part, inverse in zip(groups, inverses)], seconds

    def _guided(self, found: list[Scored]) -> Scored:
        """The scores of a canvas, or what guidance makes of them and its twin's."""
        if len(found) == 1:
            return found[0]
        with_text, without = found[0].logits, found[1].logits
        assert with_text is not None and without is not None
        logits = without + np.float32(self.guidance + 1) * (with_text - without)
        return scored_of(logits, self.chooser.needed)

    def _settle(self, one: _Running, scored: Scored) -> Event:
        """Decides, and counts."""
        canvas, plan, result = one.canvas, one.plan, one.result
        held = plan.candidates > canvas.masks[0]
        choices = self.chooser.choose(scored, held, one.random)
        count = one.wanted if plan.exactly is None else plan.exactly
        picked = self.chooser.pick(choices, count, one.random)[: plan.exactly]
        positions, tokens = plan.candidates[picked], choices.tokens[picked]
        probability = choices.probability[picked]
        canvas.decide(positions, tokens)
        one.state.decided(np.sort(positions))
        result.steps += 1
        computed = self.twins * (plan.extent if plan.refresh else len(plan.compute))
        if plan.refresh:
            result.refreshes += 1
            result.refreshed += computed
        else:
            result.stepped += computed
        result.full += self.twins * one.length
        if result.trace is not None:
            result.trace.add(plan, one.length, positions, tokens, probability)
        if self.early_stop:
            self._cut(one)
        done = not len(canvas.masks)
        if done:
            result.close(canvas)
        return Event(
            one.number,
            result.steps,
            plan.refresh,
            positions,
            tokens,
            probability,
            len(canvas),
            computed,
            result if done else None,
        )

    def _cut(self, one: _Running) -> None:
        """Early stop: behind the first end of a text with no mask before it; as published, behind the first."""
        canvas = one.canvas
        stop = len(canvas)
        if self.early_stop is True and len(canvas.masks):
            stop = int(canvas.masks[0])
        ends = ~canvas.given[:stop]
        ends &= np.isin(canvas.ids[:stop], self.ends)
        if not ends.any():
            return
        canvas.cut(int(ends.argmax()) + 1)
        one.result.finish = "eos"
        if self.early_stop == REFERENCE:
            one.state.cut()


def _copied(scored: Scored) -> Scored:
    logits = None if scored.logits is None else scored.logits.copy()
    return Scored(
        scored.ids.copy(), scored.values.copy(), scored.log_sum.copy(), scored.entropy.copy(), logits
    )


def _rows_of(scored: Scored, rows: np.ndarray) -> Scored:
    """One row for each candidate, where some decide two."""
    if len(rows) == len(scored.ids):
        return scored
    return scored.of(rows)
