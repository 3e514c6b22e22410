"""What a graph costs: floating-point operations, bytes moved, a time from them, and tokens per block.

The numbers compare two graphs; they do not promise a speed. A multiplication and an addition are two
operations. Time is the roofline: for each operation the longer of computing and moving.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sympy

from .ir.graph import Dim, Graph, Op, Value

if TYPE_CHECKING:
    from ..kernels import OpDef

DEFAULT_LENGTH = 64
"""The length of a symbolic axis that neither a hint nor an example input fixes."""

ITEMSIZE = {
    "float64": 8,
    "int64": 8,
    "uint64": 8,
    "complex64": 8,
    "complex128": 16,
    "bfloat16": 2,
    "float16": 2,
}
ITEMSIZE |= {"int16": 2, "uint16": 2, "bool": 1, "int8": 1, "uint8": 1, "int4": 1, "uint4": 1}

# Elementwise functions of more than one operation, about what a polynomial for them takes.
DEAR = {
    "exp": 8,
    "log": 8,
    "sin": 10,
    "cos": 10,
    "tanh": 10,
    "erf": 10,
    "sigmoid": 10,
    "silu": 11,
    "gelu": 12,
}
DEAR |= {"pow": 10, "softplus": 12, "mish": 20, "elu": 10, "selu": 10, "hardswish": 4, "sqrt": 2, "rsqrt": 3}
_ATTENTIONS = ("attention", "joined_attention", "cached_attention")
FREE = {"cast", "where", "dropout", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or"}


@dataclass(frozen=True)
class Machine:
    """Peak rates for the roofline: operations and bytes per second, and a fixed time per operation.

    An operation that moves at most `cache` bytes moves them at the rate `near`. `overhead` is 0 by default:
    how long a launch takes depends on the host far more than on the graph.
    """

    name: str
    flops: float
    bytes: float
    cache: float = 0.0
    near: float = 0.0
    overhead: float = 0.0

    def seconds(self, flops: float, moved: float) -> float:
        rate = self.near if moved <= self.cache and self.near else self.bytes
        return max(flops / self.flops, moved / rate) + self.overhead


MACHINES = {
    # A desktop of today: 8 cores, AVX2 in fp32, two channels of DDR5. Ratios matter, not the absolute rates.
    "cpu": Machine("cpu", flops=4e11, bytes=5e10, cache=8e6, near=4e11),
    # A data-centre GPU in bf16 at rates that real kernels reach, HBM3.
    "gpu": Machine("gpu", flops=4e14, bytes=3e12, cache=3e7, near=6e12),
}


@dataclass
class OpCost:
    """The share of one sort of operation."""

    count: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0


@dataclass
class Cost:
    """The cost of a whole graph; `tokens_per_block` has the query length of each self-attention in order."""

    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    by_op: dict[str, OpCost] = field(default_factory=dict)
    tokens_per_block: list[int] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "flops": self.flops,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "by_op": {name: vars(part) for name, part in self.by_op.items()},
            "tokens_per_block": self.tokens_per_block,
        }


def estimate(
    graph: Graph,
    *,
    hints: Mapping[str, int] | None = None,
    example_inputs: Sequence[Any] | None = None,
    machine: Machine = MACHINES["cpu"],
) -> Cost:
    """Estimate the cost of `graph`.

    Symbolic lengths come from `hints` (by symbol name), else from `example_inputs` (anything with a shape, in
    the order of `graph.inputs`), else they count as DEFAULT_LENGTH. A number of kept tokens that only the data say
    counts as its bound (`OpDef.bounds`). An op of unknown shape counts as nothing.
    """
    lengths = _Lengths(graph, hints or {}, example_inputs)
    total = Cost()
    for op in graph.ops:
        flops, moved = _cost(op, lengths, graph.host)
        definition = _definition(op)
        name = "" if definition is None else definition.name
        if op.kind == "attention" or name in _ATTENTIONS:
            tokens = _self_attention(op, lengths)
            if tokens is not None:
                total.tokens_per_block.append(tokens)
        if not flops and not moved:
            continue
        seconds = machine.seconds(flops, moved)
        part = total.by_op.setdefault(name or op.kind, OpCost())
        for record in (part, total):
            record.flops += flops
            record.bytes += moved
            record.seconds += seconds
        part.count += 1
    total.by_op = dict(sorted(total.by_op.items(), key=lambda entry: -entry[1].seconds))
    return total


class _Lengths:
    """Numbers for symbolic lengths."""

    def __init__(self, graph: Graph, hints: Mapping[str, int], examples: Sequence[Any] | None) -> None:
        self.known: dict[Any, int] = {}
        self.hints = hints
        self.cache: dict[sympy.Expr, int] = {}
        for value, example in zip(graph.inputs, examples or ()):
            shape = getattr(example, "shape", None)
            if shape is None or value.shape is None or len(shape) != len(value.shape):
                continue
            for dim, length in zip(value.shape, shape):
                # A symint of a graph still being traced says nothing about the length.
                if isinstance(dim, sympy.Expr) and isinstance(length, int):
                    self.learn(dim, length)
        for op in graph.ops:
            self._learn_bounds(op)

    def _learn_bounds(self, op: Op) -> None:
        """Lengths that only the data say are taken as long as they can get."""
        definition = _definition(op)
        if definition is None or definition.bounds is None or (shapes := self.operands(op)) is None:
            return
        for value, most in zip(op.outputs, definition.most(shapes, _attributes(op))):
            for dim, length in zip(value.shape or (), most):
                if isinstance(dim, sympy.Expr):
                    self.learn(dim, length)

    def learn(self, dim: sympy.Expr, length: int) -> None:
        free = sorted(dim.free_symbols, key=str)
        if len(free) != 1 or free[0] in self.known:
            return
        if dim == free[0]:
            self.known[free[0]] = length
            return
        try:
            roots = sympy.solve(dim - length, free[0])
        except NotImplementedError:  # a least of two numbers, say: another input may tell
            return
        for root in roots:
            if root.is_Integer and int(root) > 0:
                self.known[free[0]] = int(root)

    def __call__(self, dim: Dim) -> int:
        if isinstance(dim, int):
            return dim
        if dim not in self.cache:
            values: dict[Any, int] = {
                s: self.hints.get(str(s), self.known.get(s, DEFAULT_LENGTH)) for s in dim.free_symbols
            }
            number: Any = dim.subs(values)
            self.cache[dim] = int(number) if number.is_number and number.is_finite else DEFAULT_LENGTH
        return self.cache[dim]

    def shape(self, value: Value | None) -> tuple[int, ...] | None:
        if value is None or value.shape is None:
            return None
        return tuple(self(d) for d in value.shape)

    def operands(self, op: Op) -> list[tuple[int, ...] | None] | None:
        """Their shapes, None for an absent one; None where that of a present one is not known."""
        shapes = [self.shape(value) for value in op.inputs]
        return None if any(s is None and v is not None for s, v in zip(shapes, op.inputs)) else shapes

    def count(self, value: Value | None) -> float:
        shape = self.shape(value)
        if shape is None:
            return 0.0
        total = 1.0
        for length in shape:
            total *= length
        return total

    def bytes(self, values: Sequence[Value | None]) -> float:
        return sum(self.count(v) * ITEMSIZE.get(v.dtype, 4) for v in values if v is not None)


def _cost(op: Op, lengths: _Lengths, host: str) -> tuple[float, float]:
    """(operations, bytes) of one op."""
    if op.kind == "elision":
        return _dialect_cost(op, lengths)
    if op.kind in _NOTHING or (op.kind in _VIEWS and host == "fx") or op.attrs.get("fn") == "dropout":
        return 0.0, 0.0
    if op.kind == "embedding" or op.kind == "gather":
        return 0.0, 2 * lengths.bytes(op.outputs) + lengths.bytes(op.inputs[1:2])
    if op.kind in _VIEWS:
        return 0.0, 2 * lengths.bytes(op.outputs)
    flops = _FLOPS.get(op.kind, _no_flops)(op, lengths)
    return flops, lengths.bytes([*op.inputs, *op.outputs])


_NOTHING = {"reshape", "tie", "size", "create", "expand", "output"}
# Views in torch; copies of what they put out in ONNX Runtime.
_VIEWS = {"transpose", "slice", "select", "split", "unbind"}


def _no_flops(op: Op, lengths: _Lengths) -> float:
    return 0.0


def _elementwise(op: Op, lengths: _Lengths) -> float:
    fn = str(op.attrs.get("fn", ""))
    return 0.0 if fn in FREE else DEAR.get(fn, 1) * lengths.count(op.outputs[0])


def _linear(op: Op, lengths: _Lengths) -> float:
    x = lengths.shape(op.operand(0))
    out = lengths.count(op.outputs[0])
    return 2 * out * x[-1] + (out if op.operand(2) is not None else 0) if x else 0.0


def _matmul(op: Op, lengths: _Lengths) -> float:
    a = lengths.shape(op.operand(0))
    return 2 * lengths.count(op.outputs[0]) * a[-1] if a else 0.0


def _attention(op: Op, lengths: _Lengths) -> float:
    q, k, v = (lengths.shape(op.operand(i)) for i in range(3))
    if not q or not k or not v or min(len(q), len(k), len(v)) < 2:
        return 0.0
    rows = lengths.count(op.operand(0)) / max(q[-1], 1)
    # Scores and weighted sum, plus five operations an entry for scaling and softmax; a causal mask is not
    # subtracted, since not every kernel skips it.
    return rows * k[-2] * (2 * q[-1] + 2 * v[-1] + 5)


def _conv(op: Op, lengths: _Lengths) -> float:
    weight = lengths.shape(op.operand(1))
    if not weight:
        return 0.0
    per_position = 1.0
    for length in weight[1:]:
        per_position *= length
    transposed = "transpose" in f"{op.attrs.get('fn', '')}{op.target}".lower()
    return 2 * per_position * lengths.count(op.operand(0) if transposed else op.outputs[0])


def _times(factor: float) -> Callable[[Op, _Lengths], float]:
    return lambda op, lengths: factor * lengths.count(op.operand(0))


_FLOPS: dict[str, Callable[[Op, _Lengths], float]] = {
    "elementwise": _elementwise,
    "linear": _linear,
    "matmul": _matmul,
    "attention": _attention,
    "conv": _conv,
    "norm": _times(8),
    "softmax": _times(12),
    "reduce": _times(1),
    "spatial": _times(4),
    "scatter": _times(1),
}


def _definition(op: Op) -> OpDef | None:
    """Of an op of kind "elision"."""
    if op.kind != "elision":
        return None
    from ..kernels import definition_of

    return definition_of(op.target)


def _attributes(op: Op) -> dict[str, Any]:
    return {key: item for key, item in op.attrs.items() if key != "op"}  # the op's own name, in ONNX


def _dialect_cost(op: Op, lengths: _Lengths) -> tuple[float, float]:
    if op.target.endswith("_packed"):  # a product whose weight lies as a kernel reads it
        flops = 2 * lengths.count(op.operand(0)) * float(op.attrs.get("channels", 0))
        return flops, lengths.bytes([*op.inputs, *op.outputs])
    definition, shapes = _definition(op), lengths.operands(op)
    if definition is None or shapes is None:
        return 0.0, lengths.bytes([*op.inputs, *op.outputs])
    first = next((v for v in op.inputs if v is not None), None)
    itemsize = ITEMSIZE.get(first.dtype, 4) if first is not None else 4
    attrs = _attributes(op)
    flops, moved = definition.flops(shapes, attrs), definition.bytes(shapes, attrs, itemsize)
    return float(flops), float(moved)


def _self_attention(op: Op, lengths: _Lengths) -> int | None:
    """The query length of a self-attention: as many queries as keys."""
    q, k = lengths.shape(op.operand(0)), lengths.shape(op.operand(1))
    if not q or not k or len(q) < 2 or len(k) < 2 or q[-2] != k[-2]:
        return None
    return q[-2]
