"""Axes as types: which axes of a graph's values are one and the same axis.

Every (value, axis) is a type variable. The signatures of `signatures.py` equate them by union-find; a reshape
equates products of axes, so a type is a product of *atoms* (axes that no reshape splits); a slice or a
concatenation relates an axis to an *interval* of another. Length 1 is the empty product, which is why
broadcasting needs no rule. Two passes over the operations, linear in the size of the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import sympy

from ..ir.graph import Dim, Graph, Op, Value
from . import signatures

AxisType = tuple[int, ...]
"""An axis as the product of its atoms, outermost first; empty for an axis of length 1."""

Size = tuple[int, int]
"""A length under two assignments of primes to the symbols: equal pairs are equal lengths."""

UNIT: Size = (1, 1)


class Lengths:
    """Turns symbolic lengths into pairs of integers, so that products of them can be compared and divided."""

    def __init__(self) -> None:
        self._primes: tuple[dict[sympy.Basic, int], dict[sympy.Basic, int]] = ({}, {})
        self._next = [10_007, 20_011]
        self._known: dict[Dim, Size] = {}

    def size(self, dim: Dim) -> Size:
        if isinstance(dim, int):
            return (dim, dim)
        found = self._known.get(dim)
        if found is None:
            for symbol in sorted(dim.free_symbols, key=str):
                for which in (0, 1):
                    if symbol not in self._primes[which]:
                        self._next[which] = int(sympy.nextprime(self._next[which]))
                        self._primes[which][symbol] = self._next[which]
            a, b = (sympy.sympify(dim.subs(list(primes.items()))) for primes in self._primes)
            found = (int(a), int(b)) if a.is_number and b.is_number else (hash(dim) | 1, hash((dim,)) | 1)
            self._known[dim] = found
        return found


@dataclass(eq=False)
class Axis:
    """One type variable: its length, what it is a product of, and which intervals of it have a name."""

    size: Size
    parent: Axis | None = None
    factors: list[Axis] | None = None
    intervals: dict[tuple[Size, Size], Axis] = field(default_factory=dict)  # (from start, from end) -> axis
    inside: list[tuple[Axis, Size, Size]] = field(default_factory=list)  # the axes this one is an interval of
    index: int = 0


class AxisTypes:
    """The types of all axes of a graph. Build once per graph; edits after that are not seen."""

    def __init__(self, graph: Graph) -> None:
        self.lengths = Lengths()
        self._axes: dict[Value, list[Axis | None]] = {}
        self._indexed: dict[int, Axis] = {}
        for _ in range(2):  # the second pass sees equalities that arise further down
            for op in graph.ops:
                self._solve(op)
        for value in graph.values():  # types are fixed now; lengths may change in place later
            if value.shape is not None:
                self._of(value)

    # ---- asking --------------------------------------------------------------------------------------
    def type(self, value: Value, axis: int) -> AxisType:
        """The product of atoms that axis `axis` of `value` is; () for length 1."""
        found = self._of(value)[axis]
        return () if found is None else tuple(a.index for a in self._atoms(find(found)))

    def types(self, value: Value) -> list[AxisType]:
        return [self.type(value, axis) for axis in range(value.rank)]

    def lengths_of(self, kind: AxisType) -> list[Size]:
        return [self._indexed[i].size for i in kind]

    def intervals_of(self, value: Value, axis: int) -> dict[AxisType, tuple[Size, Size]]:
        """Types of the known intervals of that axis, with how many positions lie before and after each."""
        found = self._of(value)[axis]
        if found is None:
            return {}
        return {
            tuple(a.index for a in self._atoms(find(part))): ends
            for ends, part in find(found).intervals.items()
        }

    def wholes_of(self, kind: AxisType) -> dict[AxisType, tuple[Size, Size]]:
        """Types of the axes that this one is an interval of, with how many positions lie before and after it."""
        if len(kind) != 1:
            return {}
        return {
            tuple(a.index for a in self._atoms(find(whole))): (start, end)
            for whole, start, end in find(self._indexed[kind[0]]).inside
        }

    # ---- solving -------------------------------------------------------------------------------------
    def _fresh(self, size: Size) -> Axis:
        axis = Axis(size, index=len(self._indexed))
        self._indexed[axis.index] = axis
        return axis

    def _of(self, value: Value) -> list[Axis | None]:
        found = self._axes.get(value)
        if found is None:
            sizes = [self.lengths.size(d) for d in value.shape or ()]
            found = [None if s == UNIT else self._fresh(s) for s in sizes]
            self._axes[value] = found
        return found

    def _port(self, value: Value, axis: int) -> Axis | None:
        found = self._of(value)[axis]
        return None if found is None else find(found)

    def _atoms(self, axis: Axis) -> list[Axis]:
        if axis.factors is None:
            return [axis]
        return [atom for factor in axis.factors for atom in self._atoms(find(factor))]

    def _solve(self, op: Op) -> None:
        for group in signatures.groups(op):
            ports = [p for p in (self._port(v, a) for v, a in group) if p is not None]
            for other in ports[1:]:
                self._unify(ports[0], other)
        if op.kind == "reshape":
            self._reshape(op)
        elif op.kind in ("slice", "split"):
            self._parts(op)
        elif op.kind == "concat":
            self._concat(op)

    def _unify(self, a: Axis, b: Axis) -> None:
        a, b = find(a), find(b)
        if a is b or a.size != b.size or self._contains(a, b) or self._contains(b, a):
            return
        if b.factors is not None and a.factors is not None:
            if not self._refine([find(f) for f in a.factors], [find(f) for f in b.factors]):
                return
        elif b.factors is not None:
            a.factors = b.factors
        b.parent = a
        a.inside += b.inside
        for ends, part in b.intervals.items():
            known = a.intervals.get(ends)
            if known is None:
                a.intervals[ends] = part
            else:
                self._unify(known, part)

    def _contains(self, whole: Axis, part: Axis) -> bool:
        return whole.factors is not None and any(
            find(f) is part or self._contains(find(f), part) for f in whole.factors
        )

    def _refine(self, left: list[Axis], right: list[Axis]) -> bool:
        """Equate two products of axes, splitting atoms where one side is finer. False where neither is."""
        left, right = left[::-1], right[::-1]
        while left and right:
            a, b = find(left.pop()), find(right.pop())
            if a.size == b.size:
                self._unify(a, b)
                continue
            if divides(b.size, a.size):
                left += self._split(a, b.size)[::-1]
                right.append(b)
            elif divides(a.size, b.size):
                right += self._split(b, a.size)[::-1]
                left.append(a)
            else:
                return False
        return not left and not right

    def _split(self, axis: Axis, outer: Size) -> list[Axis]:
        if axis.factors is None:
            inner = (axis.size[0] // outer[0], axis.size[1] // outer[1])
            axis.factors = [self._fresh(outer), self._fresh(inner)]
        return axis.factors

    def _reshape(self, op: Op) -> None:
        x = op.operand(0)
        if x is None or x.shape is None or op.output.shape is None:
            return
        before = [find(a) for a in self._of(x) if a is not None]
        after = [find(a) for a in self._of(op.output) if a is not None]
        for a, b in aligned(before, after):
            if len(a) == len(b) == 1:
                self._unify(a[0], b[0])
            elif len(a) == 1 and a[0].factors is None and not any(self._contains(f, a[0]) for f in b):
                a[0].factors = b
            elif len(b) == 1 and b[0].factors is None and not any(self._contains(f, b[0]) for f in a):
                b[0].factors = a
            else:
                self._refine(list(a), list(b))

    # ---- intervals -----------------------------------------------------------------------------------
    def _interval(self, whole: Axis, start: Size, end: Size, part: Axis) -> None:
        """`part` is `whole` without `start` positions at its beginning and `end` at its end."""
        whole, part = find(whole), find(part)
        if start == (0, 0) and end == (0, 0):
            self._unify(whole, part)
            return
        known = whole.intervals.get((start, end))
        if known is None:
            whole.intervals[(start, end)] = part
            part.inside.append((whole, start, end))
        else:
            self._unify(known, part)

    def _parts(self, op: Op) -> None:
        x, axis = op.operand(0), op.attrs["axis"]
        whole = None if x is None or x.shape is None else self._port(x, axis)
        if whole is None or op.attrs.get("step", 1) != 1:
            return
        start: Size | None = (0, 0)
        if op.kind == "slice":
            start = self._bound(op.attrs["start"], whole.size)
        for out in op.outputs:
            if start is None or out.shape is None:
                return
            length = self.lengths.size(out.shape[axis])
            part = self._port(out, axis)
            end = (whole.size[0] - start[0] - length[0], whole.size[1] - start[1] - length[1])
            if part is not None and min(end) >= 0 and min(start) >= 0:
                self._interval(whole, start, end, part)
            start = (start[0] + length[0], start[1] + length[1])

    def _bound(self, bound: object, whole: Size) -> Size | None:
        if bound is None:
            return (0, 0)
        if isinstance(bound, int | sympy.Expr):
            size = self.lengths.size(int(bound) if isinstance(bound, int) else bound)
            return size if size[0] >= 0 else (whole[0] + size[0], whole[1] + size[1])
        return None

    def _concat(self, op: Op) -> None:
        axis = op.attrs["axis"]
        whole = self._port(op.output, axis)
        operands = [v for v in op.inputs if v is not None and v.shape is not None]
        if whole is None or len(operands) != len(op.inputs):
            return
        sizes = [self.lengths.size(v.shape[axis]) for v in operands if v.shape is not None]
        before = (0, 0)
        placed: list[tuple[Axis, Size, Size]] = []
        for value, size in zip(operands, sizes):
            after = (whole.size[0] - before[0] - size[0], whole.size[1] - before[1] - size[1])
            part = self._port(value, axis)
            if part is not None:
                placed.append((part, before, after))
            before = (before[0] + size[0], before[1] + size[1])
        for part, start, end in placed:  # put back where a slice took it from
            for other, a, b in list(find(part).inside):
                if (a, b) == (start, end) and find(other).size == whole.size:
                    self._unify(find(other), whole)
        for part, start, end in placed:
            self._interval(whole, start, end, part)


def find(axis: Axis) -> Axis:
    """The representative of an axis' class, with path halving."""
    while axis.parent is not None:
        if axis.parent.parent is not None:
            axis.parent = axis.parent.parent
        axis = axis.parent
    return axis


def divides(small: Size, large: Size) -> bool:
    return all(s > 0 and b % s == 0 for s, b in zip(small, large))


def product(axes: Iterable[Axis]) -> Size:
    a, b = 1, 1
    for axis in axes:
        a, b = a * axis.size[0], b * axis.size[1]
    return a, b


def aligned(before: Sequence[Axis], after: Sequence[Axis]) -> list[tuple[list[Axis], list[Axis]]]:
    """The smallest groups of consecutive axes with equal products, left to right; [] where there are none."""
    found: list[tuple[list[Axis], list[Axis]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        a, b = [before[i]], [after[j]]
        i, j = i + 1, j + 1
        while product(a) != product(b):
            if product(a)[0] < product(b)[0]:
                if i == len(before):
                    return found
                a.append(before[i])
                i += 1
            else:
                if j == len(after):
                    return found
                b.append(after[j])
                j += 1
        found.append((a, b))
    return found
