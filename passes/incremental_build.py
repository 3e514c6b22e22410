"""The graph of new rows: tables read by position, cached attentions, inputs and outputs. Edits a graph by its plan."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import numpy as np

from .errors import Refused
from .incremental_heads import first_of_each, spread
from .incremental_plan import Plan
from .incremental_scores import Attention
from .incremental_tables import Tables
from .ir.graph import Dim, Graph, Op, Value, product

ROWS_IN = ("input_ids", "position_ids", "slots", "prefix", "ancestors")


class Builder:
    """Inserts one thing after another; `cursor` is the op behind which the next goes."""

    def __init__(self, graph: Graph, plan: Plan, tables: Tables, capacity: int) -> None:
        self.graph = graph
        self.plan = plan
        self.tables = tables
        self.capacity = capacity
        self.length = plan.bindings.length
        self.cursor: Op | None = None
        self.caches: list[Value] = []
        self.written: list[Value] = []
        self.statistics = {"cached attentions": 0, "position tables": 0, "cross inputs": len(plan.cuts)}
        self._constants: dict[object, Value] = {}

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
        for number, value in enumerate(self.plan.cuts):
            assert value.shape is not None
            name = f"cross.{number}"
            made = self.graph.add_input(name, value.dtype, value.shape)
            self.graph.replace_uses(value, made)
            found.append((name, made))
        return found

    def _read_tables(self, positions: Value) -> None:
        flat = self._plain("reshape", positions, shape=(self.length,))
        for value, table in self.tables.rows.items():
            axis = self.plan.tables[value]
            if table.dtype == np.int64 and np.array_equal(table.reshape(-1), np.arange(self.capacity)):
                shape = value.shape
                assert shape is not None
                made = positions if shape == positions.shape else self._plain("reshape", flat, shape=shape)
            elif (table == np.take(table, [0], axis)).all():  # the same at every position
                stored = self._constant(np.take(table, [0], axis), f"{value.name}_row")
                made = self._plain("expand", stored, shape=value.shape)
            else:
                stored = self._constant(table, f"{value.name}_table")
                made = self.graph.insert_plain("gather", [stored, flat], {"axis": axis}, after=self.cursor)
                self.cursor = made.producer
                self.statistics["position tables"] += 1
            self.graph.replace_uses(value, made)

    def _constant(self, array: np.ndarray, name: str) -> Value:
        key = (array.shape, array.dtype.name, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.graph.insert_constant(np.ascontiguousarray(array), name)
        return self._constants[key]

    def _plain(self, kind: str, value: Value, **attrs: object) -> Value:
        made = self.graph.insert_plain(kind, [value], dict(attrs), after=self.cursor)
        self.cursor = made.producer
        return made

    # ---- attention -----------------------------------------------------------------------------------
    def _cache(self, number: int, attention: Attention, rows: Sequence[Value]) -> None:
        op, rule = attention.op, self.tables.rules[number]
        q, k, v = self._current(attention)
        heads = self._heads(q, op)
        self.cursor = op
        if attention.turned:
            k = self._turned(k)
        for value in (k, v):
            # A key head serves neighbouring query heads: only the last of the leading axes may be shared.
            if value.rank != q.rank or value.shape is None or value.shape[:-3] != (q.shape or ())[:-3]:
                raise Refused(f"{op.target} (%{op.name}) broadcasts the heads of %{value.name} {value.shape}")
        k, v = self._shared(k, v)
        q = self._four(q, heads)
        k, v = (self._four(x, self._heads(x, op)) for x in (k, v))
        assert k.shape is not None and v.shape is not None and op.output.shape is not None
        if k.shape[1] != v.shape[1] or heads % int(k.shape[1]):
            raise Refused(
                f"{op.target} (%{op.name}) has {heads} query heads for {k.shape[1]} and {v.shape[1]}"
            )
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
        out, keys, values = self.graph.insert(
            "cached_attention", [q, k, v, *self.caches[-2:], *rows, bias], attrs, after=self.cursor
        )
        self.cursor = out.producer
        self.written += [keys, values]
        if out.shape != op.output.shape:
            out = self._plain("reshape", out, shape=op.output.shape)
        self.graph.replace_uses(op.output, out)
        self.statistics["cached attentions"] += 1

    def _current(self, attention: Attention) -> tuple[Value, Value, Value]:
        """The operands as they are now: tables, sources and earlier attentions have been replaced."""
        first, last = attention.inner[0], attention.op
        if first is last:
            q, k, v = last.inputs[:3]
        else:
            (q, k), v = first.inputs[:2], last.inputs[1]
        assert q is not None and k is not None and v is not None
        return q, k, v

    def _heads(self, value: Value, op: Op) -> int:
        assert value.shape is not None
        heads = product(value.shape[:-2])
        if not isinstance(heads, int):
            raise Refused(f"{op.target} (%{op.name}) has {heads} heads in %{value.name}")
        return heads

    def _four(self, value: Value, heads: int) -> Value:
        assert value.shape is not None
        shape: tuple[Dim, ...] = (1, heads, *value.shape[-2:])
        return value if value.shape == shape else self._plain("reshape", value, shape=shape)

    def _turned(self, value: Value) -> Value:
        """[.., d, m] as [.., m, d]."""
        op, count = value.producer, value.rank
        perm = (*range(count - 2), count - 1, count - 2)
        if op is not None and op.kind == "transpose" and tuple(op.attrs["perm"]) == perm:
            source = op.inputs[0]
            assert source is not None
            return source
        return self._plain("transpose", value, perm=perm)

    def _shared(self, k: Value, v: Value) -> tuple[Value, Value]:
        """Keys and values without the repetition that gives every query head its own."""
        first, second = first_of_each(k), first_of_each(v)
        if first is not None and second is not None and _leading(first) == _leading(second):
            return first, second
        group = gcd(spread(k), spread(v))
        if group == 1 or k.shape is None or k.rank != 4 or _leading(k) != _leading(v):
            return k, v
        picked = self._constant(np.arange(0, int(k.shape[1]), group), "shared_heads")
        made = []
        for value in (k, v):
            one = self.graph.insert_plain("gather", [value, picked], {"axis": 1}, after=self.cursor)
            self.cursor = one.producer
            made.append(one)
        return made[0], made[1]


def _leading(value: Value) -> Dim:
    assert value.shape is not None
    return product(value.shape[:-2])
