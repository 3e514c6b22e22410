"""Arithmetic on axis lengths that are ints, torch SymInts or sympy expressions."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import sympy
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.functions import FloorDiv, Min

Dim = Any
"""int, torch.SymInt or sympy.Expr."""

Shape = tuple[Dim, ...]

MOST_DENOMINATOR = 10_000


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


@functools.lru_cache(maxsize=1024)
def fraction(ratio: float) -> Fraction:
    """The fraction a user means by `ratio`: 0.3 is 3/10, not the binary number next to it.

    An attribute in an ONNX file keeps a float32. Of what rounds to the same one it is a decimal of four digits, else
    the simplest fraction; else the closest with a denominator up to MOST_DENOMINATOR. So does csrc/interface.cc."""
    single = np.float32(ratio)
    exact, beyond = Fraction(float(single)), Fraction(float(np.nextafter(single, np.float32(2))))
    slack = (beyond - exact) / 2
    decimal = Fraction(round(exact * MOST_DENOMINATOR), MOST_DENOMINATOR)
    if abs(decimal - exact) <= slack:
        return decimal
    found = _simplest(exact - slack, exact + slack)
    return found if found.denominator <= MOST_DENOMINATOR else exact.limit_denominator(MOST_DENOMINATOR)


def _simplest(low: Fraction, high: Fraction) -> Fraction:
    """The fraction with the smallest denominator in [low, high]."""
    whole = math.ceil(low)
    if whole <= high:
        return Fraction(whole)
    return whole - 1 + 1 / _simplest(1 / (high - whole + 1), 1 / (low - whole + 1))


def floor_of(length: Dim, ratio: float) -> Dim:
    """floor(length * ratio), of the fraction that `ratio` means."""
    share = fraction(ratio)
    return divide(length * share.numerator, share.denominator)


def wanted(length: Dim, r: int, ratio: float) -> Dim:
    """Tokens to remove out of `length`: r, or floor(length * ratio) when r is negative."""
    if r >= 0:
        return r
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"give r >= 0 or a ratio between 0 and 1, not r={r}, ratio={ratio}")
    return floor_of(length, ratio)


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
