"""What a search over pipelines may set: options that a pass declares, and pipelines that leave them open.

A pass says what is tunable in a graph (`Pass.tunable`) as knobs; a search knows nothing else of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .base import Pass
from .errors import PipelineError
from .pipeline import Passes, read

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1)
"""Shares of the tokens that a search tries, from all to few."""


@dataclass(frozen=True)
class Knob:
    """An option that trades quality for time, or that is a matter of taste (`ordered=False`).

    values: what it may be; of an ordered knob from what changes least to what saves most. places: None for one value,
    else the option is a list of so many values, one for each place in the graph (a block, a run of products), whose
    effects add up. neutral: with values[0] everywhere the pass does nothing. A value that is equal everywhere is
    written once."""

    option: str
    values: tuple[Any, ...]
    places: int | None = None
    ordered: bool = True
    neutral: bool = False

    def __post_init__(self) -> None:
        if not self.values or (self.places is not None and self.places < 1):
            raise PipelineError(f"knob {self.option} has no values, or no place")

    def option_of(self, indices: Sequence[int]) -> Any:
        """What the option is when place i has the value of number indices[i]."""
        chosen = [self.values[index] for index in indices]
        return chosen[0] if len(set(indices)) == 1 else chosen


@dataclass(frozen=True, eq=False)
class Sketch:
    """A pass of which some options are said and others are left open. `whole`: where an object was given."""

    kind: type[Pass]
    given: Mapping[str, Any]
    whole: Pass | None = None

    def knobs(self, graph: Any) -> list[Knob]:
        """What the pass declares, less what is said already. Raises as Pass.tunable."""
        return [knob for knob in self.kind.tunable(graph, self.given) if knob.option not in self.given]

    def build(self, options: Mapping[str, Any]) -> Pass:
        """The pass with what was left open. Raises PipelineError."""
        if self.whole is not None:
            return self.whole.with_options(**options) if options else self.whole
        return self.kind(**{**self.given, **options})

    def new_inputs(self) -> tuple[str, ...]:
        """As Pass.new_inputs; none of a pass that cannot be made before its open options are chosen."""
        try:
            return self.build({}).new_inputs()
        except PipelineError:
            return ()

    def __str__(self) -> str:
        return self.kind.name


def sketches(passes: Passes) -> list[Sketch]:
    """As `parse`, but options that a pass needs may be missing. Raises PipelineError."""
    if isinstance(passes, str):
        return read(passes, Sketch)
    if isinstance(passes, Pass):
        given = {name: getattr(passes.options, name) for name in passes.given}
        return [Sketch(type(passes), given, passes)]
    if isinstance(passes, type) and issubclass(passes, Pass):
        return [Sketch(passes, {})]
    if isinstance(passes, Sequence) and not isinstance(passes, bytes | bytearray):
        return [single for entry in passes for single in sketches(entry)]
    raise PipelineError(f"passes must be a text or a list of passes, not {type(passes).__name__}")
