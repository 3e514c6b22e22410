"""The graph view over an `onnx_ir.Model`.

Reading: every node but Constant becomes an `Op` of a canonical kind (`onnx_kinds.py`), every tensor a `Value`
with symbolic lengths (`onnx_shapes.py`). Editing changes model and view together, one node at a time, so
that a graph of thousands of operations stays cheap to edit. `docs/ir.md` has the table of kinds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy

from ..errors import Refused
from . import onnx_check, onnx_dialect, onnx_lengths, onnx_state, onnx_text
from .graph import Dim, Graph, Op, Value
from .onnx_kinds import classify
from .onnx_names import unique_in
from .onnx_run import captured
from .onnx_shapes import ShapeEnv, constant_tensor, numpy_dtype, tensor_shape


class OnnxGraph(Graph):
    """A mutable view of `model`; `model` is always in step with it."""

    host = "onnx"

    def __init__(self, model: ir.Model, *, env: ShapeEnv | None = None) -> None:
        self.model = model
        self.env = ShapeEnv(model).run() if env is None else env
        self.ops: list[Op] = []
        self._values: dict[ir.Value, Value] = {}
        self._by_node: dict[ir.Node, Op] = {}
        self._slots: dict[Op, list[int]] = {}  # where op.inputs[i] stands among the node's inputs
        self.names = {v.name for v in self.raw_values()} | {n.name for n in model.graph}
        self.names.discard(None)
        self.lengths: dict[
            str, sympy.Expr
        ] = {}  # the symbols of inputs that were added, by the names asked for
        self.inputs = [self._value(v) for v in model.graph.inputs if v.name not in model.graph.initializers]
        for node in model.graph:
            if not is_constant_node(node):
                op = self._describe(node)
                self.ops.append(op)
        self.outputs = [self._value(v) for v in model.graph.outputs]

    # ---- building the view ---------------------------------------------------------------------------
    def raw_values(self) -> list[ir.Value]:
        graph = self.model.graph
        found = [*graph.inputs, *graph.initializers.values()]
        for node in graph:
            found += node.outputs
        return found

    def _value(self, raw: ir.Value) -> Value:
        """The view's value of an onnx-ir value, made on first sight."""
        value = self._values.get(raw)
        if value is None:
            tensor = constant_tensor(raw)
            if tensor is not None:
                # Learned weights and literal constants look the same in ONNX: floats with an axis are weights.
                floating = tensor.dtype.is_floating_point() and len(tensor.shape) > 0
                origin = "parameter" if floating else "constant"
            else:
                origin = "input" if raw.producer() is None else "op"
            value = Value(raw.name or "", self.env.shape(raw), numpy_dtype(raw.dtype), origin=origin, raw=raw)
            self._values[raw] = value
        else:
            value.shape, value.dtype = self.env.shape(raw), numpy_dtype(raw.dtype)
        return value

    def _describe(self, node: ir.Node) -> Op:
        """Make the op of a node, or bring it up to date, users included."""
        facts = classify(self.env, node)
        op = self._by_node.get(node)
        if op is None:
            target = target_of(node)
            op = Op(facts.kind, target, node.name or node.outputs[0].name or "", [], [], raw=node)
            self._by_node[node] = op
        for value in op.inputs:
            if value is not None:
                value.users = [(user, i) for user, i in value.users if user is not op]
        raws = [node.inputs[i] if i < len(node.inputs) else None for i in facts.operands]
        while raws and raws[-1] is None:  # an absent operand at the end
            raws.pop()
        op.kind, op.attrs = facts.kind, facts.attrs
        op.inputs = [None if r is None else self._value(r) for r in raws]
        op.shape_inputs = [
            self._value(r) for r in (node.inputs[i] for i in facts.shape_operands) if r is not None
        ]
        op.inputs += [self._value(r) for r in captured(node)]
        op.outputs = [self._value(out) for out in node.outputs]
        for index, value in enumerate(op.outputs):
            value.producer, value.index = op, index
        for index, value in enumerate(op.inputs):
            if value is not None:
                value.users.append((op, index))
        self._slots[op] = facts.operands
        return op

    def unique_name(self, base: str) -> str:
        """A name that no value or node of the graph has yet."""
        return unique_in(self.names, base)

    def op_of(self, node: ir.Node) -> Op:
        return self._by_node[node]

    def value_of(self, raw: ir.Value) -> Value:
        return self._value(raw)

    # ---- reading -------------------------------------------------------------------------------------
    def constant_value(self, value: Value) -> np.ndarray | None:
        tensor = constant_tensor(value.raw)
        return None if tensor is None else tensor.numpy()

    def text(self) -> list[str]:
        lines = [f"input {v!r}" for v in self.inputs]
        lines += [onnx_text.line(op) for op in self.ops]
        return lines + [f"output {v!r}" for v in self.outputs]

    def copy(self) -> OnnxGraph:
        clone = self.model.clone()
        env = ShapeEnv(clone)
        env.trust_declared = self.env.trust_declared
        pairs = [*zip(self.model.graph.inputs, clone.graph.inputs)]
        for mine, theirs in zip(self.model.graph, clone.graph):
            pairs += zip(mine.outputs, theirs.outputs)
        for mine, theirs in pairs:
            if mine in self.env.shapes:
                env.shapes[theirs] = self.env.shapes[mine]
            if mine in self.env.data:
                env.data[theirs] = self.env.data[mine]
        graph = OnnxGraph(clone, env=env)
        graph.lengths.update(self.lengths)
        return graph

    def verify(self) -> None:
        """Structure, shapes and dtypes; raises VerificationError."""
        onnx_check.verify(self)

    # ---- editing -------------------------------------------------------------------------------------
    def insert(
        self,
        op: str,
        inputs: Sequence[Value | None],
        attrs: dict[str, Any] | None = None,
        *,
        after: Op | None,
    ) -> list[Value]:
        raws = [None if v is None else v.raw for v in inputs]
        return self._place(onnx_dialect.make_node(self.model, op, raws, attrs or {}), after, None)

    def insert_node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attrs: dict[str, Any] | None = None,
        *,
        after: Op | None,
        domain: str = "",
        num_outputs: int = 1,
        names: Sequence[str] | None = None,
    ) -> list[Value]:
        """Insert any ONNX node after `after`; the host's own way, for helpers of this adapter."""
        node = ir.node(op_type, inputs, attrs or None, domain=domain, num_outputs=num_outputs)
        return self._place(node, after, names)

    def repeat(self, op: Op, inputs: Sequence[Value | None], *, after: Op | None) -> list[Value]:
        old: ir.Node = op.raw
        raws = list(old.inputs)
        for slot, value in zip(self._slots[op], inputs):
            if slot < len(raws):
                raws[slot] = None if value is None else value.raw
        node = ir.node(
            old.op_type,
            raws,
            domain=old.domain,
            overload=old.overload,
            num_outputs=len(old.outputs),
        )
        for attribute in old.attributes.values():
            node.attributes.add(attribute)
        return self._place(node, after, None)

    def hoist(self, value: Value, after: Op | None) -> Op | None:
        nodes = list(self.model.graph)
        places = {node: index for index, node in enumerate(nodes)}
        now = -1 if after is None else places[after.raw]
        late: set[ir.Node] = set()
        waiting: list[ir.Value] = [value.raw]
        while waiting:
            node = waiting.pop().producer()
            if node is None or places[node] <= now or node in late:
                continue
            late.add(node)
            waiting += [v for v in [*node.inputs, *captured(node)] if v is not None]
        moved = sorted(late, key=places.__getitem__)
        anchor = None if after is None else after.raw
        for node in moved:
            self.model.graph.remove(node)
            if anchor is None:
                self.model.graph.insert_before(nodes[0], node)
            else:
                self.model.graph.insert_after(anchor, node)
            anchor = node
        return self._move([self._by_node[node] for node in moved if node in self._by_node], after)

    def _place(self, node: ir.Node, after: Op | None, names: Sequence[str] | None) -> list[Value]:
        """Put a new node and its op right after `after`, with names for it and its outputs."""
        node.name = self.unique_name(node.op_type)
        for i, out in enumerate(node.outputs):
            base = names[i] if names else f"{node.name}_out" + (f"_{i}" if len(node.outputs) > 1 else "")
            out.name = self.unique_name(base)
        graph = self.model.graph
        if after is not None:
            graph.insert_after(after.raw, node)
            position = self.ops.index(after) + 1
        else:
            # Constant nodes come first: what is inserted may read them.
            first = next((n for n in graph if not is_constant_node(n)), None)
            if first is None:
                graph.append(node)
            else:
                graph.insert_before(first, node)
            position = 0
        self.env.update(node)
        made = self._describe(node)
        self.ops.insert(position, made)
        return made.outputs

    def insert_constant(self, array: np.ndarray, name: str) -> Value:
        unique = self.unique_name(name)
        tensor = ir.tensor(np.asarray(array, order="C"), name=unique)
        raw = ir.Value(
            name=unique,
            shape=ir.Shape(tensor_shape(tensor)),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.model.graph.register_initializer(raw)
        return self._value(raw)

    def set_operand(self, op: Op, index: int, value: Value) -> None:
        slots = self._slots[op]
        if index >= len(slots):
            what = "reads it from inside a body" if index < len(op.inputs) else f"has no operand {index}"
            raise Refused(f"{op.target} '{op.name}' {what}")
        node: ir.Node = op.raw
        slot = slots[index]
        if slot >= len(node.inputs):
            node.resize_inputs(slot + 1)
        node.replace_input_with(slot, value.raw)
        self._describe(node)

    def replace_output(self, index: int, value: Value) -> None:
        graph = self.model.graph
        old = graph.outputs[index]
        if old is value.raw:
            return
        name = old.name or f"output_{index}"
        raw: ir.Value = value.raw
        if raw.producer() is None or raw.is_graph_output() or is_constant_node(raw.producer()):
            after = value.producer or (self.ops[-1] if self.ops else None)
            raw = self.insert_node("Identity", [raw], after=after)[0].raw
        graph.outputs[index] = raw
        if old not in graph.outputs:
            self.rename(old, self.unique_name(f"{name}_before"))
            self.names.discard(name)
            self.rename(raw, name)
        self.outputs[index] = self._value(raw)

    def rename(self, raw: ir.Value, name: str) -> None:
        raw.name = name
        self.names.add(name)
        if raw in self._values:
            self._values[raw].name = name

    def set_length(self, op: Op, axis: int, like: Value, like_axis: int) -> None:
        onnx_lengths.set_length(self, op, axis, like, like_axis)
        self.refresh(op)

    def set_shape_operand(self, op: Op, slot: int, raw: ir.Value) -> None:
        """Let the node's input `slot`, one that only says a shape, be `raw`."""
        op.raw.replace_input_with(slot, raw)

    def refresh(self, op: Op) -> None:
        self.env.trust_declared = False
        self.env.update(op.raw)
        self._describe(op.raw)

    def add_output(self, value: Value, name: str) -> None:
        if name in self.names and value.name != name:
            raise Refused(f"the graph already has a value named '{name}'")
        raw: ir.Value = value.raw
        if raw.name != name or raw.is_graph_output() or raw.producer() is None:
            after = value.producer or (self.ops[-1] if self.ops else None)
            raw = self.insert_node("Identity", [raw], after=after, names=[name])[0].raw
        self.model.graph.outputs.append(raw)
        self.outputs.append(self._value(raw))

    # ---- inputs and outputs --------------------------------------------------------------------------
    def evaluate(self, values: Sequence[Value], feeds: Mapping[Value, np.ndarray]) -> list[np.ndarray]:
        return onnx_state.evaluate(self, values, feeds)

    def add_input(self, name: str, dtype: str, shape: Sequence[Dim | str]) -> Value:
        self.inputs.append(self._value(onnx_state.add_input(self, name, dtype, shape)))
        return self.inputs[-1]

    def insert_plain(
        self, kind: str, inputs: Sequence[Value], attrs: dict[str, Any], *, after: Op | None
    ) -> Value:
        return onnx_state.insert_plain(self, kind, inputs, attrs, after)

    def set_signature(
        self, inputs: Sequence[tuple[str, Value]], outputs: Sequence[tuple[str, Value]]
    ) -> None:
        onnx_state.set_signature(self, inputs, outputs)

    def fix_length(self, value: Value, axis: int, length: int) -> None:
        self._let_length(value, axis, length)

    def same_length(self, value: Value, axis: int, like: Value, like_axis: int) -> None:
        self._let_length(value, axis, self.env.need(like.raw)[like_axis])

    def _let_length(self, value: Value, axis: int, length: Dim) -> None:
        onnx_state.let_length(self, value.raw, axis, length)
        lengths = self.lengths
        OnnxGraph.__init__(self, self.model, env=self.env)
        self.lengths.update(lengths)

    def replace_uses(self, old: Value, new: Value) -> None:
        for use in list(old.raw.uses()):
            use.node.replace_input_with(use.idx, new.raw)
            if use.node in self._by_node:
                self._describe(use.node)
        super().replace_uses(old, new)

    def remove_dead(self) -> int:
        graph = self.model.graph
        removed = 0
        for op in reversed(self.ops):
            node: ir.Node = op.raw
            if any(out.uses() or out.is_graph_output() for out in node.outputs):
                continue
            for value in op.inputs:
                if value is not None:
                    value.users = [(user, i) for user, i in value.users if user is not op]
            graph.remove(node, safe=True)
            self._forget(op)
            removed += 1
        if removed:
            gone = {id(op) for op in [*self._by_node.values()]}
            self.ops = [op for op in self.ops if id(op) in gone]
        for node in list(graph):
            if is_constant_node(node) and not any(o.uses() or o.is_graph_output() for o in node.outputs):
                for out in node.outputs:
                    self._values.pop(out, None)
                graph.remove(node, safe=True)
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del graph.initializers[name]
                self._values.pop(value, None)
        return removed

    def _forget(self, op: Op) -> None:
        self._by_node.pop(op.raw, None)
        self._slots.pop(op, None)
        for out in op.outputs:
            self._values.pop(out.raw, None)
            self.env.forget(out.raw)
            self.names.discard(out.name)


def is_constant_node(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "Constant" and node.domain in ("", "ai.onnx")


def target_of(node: ir.Node) -> str:
    """The host's own name of what a node does; for a dialect node the op, whichever function says it."""
    if node.domain == onnx_dialect.DOMAIN:
        return f"{node.domain}.{onnx_dialect.op_and_attributes(node)[0]}"
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type
