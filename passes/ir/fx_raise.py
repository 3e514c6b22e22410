"""Raise decomposed attention (matmul, scale, mask, softmax, matmul) to one `attention` op of the view.

Each softmax is traced back to the product of queries and keys and forward to the product with the values. On
the way only steps whose effect on `softmax(scale * q k^T + mask) v` is known are taken; any other step
refuses this attention with a reason. Nothing is edited before the whole attention is understood.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from . import fx_raise_mask
from .fx_raise_steps import Miss, Step, idle, last_two_kept, number_factor, same, trace_logits
from .graph import Op, Shape, Value, product

if TYPE_CHECKING:
    from .fx import FxGraph

aten = torch.ops.aten


def raise_attention(graph: FxGraph) -> list[str]:
    """Replace every attention that is provably `scaled_dot_product_attention`; edits `graph` in place.

    Equal within rounding (1e-5 in fp32). Returns near misses, one sentence each: softmaxes between two
    products that were left alone, and why."""
    misses: list[str] = []
    masks: fx_raise_mask.Memo = {}
    raised = False
    for op in graph.ops_of("softmax"):
        if op.attrs.get("fn") != "softmax":
            continue
        try:
            found = _recognise(op, {id(v) for v in graph.outputs})
            if found is not None:
                _Raiser(graph, found, masks).run()
                raised = True
        except Miss as reason:
            misses.append(f"%{op.name} is not taken for an attention: {reason}")
    if raised:
        graph.remove_dead()
    return misses


@dataclass
class _Attention:
    softmax: Op
    scores: Op  # queries times keys
    steps: list[Step]  # from the scores to the softmax
    out: Op  # probabilities times values
    scale: float = 1.0
    factors: list[Step] = field(default_factory=list)  # per-head factors that go onto the queries


def _recognise(softmax: Op, outputs: set[int]) -> _Attention | None:
    """The two products around a softmax, None when there is no trace of an attention."""
    logits = softmax.inputs[0]
    assert logits is not None
    traced = trace_logits(logits, outputs)
    if isinstance(traced, Miss):
        if traced.scores is None or _products_after(softmax) is None:
            return None
        raise traced
    scores, steps = traced
    out = _products_after(softmax)
    if out is None:
        return None
    if softmax.attrs["axis"] != logits.rank - 1:
        raise Miss("the softmax is not over the last axis")
    value = softmax.output
    while value.users and value.users[0][0] is not out:
        _read_once(value, outputs, "the probabilities are")
        user = value.users[0][0]
        if not (idle(user) or (user.kind == "reshape" and last_two_kept(user))):
            raise Miss(f"{user.target} (%{user.name}) changes the probabilities")
        value = user.output
    _read_once(value, outputs, "the probabilities are")
    if value.users[0][1] != 0 or len(out.inputs) != 2 or out.attrs.get("alpha", 1) != 1:
        raise Miss(f"{out.target} (%{out.name}) is not probabilities times values")
    if scores.output.rank < 3:
        raise Miss("the scores have no batch axis")
    return _Attention(softmax, scores, steps, out)


def _products_after(softmax: Op) -> Op | None:
    """The first matrix product that reads the probabilities."""
    frontier, seen = [softmax.output], 0
    while frontier and seen < 24:
        value = frontier.pop(0)
        for user, _ in value.users:
            seen += 1
            if user.kind == "matmul":
                return user
            if user.kind in ("elementwise", "reshape", "tie", "expand", "transpose"):
                frontier.append(user.output)
    return None


def _read_once(value: Value, outputs: set[int], subject: str) -> None:
    if id(value) in outputs:
        raise Miss(f"{subject} an output (%{value.name})")
    if len(value.users) != 1:
        others = ", ".join(f"%{u.name}" for u, _ in value.users[:3])
        raise Miss(f"{subject} read more than once ({others})")


class _Raiser:
    """Plans and then emits one attention."""

    def __init__(self, graph: FxGraph, found: _Attention, masks: fx_raise_mask.Memo) -> None:
        self.graph, self.found, self.masks = graph, found, masks
        self.scale = float(found.scores.attrs.get("alpha", 1) or 0)
        q, k, v = found.scores.inputs[0], found.scores.inputs[1], found.out.inputs[1]
        assert q is not None and k is not None and v is not None
        self.v = v
        self.lead = self._lead(q, k, v)
        self.q, self.q_turned = self._peel(q, turned=False)
        self.k, self.k_turned = self._peel(k, turned=True)

    def _lead(self, q: Value, k: Value, v: Value) -> Shape:
        """The leading axes of the attention: batch and heads, also where they come folded into one."""
        for shape in [_shape(self.found.softmax.output), *(_shape(x) for x in (q, k, v))]:
            if len(shape) >= 4:
                return shape[:-2]
        for value in (q, k, v):
            unfolded = _unfolded(value)
            if unfolded is not None:
                return unfolded
        for user, _ in self.found.out.output.users:
            if user.kind == "reshape" and user.output.rank == 4 and last_two_kept(user):
                return _shape(user.output)[:-2]
        return (*_shape(self.found.scores.output)[:-2], 1)

    def _peel(self, value: Value, turned: bool) -> tuple[Value, bool]:
        """Look behind scales, casts, folded heads and the transposition of the last two axes."""
        while value.producer is not None:
            op = value.producer
            source = op.inputs[0] if op.inputs else None
            if source is None or source.shape is None:
                break
            factor = number_factor(op)
            if factor is not None and len(value.users) == 1 and source.dtype == value.dtype:
                self.scale *= factor
            elif _turns(op):
                turned = not turned
            elif (op.kind == "reshape" and same(source.shape, (*self.lead, *_shape(value)[-2:]))) or (
                op.attrs.get("fn") == "cast" and value.dtype != self.v.dtype == source.dtype
            ):
                pass
            elif not (idle(op) and op.attrs.get("fn") != "cast" and same(source.shape, _shape(value))):
                break
            value = source
        return value, turned

    def run(self) -> None:
        found, lead = self.found, self.lead
        width = _turned(_shape(self.q), self.q_turned)
        keys = _turned(_shape(self.k), self.k_turned)
        for value, shape in ((self.q, width), (self.k, keys), (self.v, _shape(self.v))):
            if not _fits(shape, lead):
                raise Miss(f"%{value.name} cannot be given the leading axes {list(map(str, lead))}")
        dtypes = {self.q.dtype, self.k.dtype, self.v.dtype, found.out.output.dtype}
        if len(dtypes) != 1:
            raise Miss(
                f"queries, keys, values and result have different dtypes ({', '.join(sorted(dtypes))})"
            )
        mask = fx_raise_mask.Mask(self.graph, found.out, self.q.dtype, self.masks)
        scale, factors = mask.plan(found.steps, found.scores, self.scale, lead)

        emit = mask.emit
        added = mask.build(found.steps, found.scores, lead)
        q = self._bring(emit, self.q, self.q_turned)
        for step in factors:
            assert step.value is not None
            q = emit(aten.div.Tensor if step.kind == "divide" else aten.mul.Tensor, [q, step.value])
        k = self._bring(emit, self.k, self.k_turned)
        v = self._bring(emit, self.v, False)
        made = emit(aten.scaled_dot_product_attention.default, [q, k, v, added], {"scale": scale})
        self._connect(emit, made)

    def _bring(self, emit: fx_raise_mask.Emit, value: Value, turned: bool) -> Value:
        """`value` under the common leading axes, last axes in the order of queries."""
        shape = _shape(value)
        wanted = (*self.lead, *shape[-2:])
        if not same(shape, wanted):
            if same(product(shape[:-2]), product(self.lead)):
                value = emit(aten.reshape.default, [value], {"shape": list(wanted)})
            else:
                value = emit(aten.expand.default, [value], {"size": list(wanted)})
        if turned:
            value = emit(aten.transpose.int, [value], {"dim0": -2, "dim1": -1})
        return value

    def _connect(self, emit: fx_raise_mask.Emit, made: Value) -> None:
        """Let everything that read the old result read the new one."""
        old = self.found.out.output
        if same(_shape(made), _shape(old)):
            self.graph.replace_uses(old, made)
            return
        for user, _ in list(old.users):
            if user.kind == "reshape" and same(_shape(user.output), _shape(made)):
                self.graph.replace_uses(user.output, made)
        if any(user.output.users for user, _ in old.users) or old in self.graph.outputs:
            folded = emit(aten.reshape.default, [made], {"shape": list(_shape(old))})
            self.graph.replace_uses(old, folded)


def _shape(value: Value) -> Shape:
    if value.shape is None:
        raise Miss(f"%{value.name} has no known rank")
    return value.shape


def _turned(shape: Shape, turned: bool) -> Shape:
    return (*shape[:-2], shape[-1], shape[-2]) if turned else shape


def _turns(op: Op) -> bool:
    """Whether the op swaps the last two axes and nothing else."""
    if op.kind != "transpose":
        return False
    perm = tuple(op.attrs["perm"])
    count = len(perm)
    return count > 1 and perm == (*range(count - 2), count - 1, count - 2)


def _fits(shape: Shape, lead: Shape) -> bool:
    """Whether [*shape] can be reshaped or expanded to [*lead, *shape[-2:]]."""
    if same(product(shape[:-2]), product(lead)):
        return True
    return len(shape) == len(lead) + 2 and all(same(a, 1) or same(a, b) for a, b in zip(shape, lead))


def _unfolded(value: Value) -> Shape | None:
    """(batch, heads) of [batch * heads, n, d] where the folding can be seen."""
    for _ in range(4):
        op = value.producer
        source = op.inputs[0] if op is not None and op.inputs else None
        if op is None or source is None or source.shape is None or value.shape is None:
            return None
        if op.kind == "reshape":
            if source.rank == 4 and last_two_kept(op):
                return source.shape[:-2]
            heads = _sequence_first_heads(source.shape, value.shape)
            return None if heads is None else (source.shape[1], heads)
        if not (idle(op) or number_factor(op) is not None or op.kind == "transpose"):
            return None
        value = source
    return None


def _sequence_first_heads(before: Shape, after: Shape) -> int | None:
    """[n, b, h * d] -> [n, b * h, d]: the number of heads."""
    if len(before) != 3 or len(after) != 3 or not same(before[0], after[0]):
        return None
    wide, narrow = before[2], after[2]
    if not isinstance(wide, int) or not isinstance(narrow, int) or narrow < 1 or wide % narrow:
        return None
    heads = wide // narrow
    return heads if same(before[1] * heads, after[1]) else None
