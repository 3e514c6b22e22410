"""What small integer tensors hold, as sympy expressions: the other half of symbolic shape inference.

One row per operator of the arithmetic that exporters emit around shapes (Shape, Gather, Concat, Div, Floor,
Where, ...). Elements are int, sympy expression, or None where only the run knows them. Sources: the
operators' definitions in the ONNX standard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy

from .onnx_shapes import SMALL, ShapeEnv, dim

INT_KINDS = {
    ir.DataType.INT64,
    ir.DataType.INT32,
    ir.DataType.INT16,
    ir.DataType.INT8,
    ir.DataType.UINT8,
    ir.DataType.UINT32,
    ir.DataType.UINT64,
}

Rule = Callable[[ShapeEnv, ir.Node], "np.ndarray | None"]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return add


def contents_of(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    """The contents of a node's first output, None when they are not known or of no use to shapes."""
    if node.domain != "" or node.op_type not in RULES:
        return None
    shape = env.shape(node.outputs[0])
    if shape is None or len(shape) > 1 or not all(isinstance(d, int) and d <= SMALL for d in shape):
        return None
    found = RULES[node.op_type](env, node)
    return None if found is None or all(x is None for x in found.ravel()) else found


def pack(items: list[Any], shape: tuple[int, ...] | None = None) -> np.ndarray:
    out = np.empty(len(items), object)
    for i, item in enumerate(items):
        out[i] = None if item is None else dim(item)
    return out if shape is None else out.reshape(shape)


def each(function: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
    """Apply `function` element by element, broadcasting; None wherever an operand is None."""
    parts = np.broadcast_arrays(*arrays)
    flat = [
        None if any(x is None for x in row) else function(*row)
        for row in zip(*(list(p.ravel()) for p in parts))
    ]
    return pack(flat, parts[0].shape)


def operands(env: ShapeEnv, node: ir.Node) -> list[np.ndarray] | None:
    arrays = [env.contents(v) for v in node.inputs]
    return None if any(a is None for a in arrays) else [a for a in arrays if a is not None]


@rule("Shape")
def _shape(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    shape = env.need(node.inputs[0])
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(shape))
    return pack(list(shape[slice(start, end)]))


@rule("Size")
def _size(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    total: Any = 1
    for length in env.need(node.inputs[0]):
        total = total * length
    return pack([total], ())


@rule("Gather")
def _gather(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    table, index = env.contents(node.inputs[0]), env.constant(node.inputs[1])
    if index is None:
        index = as_numpy(env, node.inputs[1])
    return None if table is None or index is None or table.ndim != 1 else np.asarray(table[index], object)


def as_numpy(env: ShapeEnv, value: ir.Value | None) -> np.ndarray | None:
    """The contents as integers, None unless all are known."""
    array = env.contents(value)
    if array is None or not all(isinstance(x, int) for x in array.ravel()):
        return None
    return array.astype(np.int64)


@rule("Slice")
def _slice(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    table = env.contents(node.inputs[0])
    starts, ends = env.known_ints(node.inputs[1]), env.known_ints(node.inputs[2])
    steps = env.known_ints(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else [1]
    if table is None or not starts or not ends or not steps or table.ndim != 1:
        return None
    return table[slice(starts[0], ends[0], steps[0])]


@rule("Concat")
def _concat(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    parts: list[Any] = []
    for value in node.inputs:
        found = env.ints(value)
        if found is None:
            shape = env.need(value)
            if len(shape) != 1 or not isinstance(shape[0], int):
                return None
            found = [None] * shape[0]
        parts += found
    return pack(parts)


@rule("Unsqueeze", "Squeeze", "Reshape", "Flatten", "Identity", "Expand", "Dropout")
def _same(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    array = env.contents(node.inputs[0])
    shape = env.need(node.outputs[0])
    if array is None:
        return None
    lengths = tuple(int(d) for d in shape)  # static: contents_of has checked
    if array.size == int(np.prod(lengths)):
        return array.reshape(lengths)
    return np.broadcast_to(array, lengths).copy()


@rule("Cast")
def _cast(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    array = env.contents(node.inputs[0])
    if array is None:
        return None
    if node.attributes.get_int("to", 0) in INT_KINDS:  # a cast to an integer truncates
        return each(truncate, array)
    return array


def truncate(x: Any) -> Any:
    if isinstance(x, int):
        return x
    if x.is_integer:
        return x
    return sympy.ceiling(x) if x.is_negative else sympy.floor(x)


@rule("Add")
def _add(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    arrays = operands(env, node)
    return None if arrays is None else each(lambda a, b: a + b, *arrays)


@rule("Sub")
def _sub(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    arrays = operands(env, node)
    return None if arrays is None else each(lambda a, b: a - b, *arrays)


@rule("Mul")
def _mul(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    arrays = operands(env, node)
    return None if arrays is None else each(lambda a, b: a * b, *arrays)


@rule("Div")
def _div(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    arrays = operands(env, node)
    if arrays is None:
        return None
    integer = node.inputs[0] is not None and node.inputs[0].dtype in INT_KINDS

    def divide(a: Any, b: Any) -> Any:
        if b == 0:
            return None
        ratio = sympy.sympify(a) / b
        return truncate(dim(ratio)) if integer else ratio

    return each(divide, *arrays)


@rule("Mod")
def _mod(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    arrays = operands(env, node)
    return None if arrays is None else each(lambda a, b: None if b == 0 else sympy.Mod(a, b), *arrays)


@rule("Neg")
def _neg(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    arrays = operands(env, node)
    return None if arrays is None else each(lambda a: -a, *arrays)


@rule("Floor")
def _floor(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    arrays = operands(env, node)
    return None if arrays is None else each(lambda a: sympy.floor(a), *arrays)


@rule("Ceil")
def _ceil(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    arrays = operands(env, node)
    return None if arrays is None else each(lambda a: sympy.ceiling(a), *arrays)


@rule("Min")
def _min(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    arrays = operands(env, node)
    return None if arrays is None else each(lambda *row: sympy.Min(*row), *arrays)


@rule("Max")
def _max(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    arrays = operands(env, node)
    return None if arrays is None else each(lambda *row: sympy.Max(*row), *arrays)


def decide(relation: Any) -> Any:
    """A comparison as 1, 0 or None (not known before the run)."""
    truth = sympy.sympify(relation)
    return 1 if truth == sympy.true else 0 if truth == sympy.false else None


@rule("Equal")
def _equal(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    arrays = operands(env, node)
    return None if arrays is None else each(lambda a, b: decide(sympy.Eq(a, b)), *arrays)


@rule("Greater", "Less", "GreaterOrEqual", "LessOrEqual")
def _compare(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    arrays = operands(env, node)
    relation = {"Greater": sympy.Gt, "Less": sympy.Lt, "GreaterOrEqual": sympy.Ge, "LessOrEqual": sympy.Le}
    compare = relation[node.op_type]
    return None if arrays is None else each(lambda a, b: decide(compare(a, b)), *arrays)


@rule("Not")
def _not(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    arrays = operands(env, node)
    return None if arrays is None else each(lambda a: 1 - a, *arrays)


@rule("Where")
def _where(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    arrays = operands(env, node)
    if arrays is None:
        return None
    parts = np.broadcast_arrays(*arrays)
    rows = zip(*(list(p.ravel()) for p in parts))
    return pack([None if c is None else a if c else b for c, a, b in rows], parts[0].shape)


@rule("ConstantOfShape")
def _constant_of_shape(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    lengths = tuple(int(d) for d in env.need(node.outputs[0]))
    fill = node.attributes.get_tensor("value", None)
    value = 0 if fill is None else fill.numpy().ravel()[0]
    return pack([int(value)] * int(np.prod(lengths)), lengths) if value == int(value) else None


@rule("Range")
def _range(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    bounds = [env.known_ints(v) for v in node.inputs]
    if any(b is None for b in bounds):
        return None
    start, limit, delta = (b[0] for b in bounds if b is not None)
    return pack(list(range(start, limit, delta)))


@rule("ReduceProd", "ReduceSum", "ReduceMax", "ReduceMin")
def _reduce(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    flat = env.ints(node.inputs[0])
    if flat is None or any(x is None for x in flat) or not flat:
        return None
    if node.op_type == "ReduceProd":
        result: Any = 1
        for x in flat:
            result = result * x
    elif node.op_type == "ReduceSum":
        result = sum(flat)
    else:
        result = (sympy.Max if node.op_type == "ReduceMax" else sympy.Min)(*flat)
    return pack([result], tuple(int(d) for d in env.need(node.outputs[0])))


@rule("Split")
def _split(env: ShapeEnv, node: ir.Node) -> np.ndarray | None:
    table = env.contents(node.inputs[0])
    if table is None:
        return None
    start = 0
    for out in node.outputs[1:]:  # the first part is returned, the others are recorded here
        first = env.need(node.outputs[0])[0] if start == 0 else start
        start = int(first)
        length = int(env.need(out)[0])
        env.data[out] = table[start : start + length]
        start += length
    return table[: int(env.need(node.outputs[0])[0])]
