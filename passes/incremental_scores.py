"""Attentions as the incremental pass sees them: the `attention` kind, and softmax(softcap(q k^T)) v spelled out.

Not every host's view has an attention with a soft cap (Gemma 2: cap * tanh(logits / cap)), so that form is read off
here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .errors import Refused
from .incremental_binding import POSITION, Bindings
from .incremental_pairs import LOW
from .ir.graph import Graph, Op, Value

_LIMIT = 24  # steps between the scores and the softmax


@dataclass(frozen=True)
class Mask:
    """One thing that acts on the logits: a bool (where it is `visible`) or additive value."""

    value: Value
    visible: bool = True

    def applied(self, array: np.ndarray) -> np.ndarray:
        return ~array if array.dtype == bool and not self.visible else array


@dataclass
class Attention:
    """softmax(softcap(q k^T * scale) + masks) v. `turned`: k is [.., d, m]. `inner` are the ops that it is made
    of, `op` the last of them."""

    op: Op
    q: Value
    k: Value
    v: Value
    scale: float
    softcap: float = 0.0
    causal: bool = False
    turned: bool = False
    masks: list[Mask] = field(default_factory=list)
    inner: list[Op] = field(default_factory=list)


def attentions(graph: Graph, bindings: Bindings) -> dict[Op, Attention]:
    """Every attention by each op it is made of."""
    found: dict[Op, Attention] = {}
    for op in graph.ops:
        attention = None
        if op.kind == "attention":
            attention = _plain(op, bindings)
        elif op.kind == "softmax" and op.attrs.get("fn") == "softmax":
            attention = _spelled_out(graph, op, bindings)
        if attention is not None:
            found |= dict.fromkeys(attention.inner, attention)
    return found


def _plain(op: Op, bindings: Bindings) -> Attention:
    q, k, v = op.inputs[:3]
    assert q is not None and k is not None and v is not None
    width = q.shape[-1] if q.shape is not None else None
    scale = op.attrs.get("scale")
    if scale is None and isinstance(width, int):
        scale = width**-0.5
    if not isinstance(scale, int | float):
        raise Refused(f"{op.target} (%{op.name}) scales by {scale}, which is no number")
    mask = op.operand(3)
    masks = [] if mask is None else split_mask(mask, bindings)
    softcap = float(op.attrs.get("softcap", 0.0))
    return Attention(
        op, q, k, v, float(scale), softcap, bool(op.attrs.get("causal")), masks=masks, inner=[op]
    )


def split_mask(value: Value, bindings: Bindings) -> list[Mask]:
    """The masks that `value` is made of, so that a bias of every head and what all heads hide stay apart."""
    op = value.producer
    if op is None or bindings.of(value) != POSITION:
        return [Mask(value)]
    operands = [v for v in op.inputs if v is not None]
    fn = op.attrs.get("fn")
    if op.kind == "tie":
        return split_mask(operands[0], bindings)
    if op.kind == "elementwise" and value.dtype.startswith("float"):
        if fn == "add" and len(operands) == 2 and op.attrs.get("alpha", 1) == 1:
            return split_mask(operands[0], bindings) + split_mask(operands[1], bindings)
        number = {"masked_fill": op.attrs.get("value"), "where": op.attrs.get("other")}.get(str(fn))
        if isinstance(number, int | float) and number <= LOW and len(operands) == 2:
            x, when = operands if fn == "masked_fill" else reversed(operands)
            return [*split_mask(x, bindings), Mask(when, visible=fn == "where")]
    return [Mask(value)]


# ---- spelled out --------------------------------------------------------------------------------------
def _spelled_out(graph: Graph, softmax: Op, bindings: Bindings) -> Attention | None:
    logits = softmax.inputs[0]
    assert logits is not None
    if softmax.attrs["axis"] != logits.rank - 1:
        return None
    forward = _to_product(softmax)
    backward = _Backward(graph, bindings)
    scores = backward.run(logits)
    if forward is None or scores is None or len(scores.inputs) != 2:
        return None
    out, steps = forward[-1], forward[:-1]
    q, k, v = scores.inputs[0], scores.inputs[1], out.inputs[1]
    assert q is not None and k is not None and v is not None
    inner = [scores, *reversed(backward.ops), softmax, *steps, out]
    for op in inner[:-1]:
        for user, _ in op.output.users:
            if user not in inner:
                return None  # what else reads the scores is refused where it stands
    return Attention(
        out,
        q,
        k,
        v,
        backward.factor * backward.cap * float(scores.attrs.get("alpha", 1))
        if backward.capped
        else backward.factor,
        backward.cap if backward.capped else 0.0,
        turned=True,
        masks=backward.masks,
        inner=inner,
    )


def _to_product(softmax: Op) -> list[Op] | None:
    """The ops from the softmax to the product with the values."""
    steps: list[Op] = []
    value = softmax.output
    while len(value.users) == 1 and len(steps) < _LIMIT:
        op, index = value.users[0]
        steps.append(op)
        if op.kind == "matmul":
            return steps if index == 0 and len(op.inputs) == 2 else None
        if not _idle(op):
            return None
        value = op.output
    return None


def _idle(op: Op) -> bool:
    x = op.inputs[0] if op.inputs else None
    if op.kind == "tie" or x is None:
        return op.kind == "tie"
    if op.kind in ("reshape", "expand"):
        return x.shape == op.output.shape
    if op.kind != "elementwise":
        return False
    if op.attrs.get("fn") == "dropout":
        return op.attrs.get("train") is False or not op.attrs.get("p", 0.5)
    return op.attrs.get("fn") == "cast" and "float" in x.dtype and "float" in op.output.dtype


class _Backward:
    """From the logits back to the product of queries and keys."""

    def __init__(self, graph: Graph, bindings: Bindings) -> None:
        self.graph = graph
        self.bindings = bindings
        self.factor = 1.0  # of everything after the step at hand, up to the cap
        self.cap = 0.0
        self.capped = False
        self.masks: list[Mask] = []
        self.ops: list[Op] = []

    def run(self, value: Value) -> Op | None:
        for _ in range(_LIMIT):
            op = value.producer
            if op is None:
                return None
            if op.kind == "matmul":
                return op
            source = self._step(op)
            if source is None:
                return None
            self.ops.append(op)
            value = source
        return None

    def _step(self, op: Op) -> Value | None:
        if _idle(op):
            return op.inputs[0]
        if op.kind != "elementwise":
            return None
        fn = op.attrs.get("fn")
        rows = [v for v in op.inputs if v is not None and self.bindings.has_rows(v)]
        rest = [v for v in op.inputs if v is not None and not self.bindings.has_rows(v)]
        if len(rows) != 1 or rows[0].shape != op.output.shape:
            return None
        if fn == "tanh" and not self.capped:
            self.capped, self.cap, self.factor = True, self.factor, 1.0
            return rows[0] if self.cap > 0 else None
        if fn in ("mul", "div"):
            number = self._number(op, rest)
            if number is None or number <= 0 or (fn == "div" and op.inputs[0] is not rows[0]):
                return None
            self.factor *= number if fn == "mul" else 1 / number
            return rows[0]
        if self.factor != 1.0 or self.capped:
            return None  # a mask that is scaled or capped as well
        if fn == "add" and len(rest) == 1 and op.attrs.get("alpha", 1) == 1:
            self.masks += split_mask(rest[0], self.bindings)
            return rows[0]
        number = {"masked_fill": op.attrs.get("value"), "where": op.attrs.get("other")}.get(str(fn))
        if isinstance(number, int | float) and number <= LOW and len(rest) == 1:
            self.masks.append(Mask(rest[0], visible=fn == "where"))
            return rows[0]
        return None

    def _number(self, op: Op, rest: list[Value]) -> float | None:
        if not rest:
            other = op.attrs.get("other")
            return float(other) if isinstance(other, int | float) else None
        array = self.graph.constant_value(rest[0]) if len(rest) == 1 else None
        return float(array.reshape(())) if array is not None and array.size == 1 else None
