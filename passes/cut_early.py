"""Cutting what runs over pairs of tokens where it is made, not where it is read.

A mask of all pairs is made of far less: of two vectors of positions that are compared, of one flag for each key, of a
table. What computes it element by element gives the same elements for the kept tokens when its operands are cut
instead, and the matrix of all pairs is then never written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .analysis.flow import SHAPE_ONLY
from .errors import VerificationError
from .ir.graph import Dim, Op, Value

if TYPE_CHECKING:
    from .cut_maps import Crossing, Layout, Level

DEPTH = 16
"""At most so many ops are walked back from a value."""

RANDOM = frozenset({"rand_like", "randn_like", "bernoulli"})


class EarlyCut:
    """Cuts values of a `Crossing` whose rows are pairs of tokens by cutting what they are made of.

    An op is repeated behind the cut where at most one of its operands is itself a matrix of pairs that must be cut as
    such: then nothing is read that is larger than the op's result, which need not be there."""

    def __init__(self, crossing: Crossing) -> None:
        self.crossing = crossing
        self._leaves: dict[Value, int] = {}
        self._made: dict[tuple[Value, int, Layout], Value] = {}

    def made(self, value: Value, steps: list[Level], layout: Layout) -> Value | None:
        """`value`, which has all tokens, with those that are left after `steps`, in `layout`; None where it has to be
        cut itself."""
        crossing = self.crossing
        if any(step.segments for step in steps) or not self._opens(value, DEPTH):
            return None
        try:
            made = self._cut(value, steps, layout, DEPTH)
        except VerificationError:
            return None  # an operand says a length of its own; what was inserted is dead
        shift = layout[0] - value.rank
        lengths = [
            (axis + shift, crossing.length(steps[-1], ends))
            for axis, ends in crossing.analysis.token_axes(crossing.space, value)
        ]
        fits = made.shape is not None and made.rank == layout[0]
        return made if fits and all((made.shape or ())[axis] == length for axis, length in lengths) else None

    # ---- what is worth it ----------------------------------------------------------------------------
    def _pairs(self, value: Value) -> bool:
        return len(self.crossing.analysis.token_axes(self.crossing.space, value)) > 1

    def _count(self, value: Value, depth: int) -> int:
        """How many matrices of pairs are cut when `value` is."""
        if not self._pairs(value):
            return 0
        if value not in self._leaves:
            parts = self._operands(value) if depth else None
            found = 1 if parts is None else sum(self._count(v, depth - 1) for v in dict.fromkeys(parts))
            self._leaves[value] = found
        return min(self._leaves[value], 1)

    def _opens(self, value: Value, depth: int) -> bool:
        """True when `value` is cut by cutting its operands."""
        if not depth or not self._pairs(value) or self._operands(value) is None:
            return False
        self._count(value, depth)
        return self._leaves[value] <= 1

    def _operands(self, value: Value) -> list[Value] | None:
        """What the elements of `value` are computed from, each from those at its own place; None where that is not so,
        or where some of it was cut before."""
        crossing, op = self.crossing, value.producer
        if op is None or len(op.outputs) != 1 or not self._by_element(op):
            return None
        operands = [v for v in op.inputs if v is not None]
        known = all(crossing.level(v) is crossing.ground and crossing.current(v) is v for v in operands)
        own = any(crossing.analysis.token_axes(crossing.space, v) for v in operands)
        return operands if known and own else None

    def _by_element(self, op: Op) -> bool:
        fn = op.attrs.get("fn")
        if op.kind == "elementwise":
            return fn not in RANDOM | SHAPE_ONLY and not (fn == "dropout" and op.attrs.get("train"))
        x, out = op.inputs[0] if op.inputs else None, op.output
        if x is None or x.shape is None or out.shape is None:
            return False
        if op.kind == "reshape":
            return _in_front(op) or self._adds_units(op)
        return op.kind in ("tie", "expand")

    def _adds_units(self, op: Op) -> bool:
        """True for axes of length 1 that come or go while the batch stays what it is."""
        crossing, x, out = self.crossing, op.inputs[0], op.output
        assert x is not None
        batches = [crossing.analysis.batch_axis(crossing.space, v) for v in (x, out)]
        lengths = [[d for d in v.shape or () if d != 1] for v in (x, out)]
        return lengths[0] == lengths[1] and (None not in batches or not crossing.space.batch)

    # ---- doing it ------------------------------------------------------------------------------------
    def _cut(self, value: Value, steps: list[Level], layout: Layout, depth: int) -> Value:
        crossing = self.crossing
        axes = crossing.analysis.token_axes(crossing.space, value)
        if not axes:
            return value
        key = (value, steps[-1].number, layout)
        if key not in self._made:
            if self._opens(value, depth):
                self._made[key] = self._again(value, steps, layout, depth - 1)
            else:
                x = value
                for step in steps:
                    here = (value, step.number, layout)
                    if here not in self._made:
                        self._made[here] = crossing.selected(x, axes, step, value.rank, layout)
                    x = self._made[here]
        return self._made[key]

    def _again(self, value: Value, steps: list[Level], layout: Layout, depth: int) -> Value:
        """What makes `value`, behind the cut."""
        crossing, op = self.crossing, value.producer
        assert op is not None
        if op.kind == "reshape" and not _in_front(op):
            return self._reshaped(op, steps, layout, depth)
        inputs = [v if v is None else self._cut(v, steps, layout, depth) for v in op.inputs]
        if op.kind == "elementwise":
            crossing.count("ops over pairs behind the cut")
            made = crossing.graph.repeat(op, inputs, after=crossing.cursor)[0]
            crossing.cursor = made.producer
            return made
        assert inputs[0] is not None
        return self._expanded(value, inputs[0], steps[-1], layout) if op.kind == "expand" else inputs[0]

    def _reshaped(self, op: Op, steps: list[Level], layout: Layout, depth: int) -> Value:
        crossing, x = self.crossing, op.inputs[0]
        assert x is not None
        batch = crossing.analysis.batch_axis(crossing.space, x)
        fewer = self._cut(x, steps, (x.rank, -1 if batch is None else batch), depth)
        return self._inserted("reshape", fewer, self._shape(op.output, steps[-1], layout))

    def _expanded(self, value: Value, x: Value, step: Level, layout: Layout) -> Value:
        crossing = self.crossing
        assert x.shape is not None
        shape = self._shape(value, step, layout)
        if layout[1] >= 0 and crossing.analysis.batch_axis(crossing.space, value) is None:
            shape[layout[1]] = x.shape[layout[1]] if x.rank == layout[0] else 1
        return self._inserted("expand", x, shape)

    def _shape(self, value: Value, step: Level, layout: Layout) -> list[Dim]:
        """That of `value` behind the cut."""
        assert value.shape is not None
        shape: list[Dim] = [*(1,) * (layout[0] - value.rank), *value.shape]
        for axis, ends in self.crossing.analysis.token_axes(self.crossing.space, value):
            shape[axis + layout[0] - value.rank] = self.crossing.length(step, ends)
        return shape

    def _inserted(self, kind: str, x: Value, shape: list[Dim]) -> Value:
        if tuple(x.shape or ()) == tuple(shape):
            return x
        made = self.crossing.graph.insert_plain(kind, [x], {"shape": shape}, after=self.crossing.cursor)
        self.crossing.cursor = made.producer
        return made


def _in_front(op: Op) -> bool:
    """Whether a reshape does no more than to put axes of length 1 in front."""
    x, out = op.inputs[0], op.output
    assert x is not None and x.shape is not None and out.shape is not None
    return tuple(out.shape) == (1,) * (out.rank - x.rank) + tuple(x.shape)
