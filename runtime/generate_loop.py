"""The decoding loop: prompts are read one after the other, running sequences take one step together.

A sequence is admitted as soon as there are slots for it and the batch has room, so that a long one holds nobody up.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .generate_sampling import Sampler
from .lm_step import CHUNK, Slots, StepModel, chain, joined, read_prompt
from .lm_text import Stream


@dataclass(eq=False)
class Running:
    """One sequence. limit: new ids at most; ends: ids that end it (they are kept in `new`, and give no text).

    finish: "eos", "stop" (a stop string), "length" (max_new_tokens) or "context" (no position is left)."""

    prompt: list[int]
    limit: int
    sampler: Sampler
    stream: Stream
    ends: frozenset[int] = frozenset()
    number: int = 0
    cut_by: str = "length"  # what `limit` was set by
    new: list[int] = field(default_factory=list)
    finish: str | None = None
    start: int = -1  # the first of its slots
    begun: float = 0.0
    first: float = 0.0
    ended: float = 0.0

    @property
    def slots(self) -> int:
        """How many it needs: the last new id is never fed."""
        return max(1, len(self.prompt) + self.limit - 1)


def decode(
    model: StepModel, sequences: Sequence[Running], batch: int, chunk: int = CHUNK
) -> Iterator[tuple[Running, str]]:
    """Runs all sequences; yields (sequence, piece of text) whenever one has a new id, and once more at its end if text
    had been held back. Every sequence fits the cache when it is alone: whoever made them has checked that."""
    waiting, active, slots = deque(sequences), [], Slots(model.capacity)
    while waiting or active:
        while waiting and len(active) < batch:
            start = slots.take(waiting[0].slots)
            if start is None:
                break
            one = waiting.popleft()
            one.start, one.begun = start, time.perf_counter()
            if one.limit < 1:
                one.first = one.ended = one.begun
                one.finish = one.cut_by
            else:
                scores = read_prompt(model, start, one.prompt, chunk)
                yield from _advance(one, scores)
            active.append(one)
        for one in [item for item in active if item.finish]:
            slots.give_back(one.start)
        active = [item for item in active if not item.finish]
        if not active:
            continue
        past = [len(one.prompt) + len(one.new) - 1 for one in active]
        rows = joined([chain(one.start, at, one.new[-1:]) for one, at in zip(active, past)])
        scores = model.step(rows)
        for one, row in zip(active, scores):
            yield from _advance(one, row)


def _advance(one: Running, scores) -> Iterator[tuple[Running, str]]:
    last = len(one.new) + 1 >= one.limit
    token = one.sampler.choose(scores, [*one.prompt, *one.new], len(one.new), last=last)
    now = time.perf_counter()
    one.new.append(token)
    one.first = one.first or now
    one.ended = now
    if token in one.ends:
        one.finish = "eos"
        yield one, one.stream.finish()
        return
    piece = one.stream.push(token)
    if one.stream.stopped:
        one.finish = "stop"
    elif last:
        one.finish = one.cut_by
        piece += one.stream.finish()
        one.finish = "stop" if one.stream.stopped else one.finish
    yield one, piece
