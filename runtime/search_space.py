"""The space of a search: sketches of passes with open options, as points of value numbers, and their pipelines."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..passes.base import Pass
from ..passes.errors import NothingMatched, Refused
from ..passes.ir.graph import Graph
from ..passes.pipeline import Passes, format
from ..passes.tunable import Knob, sketches

Point = tuple[int, ...]
"""The number of a value for every coordinate; 0 is what changes least."""

MOST_LINES = 12
"""So many combinations of other options, at most, are scanned for their best constant."""


@dataclass(frozen=True)
class Coordinate:
    """One number of a point: the value of `knob` of pass number `owner` at `place` (None: it has one value)."""

    owner: int
    knob: Knob
    place: int | None

    @property
    def last(self) -> int:
        return len(self.knob.values) - 1


@dataclass(frozen=True)
class Line:
    """Points with one and the same value of `knob` everywhere, and all else as in `base`."""

    base: Point
    indices: tuple[int, ...]
    last: int

    def at(self, value: int) -> Point:
        return tuple(value if i in self.indices else old for i, old in enumerate(self.base))


class Space:
    """Every pipeline that `passes` leaves open on `graph`.

    Raises PipelineError for a text that is none, Refused where no pass of it has anything to tune, with the reasons."""

    def __init__(self, passes: Passes, graph: Graph) -> None:
        self.sketches = sketches(passes)
        self.coordinates: list[Coordinate] = []
        reasons: list[str] = []
        for owner, sketch in enumerate(self.sketches):
            try:
                knobs = sketch.knobs(graph)
            except (Refused, NothingMatched) as error:
                reasons.append(f"{sketch}: {error}".replace(f"{sketch}: {sketch}:", f"{sketch}:"))
                continue
            if not any(knob.ordered for knob in knobs):
                reasons.append(f"{sketch} has no open option that trades quality for time here")
            for knob in knobs:
                places = [None] if knob.places is None else range(knob.places)
                self.coordinates += [Coordinate(owner, knob, place) for place in places]
        if not any(c.knob.ordered for c in self.coordinates):
            raise Refused(f"nothing to tune: {'; '.join(reasons) or 'no pass was named'}")
        self.notes = reasons
        self.start: Point = (0,) * len(self.coordinates)

    def of(self, owner: int, option: str) -> list[int]:
        """The coordinates of one knob, in the order of its places."""
        return [i for i, c in enumerate(self.coordinates) if c.owner == owner and c.knob.option == option]

    @property
    def knobs(self) -> list[tuple[int, Knob]]:
        found: list[tuple[int, Knob]] = []
        for c in self.coordinates:
            if (c.owner, c.knob) not in found:
                found.append((c.owner, c.knob))
        return found

    def passes(self, point: Point) -> list[Pass]:
        """The pipeline of a point; passes that would do nothing are left out. Raises PipelineError."""
        made: list[Pass] = []
        for owner, sketch in enumerate(self.sketches):
            options: dict[str, Any] = {}
            idle = False
            for knob in [knob for own, knob in self.knobs if own == owner]:
                indices = [point[i] for i in self.of(owner, knob.option)]
                idle = idle or (knob.neutral and not any(indices))
                if knob.ordered or any(indices):
                    options[knob.option] = knob.option_of(indices)
            if not idle:
                made.append(sketch.build(options))
        return made

    def text(self, point: Point) -> str:
        return format(self.passes(point))

    def settled(self, point: Point) -> Point:
        """The same pipeline with the first value wherever it makes no difference: taste in places where nothing is
        done, and all options of a pass that is left out."""
        found = list(point)
        for i, c in enumerate(self.coordinates):
            beside = [j for j, d in enumerate(self.coordinates) if d.owner == c.owner and d.knob.neutral]
            here = [j for j in beside if c.place is None or self.coordinates[j].place in (None, c.place)]
            if here and i not in here and not any(point[j] for j in here):
                found[i] = 0
            if beside and i not in beside and not any(point[j] for j in beside):
                found[i] = 0
        return tuple(found)

    def lines(self) -> Iterator[Line]:
        """The lines of constants: the knob with the most values runs, the others take every combination of values,
        the same everywhere."""
        knobs = self.knobs
        owner, running = max(
            (entry for entry in knobs if entry[1].ordered), key=lambda entry: len(entry[1].values)
        )
        others = [entry for entry in knobs if entry != (owner, running)]
        choices = [range(len(knob.values)) for _, knob in others]
        if any(knob.ordered and len(knob.values) > 4 for _, knob in others):
            choices = [  # coarse where a second knob is long too
                c if len(c) <= 4 else range(0, len(c), -(-len(c) // 4)) for c in choices
            ]
        for combination in itertools.islice(itertools.product(*choices), MOST_LINES):
            base = list(self.start)
            for (other, knob), value in zip(others, combination):
                for i in self.of(other, knob.option):
                    base[i] = value
            yield Line(tuple(base), tuple(self.of(owner, running.option)), len(running.values) - 1)

    def is_constant(self, point: Point) -> bool:
        """Whether every option has one value everywhere."""
        return all(len({point[i] for i in self.of(owner, knob.option)}) == 1 for owner, knob in self.knobs)

    def groups(self) -> list[list[int]]:
        """Coordinates whose effects are tied together: those of one pass at one place."""
        found: dict[tuple[int, int | None], list[int]] = {}
        for i, c in enumerate(self.coordinates):
            if c.knob.ordered or c.place is not None:
                found.setdefault((c.owner, c.place) if c.place is not None else (c.owner, -1 - i), []).append(
                    i
                )
        return list(found.values())

    def tastes(self) -> list[int]:
        """Coordinates without an order and without a place: they touch everything at once."""
        return [i for i, c in enumerate(self.coordinates) if not c.knob.ordered and c.place is None]
