"""A graph in plain Python for tests of the manager: a handful of numpy operations, every primitive real."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from elision.passes.errors import VerificationError
from elision.passes.ir.graph import Graph, Op, Shape, Value

FUNCTIONS = {
    "add": lambda xs, a: xs[0] + xs[1],
    "mul": lambda xs, a: xs[0] * xs[1],
    "relu": lambda xs, a: np.maximum(xs[0], 0),
    "transpose": lambda xs, a: np.transpose(xs[0], a["perm"]),
    "linear": lambda xs, a: xs[0] @ xs[1],
    "slice": lambda xs, a: np.take(xs[0], np.arange(a["start"], a["end"]), a["axis"]),
    "pad": lambda xs, a: np.pad(xs[0], a["widths"]),
    "attention": lambda xs, a: xs[0] @ np.swapaxes(xs[1], -1, -2) @ xs[2],
}
KINDS = {"add": "elementwise", "mul": "elementwise", "relu": "elementwise", "pad": "spatial"}


class MemoryGraph(Graph):
    """Build with `input`, `constant` and `add`; `calculate` runs it with numpy."""

    host = "memory"

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self.count = 0

    # ---- building ------------------------------------------------------------------------------------
    def input(self, *shape: Any, dtype: str = "float32") -> Value:
        value = Value(f"x{len(self.inputs)}", tuple(shape), dtype, origin="input")
        self.inputs.append(value)
        return value

    def constant(self, array: Any, origin: str = "parameter") -> Value:
        array = np.asarray(array, dtype=np.float32)
        self.count += 1
        return Value(f"c{self.count}", array.shape, "float32", origin=origin, raw=array)

    def add(
        self, target: str, *inputs: Value, shape: Shape | None = None, at: int | None = None, **attrs: Any
    ):
        self.count += 1
        kind = KINDS.get(target, target)
        if kind == "elementwise":
            attrs["fn"] = target
        op = Op(kind, target, f"{target}_{self.count}", list(inputs), [], attrs)
        op.outputs = [Value(f"v{self.count}", shape, inputs[0].dtype, producer=op)]
        self.ops.insert(len(self.ops) if at is None else at, op)
        for index, value in enumerate(inputs):
            value.users.append((op, index))
        if shape is None:
            self.refresh(op)
        return op.output

    def calculate(self, args: Sequence[np.ndarray]) -> list[np.ndarray]:
        values = {id(v): a for v, a in zip(self.inputs, args)}

        def data(value: Value) -> np.ndarray:
            return value.raw if value.origin in ("parameter", "constant") else values[id(value)]

        for op in self.ops:
            values[id(op.output)] = FUNCTIONS[op.target]([data(v) for v in op.inputs], op.attrs)
        return [data(v) for v in self.outputs]

    # ---- the view ------------------------------------------------------------------------------------
    def constant_value(self, value: Value) -> np.ndarray | None:
        return value.raw if self.is_constant(value) else None

    def text(self) -> list[str]:
        lines = [f"{v!r} = input" for v in self.inputs]
        for op in self.ops:
            attrs = ", ".join(f"{k}={v}" for k, v in op.attrs.items() if k != "fn")
            lines.append(repr(op) + (f" {{{attrs}}}" if attrs else ""))
        return [*lines, "return " + ", ".join(f"%{v.name}" for v in self.outputs)]

    def copy(self) -> MemoryGraph:
        twin, values = MemoryGraph(), {}

        def carry(value: Value) -> Value:
            if id(value) not in values:
                values[id(value)] = Value(
                    value.name, value.shape, value.dtype, None, value.index, value.origin, value.raw
                )
            return values[id(value)]

        twin.count, twin.inputs = self.count, [carry(v) for v in self.inputs]
        for op in self.ops:
            inputs = [carry(v) for v in op.inputs]
            new = Op(op.kind, op.target, op.name, inputs, [carry(v) for v in op.outputs], dict(op.attrs))
            new.output.producer = new
            for index, value in enumerate(inputs):
                value.users.append((new, index))
            twin.ops.append(new)
        twin.outputs = [carry(v) for v in self.outputs]
        return twin

    def verify(self) -> None:
        seen = {id(v) for v in self.inputs}
        for op in self.ops:
            for value in op.inputs:
                if not self.is_constant(value) and id(value) not in seen:
                    raise VerificationError(f"{op.name} reads %{value.name} before it is computed")
            seen |= {id(v) for v in op.outputs}

    def insert(self, op, inputs, attrs=None, *, after):  # type: ignore[override]
        at = 0 if after is None else self.ops.index(after) + 1
        return [self.add(op, *inputs, at=at, **(attrs or {}))]

    def insert_constant(self, array: np.ndarray, name: str) -> Value:
        return self.constant(array, "constant")

    def set_operand(self, op: Op, index: int, value: Value) -> None:
        op.inputs[index].users.remove((op, index))
        op.inputs[index] = value
        value.users.append((op, index))

    def replace_output(self, index: int, value: Value) -> None:
        self.outputs[index] = value

    def set_length(self, op: Op, axis: int, like: Value, like_axis: int) -> None:
        raise NotImplementedError("no op of this graph has a shape argument")

    def refresh(self, op: Op) -> None:
        arrays = [np.zeros(v.shape) for v in op.inputs]
        op.output.shape = FUNCTIONS[op.target](arrays, op.attrs).shape

    def add_output(self, value: Value, name: str) -> None:
        self.outputs.append(value)

    def remove_dead(self) -> int:
        live, kept = {id(v) for v in self.outputs}, []
        for op in reversed(self.ops):
            if any(id(v) in live for v in op.outputs):
                live |= {id(v) for v in op.inputs}
                kept.append(op)
        removed = len(self.ops) - len(kept)
        self.ops = kept[::-1]
        for value in self.values():
            value.users = [(op, i) for op, i in value.users if op in self.ops]
        return removed
