"""Which products and tables of a graph have weights that can be stored in few bits, and what each of them is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .ir.graph import Graph, Op, Value

LINEAR, HEAD, EMBEDDING = "linear", "head", "embedding"

NARROWEST = 32
"""Tables with narrower rows are biases by position and the like: there is nothing to save."""

_FLOATS = ("float32", "float16", "bfloat16")
_PLAIN = ("tie", "slice", "select", "reshape", "transpose")  # between the head and an output of the graph


@dataclass(eq=False)
class Target:
    """A product x times weight.T, or a table and its ids. weight: [N, K], any float type, as the graph has it.

    name: of the weight's value. result: what is to be replaced; bias: [N], already in result."""

    op: Op
    role: str
    weight: np.ndarray
    name: str
    result: Value
    bias: np.ndarray | Value | None = None

    @property
    def x(self) -> Value:
        """The input of the product, or the ids."""
        found = self.op.inputs[1 if self.role == EMBEDDING else 0]
        assert found is not None
        return found


@dataclass
class Found:
    """Targets in the order of the graph, and why others are none: sentences with how often."""

    targets: list[Target] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)

    def leave(self, reason: str) -> None:
        self.left[reason] = self.left.get(reason, 0) + 1


def find_targets(graph: Graph) -> Found:
    """Every product with a constant weight and every table of a vocabulary."""
    found = Found()
    tables: list[Target] = []
    for op in graph.ops:
        if op.kind in ("linear", "matmul"):
            made = _product(graph, op, found)
            if made is not None:
                found.targets.append(made)
        elif op.kind == "embedding":
            made = _table(graph, op)
            if made is not None:
                tables.append(made)
        elif op.kind == "conv":
            found.leave("convolutions are not quantized")
    largest = max((t.weight.shape[0] for t in tables), default=0)
    found.targets += [t for t in tables if 2 * t.weight.shape[0] >= largest]
    order = {op: i for i, op in enumerate(graph.ops)}
    found.targets.sort(key=lambda t: order[t.op])
    for target in heads(graph, found.targets):
        target.role = HEAD
    return found


def heads(graph: Graph, targets: list[Target]) -> list[Target]:
    """The products over a vocabulary: the widest of those whose result is an output of the graph, but for what has only
    one operand, and widens."""
    ends = set(_ends(graph))
    final = [
        t for t in targets if t.role == LINEAR and t.result in ends and t.weight.shape[0] > t.weight.shape[1]
    ]
    widest = max((t.weight.shape[0] for t in final), default=0)
    return [t for t in final if t.weight.shape[0] == widest]


def _ends(graph: Graph) -> Iterator[Value]:
    """Outputs, and the values that become one through operations that have one operand besides constants."""
    queue, seen = list(graph.outputs), set(graph.outputs)
    while queue:
        value = queue.pop()
        yield value
        op = value.producer
        if op is None or op.kind not in ("elementwise", *_PLAIN):
            continue
        data = [v for v in op.inputs if v is not None and not graph.is_constant(v) and v.rank > 0]
        if len(data) == 1 and data[0] not in seen:
            seen.add(data[0])
            queue.append(data[0])


def matrix(graph: Graph, value: Value | None) -> np.ndarray | None:
    """The data of a constant of rank 2, or of one that was transposed or cast; None for what is computed."""
    if value is None or value.rank != 2 or value.dtype not in _FLOATS:
        return None
    if graph.is_constant(value):
        return graph.constant_value(value)
    op = value.producer
    if op is None:
        return None
    inner = None if op.kind not in ("tie", "transpose", "elementwise") else matrix(graph, op.operand(0))
    if inner is None or (op.kind == "elementwise" and op.attrs.get("fn") != "cast"):
        return None
    if op.kind == "transpose":
        return inner.transpose(op.attrs["perm"])
    if inner.dtype.name == value.dtype:
        return inner
    # Narrower than what is stored would have to be rounded first.
    return inner.astype(np.float32) if value.dtype == "float32" else None


def _product(graph: Graph, op: Op, found: Found) -> Target | None:
    x, right = op.operand(0), op.operand(1)
    if x is None or right is None:
        return None
    weight = matrix(graph, right)
    if weight is None:
        if op.kind == "linear":
            found.leave("its weight is computed, or no data of it is known")
        return None
    if op.attrs.get("alpha", 1) != 1 or op.attrs.get("beta", 1) != 1:
        found.leave("its product is scaled")
        return None
    if x.rank < 1 or x.dtype not in _FLOATS or op.output.dtype != x.dtype:
        found.leave(f"it multiplies {x.dtype} to {op.output.dtype}")
        return None
    if op.kind == "matmul" or not op.attrs["transposed"]:
        weight = weight.T
    target = Target(op, LINEAR, weight, right.name, op.output)
    given = op.operand(2)
    if given is None:
        _take_bias(graph, target)
        return target
    known = graph.constant_value(given)
    if known is not None and known.size == weight.shape[0] and max(known.shape) == known.size:
        target.bias = known.reshape(-1)
    elif given.shape == (weight.shape[0],) and given.dtype == "float32":
        target.bias = given
    else:
        found.leave("what is added to it is no bias of its channels")
        return None
    return target


def _take_bias(graph: Graph, target: Target) -> None:
    """A constant that is added right behind the product becomes its bias."""
    if len(target.result.users) != 1 or any(target.result is v for v in graph.outputs):
        return
    user, index = target.result.users[0]
    if user.kind != "elementwise" or user.attrs.get("fn") != "add" or len(user.inputs) != 2:
        return
    other = user.inputs[1 - index]
    if other is None or user.attrs.get("alpha", 1) != 1 or user.output.dtype != target.result.dtype:
        return
    bias = graph.constant_value(other) if graph.is_constant(other) else None
    if bias is not None and bias.shape == target.weight.shape[:1]:
        target.bias, target.result = bias, user.output


def _table(graph: Graph, op: Op) -> Target | None:
    table, ids = op.operand(0), op.operand(1)
    weight = matrix(graph, table)
    if table is None or weight is None or ids is None or weight.shape[1] < NARROWEST:
        return None
    if not _looked_up(graph, ids) or op.output.dtype != table.dtype:
        return None
    return Target(op, EMBEDDING, weight, table.name, op.output)


def _looked_up(graph: Graph, ids: Value) -> bool:
    """Whether the data of an input chooses the rows: lengths only say positions."""
    queue, seen = [ids], {ids}
    while queue:
        value = queue.pop()
        if value in graph.inputs:
            return True
        op = value.producer
        if op is None or op.kind in ("size", "create"):
            continue
        for operand in op.inputs:
            if operand is not None and operand not in seen:
                seen.add(operand)
                queue.append(operand)
    return False
