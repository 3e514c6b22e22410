"""Data flow over a graph view: who depends on whom, and on what sort of input.

Dependencies are bit sets in Python integers (one bit an op), so that "does this value descend from that one" is
one `and`, for graphs of thousands of ops.
"""

from __future__ import annotations

from ..ir.graph import Graph, Op, Value

FLOAT_INPUT = 1  # depends on the data of a floating-point graph input (pixels, audio, embeddings)
OTHER_INPUT = 2  # depends on the data of an integer or boolean input (token ids, masks)
LOOKED_UP = 4  # passed through an embedding table indexed by an input

# Elementwise functions that read only the shape of their operand.
SHAPE_ONLY = frozenset({"zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"})


def reads_shapes(op: Op) -> bool:
    """Whether an op takes no more of its operands than their shapes."""
    return op.kind in ("size", "create") or op.attrs.get("fn") in SHAPE_ONLY


def is_float(value: Value) -> bool:
    return value.dtype.startswith(("float", "bfloat"))


class Flow:
    """Ancestors of every op, and what each value's data comes from."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.position = {op: index for index, op in enumerate(graph.ops)}
        self.ancestors: list[int] = []
        self.origin: dict[Value, int] = {}
        for value in graph.inputs:
            self.origin[value] = FLOAT_INPUT if is_float(value) else OTHER_INPUT
        for index, op in enumerate(graph.ops):
            bits = 1 << index
            flags = 0
            shape_only = reads_shapes(op)
            for value in op.inputs:
                if value is None:
                    continue
                if value.producer is not None:
                    bits |= self.ancestors[self.position[value.producer]]
                flags |= self.origin.get(value, 0)
            self.ancestors.append(bits)
            if op.kind in ("embedding", "gather") and len(op.inputs) > 1 and op.inputs[1] is not None:
                table, ids = op.inputs[0], op.inputs[1]
                if self.origin.get(ids, 0) and table is not None and not self.origin.get(table, 0):
                    flags |= LOOKED_UP
            for out in op.outputs:
                self.origin[out] = 0 if shape_only else flags

    def comes_from(self, value: Value) -> int:
        """FLOAT_INPUT, OTHER_INPUT and LOOKED_UP bits; 0 when no input's data reaches `value`."""
        return self.origin.get(value, 0)

    def depends(self, value: Value, on: Value) -> bool:
        """True when `value` is, or is computed from, `on`."""
        if value is on:
            return True
        if value.producer is None:
            return False
        bits = self.ancestors[self.position[value.producer]]
        if on.producer is not None:
            return bool(bits >> self.position[on.producer] & 1)
        return any(bits >> self.position[user] & 1 for user, _ in on.users if user in self.position)

    def after(self, value: Value) -> list[Op]:
        """Users of a value, in order."""
        users = {op for op, _ in value.users if op in self.position}
        return sorted(users, key=self.position.__getitem__)
