"""Arithmetic on axis lengths that are ints, torch SymInts or sympy expressions."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.functions import FloorDiv, Min

Dim = Any
"""int, torch.SymInt or sympy.Expr."""

Shape = tuple[Dim, ...]


def least(a: Dim, b: Dim) -> Dim:
    """The smaller one, without deciding which where a length is symbolic."""
    if isinstance(a, sympy.Basic) or isinstance(b, sympy.Basic):
        operands: list[Any] = [sympy.sympify(a), sympy.sympify(b)]
        return plain(Min(*operands))
    for one, other in ((a, b), (b, a)):
        if statically_known_true(one <= other):
            return one
    return torch.sym_min(a, b)


def divide(a: Dim, b: int) -> Dim:
    """Floor division."""
    return plain(FloorDiv(a, sympy.Integer(b))) if isinstance(a, sympy.Basic) else a // b


def plain(a: Dim) -> Dim:
    """An int where the expression is one."""
    return int(a) if isinstance(a, sympy.Integer) else a


def fraction(ratio: float) -> Fraction:
    """The fraction a user means by `ratio`: 0.3 is 3/10, not the binary number next to it."""
    return Fraction(ratio).limit_denominator(10_000)


def wanted(length: Dim, r: int, ratio: float) -> Dim:
    """Tokens to remove out of `length`: r, or floor(length * ratio) when r is negative."""
    if r >= 0:
        return r
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"give r >= 0 or a ratio between 0 and 1, not r={r}, ratio={ratio}")
    share = fraction(ratio)
    return divide(length * share.numerator, share.denominator)


def removable(length: Dim, r: int, ratio: float, protected: int) -> Dim:
    """How many of `length` tokens a bipartite matching removes: at most half of the unprotected ones."""
    most = divide(length - protected, 2)
    if isinstance(most, int):
        most = max(0, most)
    return least(wanted(length, r, ratio), most)


def numel(shape: Shape | None) -> Dim:
    """Number of elements; 0 for an absent operand."""
    if shape is None:
        return 0
    total: Dim = 1
    for length in shape:
        total = total * length
    return total
