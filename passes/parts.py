"""A model that comes in parts: several graphs, and which output of one goes into which input of another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from .analysis.flow import is_float
from .ir.graph import Graph, Value

if TYPE_CHECKING:
    from .base import Pass


@dataclass(frozen=True)
class Link:
    """Output number `output` of part `source` goes into input number `input` of part `target`; told `by` their equal
    names, or by their shapes, where only those two have them."""

    source: str
    output: int
    target: str
    input: int
    by: Literal["name", "shape"]


@dataclass(frozen=True)
class Parts:
    """Graphs of one model by the names of its parts."""

    graphs: Mapping[str, Graph]

    @property
    def links(self) -> list[Link]:
        """Outputs and inputs of floats that belong together: of one name and type and of shapes that fit; else of
        shapes that fit each other and no other's."""
        named = [link for link in self._fitting("name") if self._names(link)]
        taken = {(link.target, link.input) for link in named}
        given = {(link.source, link.output) for link in named}
        free = [
            link
            for link in self._fitting("shape")
            if (link.target, link.input) not in taken and (link.source, link.output) not in given
        ]
        ins, outs = (
            [(link.target, link.input) for link in free],
            [(link.source, link.output) for link in free],
        )
        alone = [
            link
            for link, i, o in zip(free, ins, outs, strict=True)
            if ins.count(i) == 1 and outs.count(o) == 1
        ]
        return named + alone

    def _fitting(self, by: Literal["name", "shape"]) -> Iterator[Link]:
        for target, graph in self.graphs.items():
            for index, value in enumerate(graph.inputs):
                for source, other in self.graphs.items():
                    for place, out in enumerate(other.outputs):
                        if source != target and fits(out, value):
                            yield Link(source, place, target, index, by)

    def _names(self, link: Link) -> bool:
        return self.output_name(link) == self.input_name(link)

    def output_name(self, link: Link) -> str:
        return self.graphs[link.source].output_names[link.output]

    def input_name(self, link: Link) -> str:
        return self.graphs[link.target].input_names[link.input]

    def sentence(self, link: Link) -> str:
        """What goes where, and how that was told."""
        return (
            f"%{self.output_name(link)} of {link.source} goes into %{self.input_name(link)} of {link.target} "
            f"(they have the same {link.by})"
        )

    def next(self, part: str) -> list[Link]:
        """The links that leave a part."""
        return [link for link in self.links if link.source == part]


@dataclass
class PartsPlan:
    """Which pass runs on which part, and what the caller has to know of it."""

    passes: dict[str, Pass] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def fits(out: Value, into: Value) -> bool:
    """May `out` be what an input takes? Floats of one type, two axes or more, the last of one length, and no other
    axis of two different lengths."""
    if not is_float(into) or out.dtype != into.dtype or out.shape is None or into.shape is None:
        return False
    if len(out.shape) != len(into.shape) or len(out.shape) < 2 or out.shape[-1] != into.shape[-1]:
        return False
    if not isinstance(out.shape[-1], int):
        return False
    pairs = zip(out.shape, into.shape)
    return all(a == b or not isinstance(a, int) or not isinstance(b, int) for a, b in pairs)
