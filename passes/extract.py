"""A part of a graph as a graph of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .ir.graph import Graph, Value


def part_that_makes(graph: Graph, outputs: Sequence[tuple[str, Value]]) -> Graph:
    """A graph that puts out the values `outputs` of `graph`, by name, and takes those of its inputs that they need, in
    their order. `graph` stays as it is; weights are shared."""
    twin = graph.copy()
    known = {value.name: value for value in [*twin.inputs, *twin.values()]}
    ends = [(name, known[value.name]) for name, value in outputs]
    needed = behind(value for _, value in ends)
    twin.set_signature([(v.name, v) for v in list(twin.inputs) if v in needed], ends)
    return twin


def behind(values: Iterable[Value]) -> set[Value]:
    """`values` and everything they are computed from, lengths too."""
    found: set[Value] = set()
    queue = list(values)
    while queue:
        value = queue.pop()
        if value not in found:
            found.add(value)
            if value.producer is not None:
                queue += [v for v in [*value.producer.inputs, *value.producer.shape_inputs] if v is not None]
    return found
