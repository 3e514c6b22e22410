"""Small edits of an onnx-ir graph with its shapes kept up to date: the vocabulary of the normalising rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..ir.graph import Shape
from ..ir.onnx_names import unique_in
from ..ir.onnx_shapes import ShapeEnv, constant_tensor, tensor_shape


class Declined(Exception):
    """Why a rule leaves a node as it is."""


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """Operand `index`, None where it is absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def used(node: ir.Node, index: int) -> bool:
    """Whether output `index` exists and anything reads it."""
    if index >= len(node.outputs):
        return False
    out = node.outputs[index]
    return bool(out.uses()) or out.is_graph_output()


class Editor:
    """A model, its shapes, and what the rules found on the way."""

    def __init__(self, model: ir.Model, env: ShapeEnv) -> None:
        self.model = model
        self.env = env
        self.counts: dict[str, int] = {}
        self.near_misses: list[str] = []
        values = [*model.graph.inputs, *model.graph.initializers.values()]
        for node in model.graph:
            values += node.outputs
        self._names = {v.name for v in values if v.name is not None}
        self._node_names = {node.name for node in model.graph if node.name is not None}

    @property
    def graph(self) -> ir.Graph:
        return self.model.graph

    # ---- reading -------------------------------------------------------------------------------------
    def shape(self, value: ir.Value | None) -> Shape | None:
        return self.env.shape(value)

    def made_by(self, value: ir.Value | None, *op_types: str, domain: str = "") -> ir.Node | None:
        """The node that makes `value`, if it is one of `op_types`."""
        node = None if value is None else value.producer()
        return node if node is not None and node.op_type in op_types and node.domain == domain else None

    def number(self, value: ir.Value | None) -> float | None:
        """The one element of a constant, whatever its rank."""
        tensor = constant_tensor(value)
        if tensor is None or tensor.size != 1:
            return None
        array = tensor.numpy()
        return (
            float(array.reshape(-1)[0])
            if array.dtype.kind in "fiub" or array.dtype.name == "bfloat16"
            else None
        )

    def array(self, value: ir.Value | None) -> np.ndarray | None:
        tensor = constant_tensor(value)
        return None if tensor is None else tensor.numpy()

    def is_constant(self, value: ir.Value | None) -> bool:
        return constant_tensor(value) is not None

    def used_once(self, value: ir.Value) -> bool:
        return len(value.uses()) == 1 and not value.is_graph_output()

    def user(self, value: ir.Value, *op_types: str) -> ir.Node | None:
        """The only user of `value`, if it is one of `op_types`."""
        if not self.used_once(value):
            return None
        node = next(iter(value.uses())).node
        return node if node.op_type in op_types and node.domain == "" else None

    def split_constant(self, node: ir.Node) -> tuple[ir.Value, float] | None:
        """(x, c) of a two-operand node of which one operand is a one-element constant."""
        a, b = node.inputs[0], node.inputs[1]
        if a is None or b is None:
            return None
        number = self.number(b)
        if number is not None:
            return a, number
        number = self.number(a)
        return None if number is None else (b, number)

    def label(self, node: ir.Node) -> str:
        return f"{node.op_type} '{node.name or node.outputs[0].name}'"

    # ---- writing -------------------------------------------------------------------------------------
    def unique(self, base: str) -> str:
        return unique_in(self._names, base)

    def node_name(self, base: str) -> str:
        """A name that no node has yet: onnxruntime wants them unique too."""
        return unique_in(self._node_names, base)

    def emit(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attrs: dict[str, Any] | None = None,
        *,
        before: ir.Node,
        domain: str = "",
        name: str | None = None,
        outputs: int = 1,
    ) -> ir.Value:
        """Insert a node in front of `before`; returns its first output."""
        base = name or before.name or before.outputs[0].name or "normalised"
        node = ir.node(op_type, inputs, attrs or None, domain=domain, num_outputs=outputs)
        node.name = self.node_name(f"{base}/{op_type}")
        for out in node.outputs:
            out.name = self.unique(f"{base}_{op_type}")
        self.graph.insert_before(before, node)
        self.env.update(node)
        return node.outputs[0]

    def adopt(self, node: ir.Node, *, before: ir.Node) -> ir.Value:
        """Put a node that was made elsewhere, nameless, in front of `before`; returns its first output."""
        base = before.name or before.outputs[0].name or "lowered"
        node.name = self.node_name(f"{base}/{node.op_type}")
        for out in node.outputs:
            out.name = self.unique(f"{base}_{node.op_type}")
        self.graph.insert_before(before, node)
        self.env.update(node)
        return node.outputs[0]

    def constant(self, array: np.ndarray, name: str = "constant") -> ir.Value:
        unique = self.unique(name)
        tensor = ir.tensor(np.asarray(array, order="C"), name=unique)
        value = ir.Value(
            name=unique,
            shape=ir.Shape(tensor_shape(tensor)),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def like(self, number: float, other: ir.Value, name: str = "scalar") -> ir.Value:
        """A scalar constant of `other`'s element type."""
        dtype = (other.dtype or ir.DataType.FLOAT).numpy()
        return self.constant(np.asarray(number).astype(dtype), name)

    def ints(self, values: Sequence[int], name: str = "shape") -> ir.Value:
        return self.constant(np.asarray(values, np.int64), name)

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let every use of `old`, graph outputs included, be `new`; an output keeps its name."""
        if old.is_graph_output():
            if new.is_graph_input() or new.is_initializer() or new.is_graph_output():
                node = ir.node("Identity", [new])
                producer = old.producer()
                assert producer is not None
                self.graph.insert_after(producer, node)
                self.env.update(node)
                new = node.outputs[0]
            name = old.name
            old.name = self.unique(f"{name}_before")
            new.name = name
        old.replace_all_uses_with(new, replace_graph_outputs=True)

    def count(self, rule: str) -> None:
        self.count_many(rule, 1)

    def count_many(self, rule: str, times: int) -> None:
        self.counts[rule] = self.counts.get(rule, 0) + times

    def sweep(self) -> None:
        """Remove nodes and constants that nothing uses."""
        for node in reversed(self.graph):
            if not any(out.uses() or out.is_graph_output() for out in node.outputs):
                self.graph.remove(node, safe=True)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]
