"""How a graph within a pipeline is compared with the one that the pipeline began with, whose inputs and outputs may be
others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .base import NewSignature
from .ir.graph import Graph

Names = list[str | None]


@dataclass(frozen=True)
class Origin:
    """`inputs`: what the first graph runs on for the comparison, in its order; None where no pass has said. `steps`:
    the signatures that passes have changed since, in order. `names`: of the first graph's inputs, known from the
    first change on."""

    inputs: list[Any] | None = None
    steps: tuple[NewSignature, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def same_examples(self) -> bool:
        """Whether the last graph runs on what the first one ran on, and more."""
        return all(step.added is not None for step in self.steps)

    @property
    def last_rows(self) -> bool:
        return any(step.last_rows for step in self.steps)

    def behind(self, signature: NewSignature, before: Graph) -> Origin:
        """The same for the graph that a pass with this signature made of `before`.

        Examples of its own are translated where `before` still has all inputs of the first graph; where an earlier
        pass has replaced those, later ones keep to the examples they were given."""
        names = self.names or tuple(value.name for value in before.inputs)
        made = replace(self, steps=(*self.steps, signature), names=names)
        if signature.before is None:
            return made
        own = dict(zip((value.name for value in before.inputs), signature.before))
        if not all(name in own for name in names):
            return made
        return replace(made, inputs=[own[name] for name in names])

    def expected(self, found: Sequence[np.ndarray], names: Names) -> tuple[list[np.ndarray | None], Names]:
        """The first graph's outputs as those of the last one that mean the same, with the names they had; None for one
        that has no counterpart."""
        values: list[np.ndarray | None] = list(found)
        for step in self.steps:
            names = [names[i] if i < len(names) else None for i in step.outputs]
            values = step.expect(values)
        return values, names


def last_rows(new: np.ndarray, old: np.ndarray | None) -> np.ndarray:
    """What `old` has of `new` where it keeps the last rows along one axis."""
    if old is None:
        return new
    for axis, (count, kept) in enumerate(zip(new.shape, old.shape)):
        if kept < count:
            return np.take(new, np.arange(count - kept, count), axis)
    return new
