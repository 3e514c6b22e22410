"""A ratio goes through the float32 of an ONNX attribute and still means the same fraction."""

from __future__ import annotations

import ctypes
import random
from fractions import Fraction

import torch
from elision.kernels import cpu
from elision.kernels.lengths import MOST_DENOMINATOR, fraction, wanted

from .. import onnx_call
from .sessions import open_session


def recovered(ratio: float) -> Fraction:
    """What the library makes of a float32."""
    library = ctypes.CDLL(str(cpu.library_path()))
    numerator, denominator = ctypes.c_int64(), ctypes.c_int64()
    library.elision_fraction.restype = None
    library.elision_fraction(
        ctypes.c_float(ratio),
        ctypes.c_int64(MOST_DENOMINATOR),
        ctypes.byref(numerator),
        ctypes.byref(denominator),
    )
    return Fraction(numerator.value, denominator.value)


def test_decimals_are_themselves() -> None:
    for digits in (1, 2, 3, 4):
        for k in range(10**digits + 1):
            assert fraction(k / 10**digits) == recovered(k / 10**digits) == Fraction(k, 10**digits)


def test_simple_fractions_are_themselves() -> None:
    for denominator in range(1, 100):
        for numerator in range(denominator + 1):
            meant = Fraction(numerator, denominator)
            assert fraction(numerator / denominator) == recovered(numerator / denominator) == meant


def test_any_other_number_is_one_fraction_to_both() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        ratio = rng.random() ** rng.choice([1, 2, 8])
        assert fraction(ratio) == recovered(ratio)
        assert abs(fraction(ratio) - Fraction(ratio)) < Fraction(1, MOST_DENOMINATOR)


def test_as_many_tokens_go_for_every_decimal_and_length() -> None:
    """Three digits and up to 5000 tokens: floor(n * k / 1000) in whole numbers."""
    for k in range(1001):
        share = recovered(k / 1000)
        for n in (*range(0, 100, 7), 196, 197, 577, 1000, 1024, 2000, 3999, 4096, 5000):
            assert n * share.numerator // share.denominator == n * k // 1000 == wanted(n, -1, k / 1000)


def test_the_node_removes_what_its_body_removes() -> None:
    for ratio in (0.1, 0.29, 0.3, 1 / 3, 0.333, 0.123457, 0.4999):
        metric = torch.randn(1, 100, 3)
        model = onnx_call.model("match_tokens", [metric], {"ratio": ratio})
        kernel, body = open_session(model), open_session(model, custom=False)
        for count in (*range(1, 60), 100, 300, 1000):
            feeds = {"metric": torch.randn(1, count, 3).numpy()}
            shapes = [[out.shape for out in session.run(None, feeds)] for session in (kernel, body)]
            gone = min(wanted(count, -1, ratio), count // 2)
            assert shapes[0] == shapes[1] == [(1, count), (1, count - gone), (1, gone)]
