"""The graph of new rows: tables read by position, cached attentions, inputs and outputs. Edits a graph by its plan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import sympy

from .incremental_operands import Inserter
from .incremental_plan import Plan
from .incremental_scores import Attention
from .incremental_tables import Tables
from .ir.graph import Graph, Value

ROWS_IN = ("input_ids", "position_ids", "slots", "prefix", "ancestors")


class Builder(Inserter):
    """Edits the graph of a plan."""

    def __init__(self, graph: Graph, plan: Plan, tables: Tables, capacity: int) -> None:
        super().__init__(graph)
        self.plan = plan
        self.tables = tables
        self.capacity = capacity
        self.length = plan.bindings.length
        self.caches: list[Value] = []
        self.written: list[Value] = []
        self.statistics = {"cached attentions": 0, "position tables": 0, "cross inputs": len(plan.cuts)}

    def build(self, ids: Value, outputs: Sequence[tuple[str, int]]) -> None:
        """Edit the graph, and give it its new signature. `outputs`: names and indices of those that stay."""
        graph = self.graph
        rows: list[Value] = [ids]
        for name, dtype, shape in (
            ("position_ids", "int64", (1, self.length)),
            ("slots", "int32", (self.length,)),
            ("prefix", "int32", (self.length, 2)),
            ("ancestors", "int32", (self.length, "ancestors")),
        ):
            rows.append(graph.add_input(name, dtype, shape))
        crosses = self._cross_inputs()
        self._read_tables(rows[1])
        for value, array in self.tables.fixed.items():
            graph.replace_uses(value, graph.insert_constant(array, value.name))
        for number, attention in enumerate(self.plan.attentions):
            self._cache(number, attention, rows[2:])
        for op in graph.ops:
            if any(
                not isinstance(d, int) and d.has(sympy.Min) for out in op.outputs for d in out.shape or ()
            ):
                graph.refresh(op)  # behind a slice of a learned table: as many as there are tokens, now
        names = [f"{what}_cache.{i}" for i in range(len(self.plan.attentions)) for what in ("key", "value")]
        graph.set_signature(
            [*zip(ROWS_IN, rows), *zip(names, self.caches), *crosses],
            [
                *((name, graph.outputs[index]) for name, index in outputs),
                *((f"{name}.out", value) for name, value in zip(names, self.written)),
            ],
        )

    # ---- positions and sources -----------------------------------------------------------------------
    def _cross_inputs(self) -> list[tuple[str, Value]]:
        found = []
        if not self.plan.prelude:
            return [(value.name, value) for value in self.plan.cuts]
        for number, value in enumerate(self.plan.cuts):
            assert value.shape is not None
            name = f"cross.{number}"
            made = self.graph.add_input(name, value.dtype, value.shape)
            self.graph.replace_uses(value, made)
            found.append((name, made))
        return found

    def _read_tables(self, positions: Value) -> None:
        flat = self.plain("reshape", positions, shape=(self.length,))
        for value, table in self.tables.rows.items():
            axis = self.plan.tables[value]
            shape = tuple(self.length if self.plan.one_each(dim) else dim for dim in value.shape or ())
            if table.dtype == np.int64 and np.array_equal(table.reshape(-1), np.arange(table.size)):
                made = positions if shape == positions.shape else self.plain("reshape", flat, shape=shape)
            elif (table == np.take(table, [0], axis)).all():  # the same at every position
                stored = self._constant(np.take(table, [0], axis), f"{value.name}_row")
                made = self.plain("expand", stored, shape=shape)
            else:
                stored = self._constant(table, f"{value.name}_table")
                made = self.plain("gather", stored, flat, axis=axis)
                self.statistics["position tables"] += 1
            self.graph.replace_uses(value, made)

    # ---- attention -----------------------------------------------------------------------------------
    def _cache(self, number: int, attention: Attention, rows: Sequence[Value]) -> None:
        op, rule = attention.op, self.tables.rules[number]
        self.cursor = op
        q, k, v = self.operands(attention)
        assert op.output.shape is not None
        for what, value in (("key", k), ("value", v)):
            assert value.shape is not None
            shape = (value.shape[1], self.capacity, value.shape[3])
            self.caches.append(self.graph.add_input(f"{what}_cache.{number}", value.dtype, shape))
        bias = None
        if rule.bias is not None:
            bias = self._constant(rule.bias, f"{op.name}_bias")
        attrs = {
            "scale": attention.scale,
            "softcap": attention.softcap,
            "window": rule.window,
            "key_bias": rule.by_key,
        }
        inputs = [q, k, v, *self.caches[-2:], *rows, bias]
        out, keys, values = self("cached_attention", inputs, **attrs)
        self.written += [keys, values]
        if out.shape != op.output.shape:
            out = self.plain("reshape", out, shape=op.output.shape)
        self.graph.replace_uses(op.output, out)
        self.statistics["cached attentions"] += 1
