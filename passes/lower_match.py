"""Small patterns on the graph view that lowering of step graphs is made of: what passes a value on, pieces, norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .ir.graph import Graph, Op, Value

ACTIVATIONS = ("silu", "gelu", "relu", "sigmoid", "tanh", "quick_gelu")


def idle(op: Op) -> bool:
    """Does `op` pass its operand on as it is?"""
    x = op.operand(0)
    if x is None or len(op.outputs) != 1 or op.output.shape != x.shape or op.output.dtype != x.dtype:
        return False
    if op.kind in ("tie", "reshape"):
        return True
    if op.kind == "slice":  # equal shapes: nothing is cut off
        return op.attrs.get("step", 1) == 1
    fn = op.attrs.get("fn")
    return op.kind == "elementwise" and (fn == "cast" or (fn == "dropout" and not op.attrs.get("train")))


def source(value: Value) -> Value:
    """Where `value` comes from, before everything that passes it on as it is."""
    while value.producer is not None and idle(value.producer):
        found = value.producer.operand(0)
        assert found is not None
        value = found
    return value


def made_by(value: Value, kind: str, *fns: str) -> Op | None:
    """The op of this kind (and one of these functions) behind `value`."""
    op = source(value).producer
    if op is None or op.kind != kind or (fns and op.attrs.get("fn") not in fns):
        return None
    return op


def operands(op: Op) -> list[Value]:
    return [v for v in op.inputs if v is not None]


def number(graph: Graph, op: Op, fn: str) -> tuple[Value, float] | None:
    """(x, c) of an elementwise x <fn> c with a constant of one element, in either order for sums and products."""
    if op.kind != "elementwise" or op.attrs.get("fn") != fn:
        return None
    given = operands(op)
    for key in ("other", "exponent"):
        if len(given) == 1 and isinstance(op.attrs.get(key), int | float):
            scale = op.attrs.get("alpha", 1)
            return (given[0], float(op.attrs[key])) if scale == 1 else None
    if len(given) != 2:
        return None
    for x, c in (given, given[::-1]) if fn in ("add", "mul") else (given,):
        constant = graph.constant_value(source(c))
        if constant is not None and constant.size == 1:
            return x, float(constant.reshape(()))
    return None


@dataclass(frozen=True)
class Piece:
    """`base`[..., start:end:step] on the last axis."""

    base: Value
    start: int
    end: int
    step: int = 1


def piece(value: Value) -> Piece:
    """`value` as a piece of the last axis of what it is cut from; of itself where it is cut from nothing."""
    value = source(value)
    op, width = value.producer, last(value)
    whole = Piece(value, 0, width)
    if op is None or value.rank < 1 or width < 0:
        return whole
    x = op.operand(0)
    if x is None or op.attrs.get("axis") != value.rank - 1 or last(x) < 0:
        return whole
    if op.kind == "slice":
        start, end, step = op.attrs["start"], op.attrs.get("end"), op.attrs.get("step", 1)
        end = last(x) if end is None else min(end, last(x))
        return Piece(source(x), start, end, step) if isinstance(start, int) and step > 0 else whole
    if op.kind == "split":
        start = sum(op.attrs["sizes"][: value.index])
        return Piece(source(x), start, start + op.attrs["sizes"][value.index])
    return whole


def last(value: Value) -> int:
    """The length of the last axis, -1 where it is not known."""
    return value.shape[-1] if value.shape and isinstance(value.shape[-1], int) else -1


def same_shape(one: Value, other: Value) -> bool:
    return one.shape is not None and one.shape == other.shape


def reshaped(value: Value, rank: int) -> Value | None:
    """The value of `rank` axes behind reshapes of `value`, itself included."""
    value = source(value)
    while value.rank != rank and value.producer is not None and value.producer.kind == "reshape":
        found = value.producer.operand(0)
        if found is None:
            return None
        value = source(found)
    return value if value.rank == rank else None


def constant_of(graph: Graph, value: Value) -> np.ndarray | None:
    """The float32 array that `value` always is: a constant, or a constant plus a number, cast or not."""
    value = source(value)
    found = graph.constant_value(value)
    if found is not None:
        return np.asarray(found, dtype=np.float32)
    op = value.producer
    if op is None or op.kind != "elementwise":
        return None
    if op.attrs.get("fn") == "cast" and op.inputs[0] is not None:
        return constant_of(graph, op.inputs[0])
    shifted = number(graph, op, "add")
    before = None if shifted is None else constant_of(graph, shifted[0])
    return None if before is None or shifted is None else before + np.float32(shifted[1])


@dataclass(frozen=True)
class RmsNorm:
    x: Value
    weight: np.ndarray
    eps: float


def rms_norm(graph: Graph, value: Value) -> RmsNorm | None:
    """`value` as x / sqrt(mean(x^2) + eps) * weight over the last axis, one operator or written out, in float32."""
    value = source(value)
    op = value.producer
    if op is None or value.dtype != "float32":
        return None
    if op.kind == "norm" and op.attrs.get("fn") == "rms_norm":
        x, weight = op.operand(0), op.operand(1)
        eps = op.attrs.get("epsilon", op.attrs.get("eps"))
        if x is None or weight is None or op.operand(2) is not None or not isinstance(eps, float):
            return None
        found = constant_of(graph, weight)
        if list(op.attrs.get("axes", ())) != [x.rank - 1] or found is None or found.ndim != 1:
            return None
        return RmsNorm(source(x), found, eps)
    if op.kind != "elementwise" or op.attrs.get("fn") != "mul":
        return None
    given = operands(op)
    for unit, weight in (given, given[::-1]) if len(given) == 2 else ():
        found = constant_of(graph, weight)
        if found is None or found.ndim != 1 or len(found) != last(value):
            continue
        inner = _unit(graph, unit)
        if inner is not None:
            return RmsNorm(inner[0], found, inner[1])
    return None


def _unit(graph: Graph, value: Value) -> tuple[Value, float] | None:
    """(x, eps) of x * rsqrt(mean(x^2) + eps), or x / sqrt(...)."""
    op = source(value).producer
    if op is None or op.kind != "elementwise" or op.attrs.get("fn") not in ("mul", "div"):
        return None
    given = operands(op)
    if len(given) != 2:
        return None
    multiplied = op.attrs["fn"] == "mul"
    for x, factor in (given, given[::-1]) if multiplied else (given,):
        root = made_by(factor, "elementwise", "rsqrt" if multiplied else "sqrt")
        added = None if root is None else source(operands(root)[0]).producer
        shifted = None if added is None else number(graph, added, "add")
        mean = None if shifted is None else made_by(shifted[0], "reduce", "mean")
        if shifted is None or mean is None or not mean.attrs.get("keepdim"):
            continue
        square = source(operands(mean)[0]).producer
        if square is None or list(mean.attrs["axes"]) != [x.rank - 1]:
            continue
        power = number(graph, square, "pow")
        if power is not None and power[1] == 2:
            squared: Value | None = power[0]
        else:
            twice = operands(square) if square.attrs.get("fn") == "mul" else []
            squared = twice[0] if len(twice) == 2 and source(twice[0]) is source(twice[1]) else None
        if squared is not None and source(squared) is source(x):
            return source(x), shifted[1]
    return None


def activation(graph: Graph, value: Value) -> tuple[Value, str] | None:
    """(x, fn) where `value` is fn(x), fn as op `gated` names it."""
    op = source(value).producer
    if op is None or op.kind != "elementwise":
        return None
    fn, given = op.attrs.get("fn"), operands(op)
    if (
        len(given) == 1
        and fn in ACTIVATIONS
        and not (fn == "gelu" and _approximate(op) not in ("none", "tanh"))
    ):
        return source(given[0]), "gelu_tanh" if fn == "gelu" and _approximate(op) == "tanh" else fn
    if fn == "mul" and len(given) == 2:
        for x, gate in (given, given[::-1]):
            sigmoid = made_by(gate, "elementwise", "sigmoid")
            if sigmoid is None:
                continue
            inner = operands(sigmoid)[0]
            if source(inner) is source(x):
                return source(x), "silu"
            scaled = None if source(inner).producer is None else number(graph, source(inner).producer, "mul")  # type: ignore[arg-type]
            if scaled is not None and source(scaled[0]) is source(x) and abs(scaled[1] - 1.702) < 1e-6:
                return source(x), "quick_gelu"
    return None


def _approximate(op: Op) -> str:
    return str(op.attrs.get("approximate", "none"))


def asked(op: Op, name: str) -> dict[str, Any]:
    """The attributes of the dialect op `name` that `op` has, and nothing else that its view knows."""
    from ..kernels import OPS

    return {a.name: op.attrs[a.name] for a in OPS[name].attrs if a.name in op.attrs}
