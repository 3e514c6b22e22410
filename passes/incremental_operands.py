"""Operands of an attention in the form in which caches hold them: heads apart, one of each."""

from __future__ import annotations

from math import gcd

import numpy as np

from .errors import Refused
from .incremental_heads import first_of_each, spread
from .incremental_scores import Attention
from .ir.graph import Dim, Graph, Op, Value, product
from .writer import Writer


class Inserter(Writer):
    """Inserts operands one after another."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self._constants: dict[object, Value] = {}

    def operands(self, attention: Attention) -> tuple[Value, Value, Value]:
        """q [1, H, M, D], k [1, Hk, M, D] and v [1, Hk, M, E] as they are in the graph now, where Hk divides H. Raises
        Refused where heads are shared in another way."""
        op = attention.op
        q, k, v = self._current(attention)
        heads = self._heads(q, op)
        if attention.turned:
            k = self._turned(k)
        for value in (k, v):
            # A key head serves neighbouring query heads: only the last of the leading axes may be shared.
            if value.rank != q.rank or value.shape is None or value.shape[:-3] != (q.shape or ())[:-3]:
                raise Refused(f"{op.target} (%{op.name}) broadcasts the heads of %{value.name} {value.shape}")
        k, v = self._shared(k, v)
        q = self._four(q, heads)
        k, v = (self._four(x, self._heads(x, op)) for x in (k, v))
        assert k.shape is not None and v.shape is not None
        if k.shape[1] != v.shape[1] or heads % int(k.shape[1]):
            raise Refused(
                f"{op.target} (%{op.name}) has {heads} query heads for {k.shape[1]} and {v.shape[1]}"
            )
        return q, k, v

    def _constant(self, array: np.ndarray, name: str) -> Value:
        key = (array.shape, array.dtype.name, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.graph.insert_constant(np.ascontiguousarray(array), name)
        return self._constants[key]

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
        return value if value.shape == shape else self.plain("reshape", value, shape=shape)

    def _turned(self, value: Value) -> Value:
        """[.., d, m] as [.., m, d]."""
        op, count = value.producer, value.rank
        perm = (*range(count - 2), count - 1, count - 2)
        if op is not None and op.kind == "transpose" and tuple(op.attrs["perm"]) == perm:
            source = op.inputs[0]
            assert source is not None
            return source
        return self.plain("transpose", value, perm=perm)

    def _shared(self, k: Value, v: Value) -> tuple[Value, Value]:
        """Keys and values without the repetition that gives every query head its own."""
        first, second = first_of_each(k), first_of_each(v)
        if first is not None and second is not None and _leading(first) == _leading(second):
            return first, second
        group = gcd(spread(k), spread(v))
        if group == 1 or k.shape is None or k.rank != 4 or _leading(k) != _leading(v):
            return k, v
        picked = self._constant(np.arange(0, int(k.shape[1]), group), "shared_heads")
        return self.plain("gather", k, picked, axis=1), self.plain("gather", v, picked, axis=1)


def _leading(value: Value) -> Dim:
    assert value.shape is not None
    return product(value.shape[:-2])
