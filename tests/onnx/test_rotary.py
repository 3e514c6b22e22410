"""Rotary positions in the operators of the standard and of com.microsoft, written out."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from .onnx_tools import Builder, check

H, D, MOST = 2, 8, 12


def tables(part: int) -> list[np.ndarray]:
    angles = np.arange(MOST)[:, None] * 0.3 ** np.arange(part // 2)
    return [np.cos(angles), np.sin(angles)]


@pytest.mark.parametrize("pairs", [0, 1])
@pytest.mark.parametrize("part", [0, 4])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("given", ["positions", "rows"])
def test_standard(pairs: int, part: int, flat: bool, given: str) -> None:
    b = Builder(23)
    x = b.input("x", ["batch", "n", H * D] if flat else ["batch", H, "n", D])
    attrs: dict[str, int] = {"interleaved": pairs} | ({"num_heads": H} if flat or part else {})
    if part:
        attrs["rotary_embedding_dim"] = part
    cos, sin = tables(part or D)
    positions = np.array([[3, 0, 7, 2, 2], [1, 2, 3, 4, 5]])
    feed = {
        "x": np.random.default_rng(0).normal(size=(2, 5, H * D) if flat else (2, H, 5, D)).astype(np.float32)
    }
    if given == "positions":
        at = b.input("at", ["batch", "n"], TensorProto.INT64)
        y = b("RotaryEmbedding", x, b.const(cos), b.const(sin), at, **attrs)
        feed["at"] = positions
    else:
        rows = [b.input(name, ["batch", "n", (part or D) // 2]) for name in ("cos", "sin")]
        y = b("RotaryEmbedding", x, *rows, **attrs)
        feed |= {"cos": cos[positions].astype(np.float32), "sin": sin[positions].astype(np.float32)}
    b.output(y)
    graph, _ = check(b.model(), feed, **{"rotary positions written out": 1})
    assert not graph.ops_of("unknown")


@pytest.mark.parametrize("pairs", [0, 1])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("offset", [False, True])
def test_contrib(pairs: int, flat: bool, offset: bool) -> None:
    b = Builder(17)
    x = b.input("x", ["batch", "n", H * D] if flat else ["batch", H, "n", D])
    at = b.input("at", [1] if offset else ["batch", "n"], TensorProto.INT64)
    cos, sin = (b.const(table) for table in tables(D))
    b.output(b("RotaryEmbedding", x, at, cos, sin, domain="com.microsoft", interleaved=pairs))
    shape = (2, 5, H * D) if flat else (2, H, 5, D)
    feed = {
        "x": np.random.default_rng(0).normal(size=shape).astype(np.float32),
        "at": np.array([4]) if offset else np.array([[3, 0, 7, 2, 2], [1, 2, 3, 4, 5]]),
    }
    graph, _ = check(b.model(), feed, **{"rotary positions written out": 1})
    assert not graph.ops_of("unknown")
