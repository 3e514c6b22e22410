"""Inserting ops one behind the other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from .ir.graph import Dim, Graph, Op, Value


class Writer:
    """Inserts one thing after another; `cursor` is the op behind which the next goes (None: before every op)."""

    def __init__(self, graph: Graph, cursor: Op | None = None) -> None:
        self.graph = graph
        self.cursor = cursor

    @classmethod
    def behind(cls, graph: Graph, values: Iterable[Value | None], *ops: Op | None) -> Writer:
        """A writer right behind the last of `ops` and of what makes `values`."""
        return cls(graph, last_of(graph, values, *ops))

    def __call__(self, op: str, inputs: list[Value | None], **attrs: Any) -> list[Value]:
        """An op of the dialect; its outputs."""
        return self.done(self.graph.insert(op, inputs, attrs, after=self.cursor))

    def plain(self, kind: str, *inputs: Value, **attrs: Any) -> Value:
        """One of the host's own ops: see `Graph.insert_plain`."""
        return self.done([self.graph.insert_plain(kind, inputs, attrs, after=self.cursor)])[0]

    def shaped(self, kind: str, x: Value, shape: list[Dim]) -> Value:
        """`x` reshaped or expanded to `shape`; itself where it has it."""
        if x.shape is not None and tuple(x.shape) == tuple(shape):
            return x
        return self.plain(kind, x, shape=shape)

    def filled(self, array: np.ndarray, name: str, shape: list[Dim]) -> Value:
        """A constant as large as `shape`."""
        return self.shaped("expand", self.graph.insert_constant(array, name), shape)

    def repeat(self, op: Op, inputs: list[Value | None]) -> list[Value]:
        """`op` once more over other operands: see `Graph.repeat`."""
        return self.done(self.graph.repeat(op, inputs, after=self.cursor))

    def done(self, made: list[Value]) -> list[Value]:
        """`made` by an op at the cursor: the next goes behind it."""
        self.cursor = made[0].producer
        return made


def last_of(graph: Graph, values: Iterable[Value | None], *ops: Op | None) -> Op | None:
    """The last of `ops` and of what makes `values`; None for none."""
    found = [v.producer for v in values if v is not None and v.producer is not None] + [o for o in ops if o]
    places = {op: index for index, op in enumerate(graph.ops)}
    return max(found, key=places.__getitem__, default=None)
