"""Putting quantized products and tables into a graph of either host."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import Refused
from .formats.layout import Quantized
from .ir.graph import Graph, Op, Value
from .quantize_find import EMBEDDING, Target


class Emitter:
    """Replaces targets one by one. Arrays that several of them share are stored once."""

    def __init__(self, graph: Graph, form: str = "auto") -> None:
        if form == "matmulnbits" and graph.host != "onnx":
            raise Refused(
                "quantize: form matmulnbits is an operator of ONNX Runtime, and this graph is of torch"
            )
        self.graph = graph
        self.form = form
        self._constants: dict[int, tuple[np.ndarray, Value]] = {}

    def emit(self, target: Target, made: Quantized | np.ndarray) -> None:
        """Let `made` take the place of the target's weight."""
        if target.role == EMBEDDING:
            if isinstance(made, Quantized):
                self._table(target, made)
        elif isinstance(made, Quantized):
            self._product(target, made)
        else:
            emit_rows(self.graph, target, self.constant(made, f"{target.name}.rows"))

    def constant(self, array: np.ndarray, name: str) -> Value:
        """The graph's constant of this very array."""
        known = self._constants.get(id(array))
        if known is None:
            known = self._constants[id(array)] = array, self.graph.insert_constant(array, name)
        return known[1]

    def _parts(self, target: Target, made: Quantized) -> tuple[Value, Value, Value | None]:
        name = target.name
        zeros = None if made.zeros is None else self.constant(made.zeros, f"{name}.zeros")
        return (
            self.constant(made.weight, f"{name}.bits"),
            self.constant(made.scales, f"{name}.scales"),
            zeros,
        )

    def _product(self, target: Target, made: Quantized) -> None:
        x, after = target.x, target.op
        if made.order is not None:
            order = self.constant(made.order, f"{target.name}.order")
            x = self.graph.insert_plain("gather", [x, order], {"axis": x.rank - 1}, after=after)
            after = producer(x)
        bias = bias_value(self.graph, target)
        after = last(self.graph, after, bias)
        if self.form == "matmulnbits":
            from .onnx.matmulnbits import insert_matmulnbits

            weight = self.constant(made.weight, f"{target.name}.bits")
            new = insert_matmulnbits(self.graph, made, x, weight, bias, after)
        else:
            weight, scales, zeros = self._parts(target, made)
            attrs = {"bits": made.bits, "group": made.group}
            new = self.graph.insert("linear_nbits", [x, weight, scales, zeros, bias], attrs, after=after)[0]
        self.graph.replace_uses(target.result, new)

    def _table(self, target: Target, made: Quantized) -> None:
        if made.order is not None:
            raise Refused(f"quantize: the columns of table %{target.name} are not in their own order")
        attrs: dict[str, Any] = {"bits": made.bits, "group": made.group, "width": made.width}
        attrs["dtype"] = target.result.dtype
        inputs = [target.x, *self._parts(target, made)]
        new = self.graph.insert("embedding_nbits", inputs, attrs, after=target.op)[0]
        self.graph.replace_uses(target.result, new)


def emit_rows(graph: Graph, target: Target, weight: Value) -> None:
    """The product as `linear_rows` over weight [N, K]."""
    bias = bias_value(graph, target)
    after = last(graph, target.op, bias)
    new = graph.insert("linear_rows", [target.x, weight, bias], {}, after=after)[0]
    graph.replace_uses(target.result, new)


def bias_value(graph: Graph, target: Target) -> Value | None:
    """The bias as float32 [N]."""
    if target.bias is None or isinstance(target.bias, Value):
        return target.bias
    return graph.insert_constant(target.bias.astype(np.float32), f"{target.name}.bias")


def producer(value: Value) -> Op:
    assert value.producer is not None
    return value.producer


def last(graph: Graph, op: Op, value: Value | None) -> Op:
    """The later one of an op and what makes a value."""
    if value is None or value.producer is None:
        return op
    return max(op, value.producer, key=graph.ops.index)
