"""The steps between the product of queries and keys and the softmax, read backwards from the softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from .graph import Op, Value

_LIMIT = 24


class Miss(Exception):
    """Why something that looks like an attention cannot be proved to be one. `scores`: the product of
    queries and keys, where one was seen."""

    scores: Op | None = None


@dataclass
class Step:
    """One step. kind: scale (by `number`), multiply or divide (by `value` [.., 1, 1]), add or subtract
    (`value`, of any shape that broadcasts), fill (`number` where `value` is `when`), reshape, cast."""

    kind: str
    op: Op
    number: float = 1.0
    value: Value | None = None
    when: bool = True


def same(a: Any, b: Any) -> bool:
    """Whether two dims or shapes are equal for every value of the symbols."""
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (not (isinstance(a, int) and isinstance(b, int)) and sympy.expand(a - b) == 0)


def idle(op: Op) -> bool:
    """Whether the op changes no element: ties, casts, dropout that is off, reshapes and expands to the same
    shape, transpositions that move nothing."""
    if op.kind == "tie":
        return True
    source = op.inputs[0] if op.inputs else None
    if source is None or source.shape is None or op.output.shape is None:
        return False
    if op.kind == "elementwise" and op.attrs["fn"] == "dropout":
        return not op.attrs.get("p", 0.5) or op.attrs.get("train") is False
    if op.kind == "elementwise" and op.attrs["fn"] == "cast":
        return "float" in op.output.dtype and "float" in source.dtype
    if op.kind == "transpose":
        return tuple(op.attrs["perm"]) == tuple(range(source.rank))
    return op.kind in ("reshape", "expand") and same(source.shape, op.output.shape)


def last_two_kept(op: Op) -> bool:
    """Whether a reshape leaves the last two axes alone."""
    before, after = op.inputs[0].shape if op.inputs[0] else None, op.output.shape
    if before is None or after is None or len(before) < 2 or len(after) < 2:
        return False
    return same(before[-2:], after[-2:])


def number_factor(op: Op) -> float | None:
    """The factor of a multiplication or division by a plain number."""
    if op.kind != "elementwise" or len([v for v in op.inputs if v is not None]) != 1:
        return None
    other = op.attrs.get("other")
    if not isinstance(other, int | float) or isinstance(other, bool) or op.attrs.get("rounding_mode"):
        return None
    if op.attrs["fn"] == "mul":
        return float(other)
    return 1.0 / other if op.attrs["fn"] == "div" and other else None


def trace_logits(logits: Value, outputs: set[int]) -> tuple[Op, list[Step]] | Miss:
    """The product of queries and keys behind `logits`, and the steps from there to the softmax, in order."""
    try:
        scores, steps = _back(logits, outputs, 0)
    except Miss as miss:
        return miss
    return scores, steps[::-1]


def _miss(text: str, scores: Op | None = None) -> Miss:
    miss = Miss(text)
    miss.scores = scores
    return miss


def _back(value: Value, outputs: set[int], depth: int) -> tuple[Op, list[Step]]:
    op = value.producer
    if op is None or depth > _LIMIT:
        raise _miss("no product of queries and keys is behind it")
    if op.kind == "matmul":
        _once(value, outputs, op)
        return op, []
    candidates = _steps(op, value)
    if not candidates:
        seen = _product_behind(op)
        raise _miss(f"{op.target} (%{op.name}) changes the scores in a way that is not known", seen)
    failure: Miss | None = None
    for source, step in candidates:
        try:
            scores, steps = _back(source, outputs, depth + 1)
        except Miss as miss:
            failure = miss if failure is None or failure.scores is None else failure
            continue
        _once(value, outputs, scores)
        return scores, [*([step] if step is not None else []), *steps]
    assert failure is not None
    raise failure


def _once(value: Value, outputs: set[int], scores: Op) -> None:
    if id(value) in outputs:
        raise _miss(f"the scores are an output (%{value.name})", scores)
    readers = {id(user) for user, _ in value.users}
    # x - max(x): the maximum reads the scores as well.
    kept = [u for u, _ in value.users if not (u.kind == "reduce" and u.attrs.get("fn") == "max")]
    if len(readers) > 1 and len(kept) != 1:
        raise _miss(f"the scores %{value.name} are read more than once", scores)


def _product_behind(op: Op) -> Op | None:
    frontier, seen = [op], 0
    while frontier and seen < 12:
        top = frontier.pop(0)
        seen += 1
        if top.kind == "matmul":
            return top
        if top.kind in ("elementwise", "reshape", "tie", "transpose", "expand"):
            frontier += [v.producer for v in top.inputs if v is not None and v.producer is not None]
    return None


def _steps(op: Op, value: Value) -> list[tuple[Value, Step | None]]:
    """(where the scores may come from, what the op does to them), the likeliest first."""
    operands = [v for v in op.inputs if v is not None]
    if not operands or value.shape is None:
        return []
    fn = op.attrs.get("fn")
    if op.kind == "elementwise" and fn == "cast":
        return [(operands[0], Step("cast", op))] if idle(op) else []
    if idle(op):
        return [(operands[0], None)]
    if op.kind == "reshape":
        return [(operands[0], Step("reshape", op))] if last_two_kept(op) else []
    if op.kind != "elementwise":
        return []
    factor = number_factor(op)
    if factor is not None:
        return [(operands[0], Step("scale", op, factor))]
    whole = [(i, v) for i, v in enumerate(operands) if v.shape is not None and same(v.shape, value.shape)]
    if fn in ("mul", "div"):
        return _factors(op, operands, whole)
    if fn in ("add", "sub"):
        return _summands(op, operands, whole)
    if fn == "masked_fill":
        number = op.attrs.get("value")
        number = number if number is not None else _filled(op.operand(2))
        if number is None or not whole or whole[0][0] != 0:
            return []
        return [(operands[0], Step("fill", op, float(number), operands[1], True))]
    if fn == "where":
        return _where(op, value)
    return []


def _factors(
    op: Op, operands: list[Value], whole: list[tuple[int, Value]]
) -> list[tuple[Value, Step | None]]:
    found: list[tuple[Value, Step | None]] = []
    for index, value in whole:
        if len(operands) != 2 or (op.attrs["fn"] == "div" and index == 1):
            continue
        other = operands[1 - index]
        # A factor for each head, the same for all queries and keys, can go onto the queries.
        if other.shape is not None and all(same(d, 1) for d in other.shape[-2:]):
            found.append((value, Step("divide" if op.attrs["fn"] == "div" else "multiply", op, value=other)))
    return found


def _summands(
    op: Op, operands: list[Value], whole: list[tuple[int, Value]]
) -> list[tuple[Value, Step | None]]:
    if op.attrs.get("alpha", 1) != 1:
        return []
    if len(operands) == 1:  # a number: the softmax does not see it
        return [(operands[0], None)]
    subtract = op.attrs["fn"] == "sub"
    found: list[tuple[Value, Step | None]] = []
    for index, value in whole:
        if subtract and index == 1:
            continue
        other = operands[1 - index]
        if subtract and _is_own_maximum(other, value):
            found.append((value, None))
        else:
            found.append((value, Step("subtract" if subtract else "add", op, value=other)))
    return found


def _is_own_maximum(value: Value, of: Value) -> bool:
    op = value.producer
    while op is not None and op.kind == "tie" and op.inputs[0] is not None:
        op = op.inputs[0].producer
    if op is None or op.kind != "reduce" or op.attrs.get("fn") != "max":
        return False
    return op.inputs[0] is of and op.attrs["axes"] == (of.rank - 1,) and bool(op.attrs["keepdim"])


def _where(op: Op, value: Value) -> list[tuple[Value, Step | None]]:
    if len(op.inputs) != 3 or value.shape is None:
        # where(condition, x, number) has two tensors.
        number = op.attrs.get("other")
        if len(op.inputs) == 2 and isinstance(number, int | float) and op.inputs[0] and op.inputs[1]:
            return [(op.inputs[1], Step("fill", op, float(number), op.inputs[0], False))]
        return []
    condition, kept, other = op.inputs
    if condition is None or kept is None or other is None:
        return []
    found: list[tuple[Value, Step | None]] = []
    for scores, filled, when in ((kept, other, False), (other, kept, True)):
        number = _filled(filled)
        if number is not None and scores.shape is not None and same(scores.shape, value.shape):
            found.append((scores, Step("fill", op, number, condition, when)))
    return found


def _filled(value: Value | None) -> float | None:
    """The number that every element of a constant value is."""
    while value is not None and value.producer is not None:
        op = value.producer
        number = op.attrs.get("fill_value", op.attrs.get("s"))
        if op.kind in ("create", "elementwise") and op.attrs.get("fn") in (
            "full",
            "full_like",
            "scalar_tensor",
        ):
            return float(number) if isinstance(number, int | float) else None
        if op.kind == "tie" or op.kind == "expand" or op.attrs.get("fn") in ("cast", "lift_fresh"):
            value = op.inputs[0]
        else:
            return None
    if value is None or value.origin != "constant" or value.rank != 0:
        return None
    data = value.raw.meta.get("elision_number")
    return None if data is None else float(data)
