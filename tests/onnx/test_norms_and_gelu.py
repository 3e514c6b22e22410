"""Decomposed LayerNorm, RMSNorm and Gelu in many spellings, and what must not be taken for one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from onnx import TensorProto

from .onnx_tools import Builder, check

N, C = 5, 16


def feed(batch: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(1, 2, size=(batch, N, C)).astype(np.float32)}


def start(opset: int = 17) -> tuple[Builder, str]:
    b = Builder(opset)
    return b, b.input("x", ["batch", N, C])


@pytest.mark.parametrize("opset", [11, 12, 13, 15, 16, 18, 21])
@pytest.mark.parametrize("square", ["Pow", "Mul", "twice"])
@pytest.mark.parametrize("root", ["Div", "Reciprocal", "Pow"])
def test_layer_norm(opset: int, square: str, root: str) -> None:
    b, x = start(opset)
    centred = b("Sub", x, b.reduce("ReduceMean", x, [-1]))
    inner = b("Sub", x, b.reduce("ReduceMean", x, [-1])) if square == "twice" else centred
    squared = b("Mul", inner, inner) if square == "Mul" else b("Pow", inner, b.const(2.0))
    variance = b("Add", b.reduce("ReduceMean", squared, [-1]), b.const(1e-6))
    if root == "Div":
        y = b("Div", centred, b("Sqrt", variance))
    elif root == "Reciprocal":
        y = b("Mul", centred, b("Reciprocal", b("Sqrt", variance)))
    else:
        y = b("Mul", centred, b("Pow", variance, b.const(-0.5)))
    b.output(b("Add", b("Mul", b.weight(C), y), b.weight(C)))
    graph, _ = check(b.model(), feed(), feed(1), LayerNormalization=1)
    (op,) = graph.ops_of("norm")
    assert op.attrs["axes"] == (2,)
    assert op.attrs["epsilon"] == pytest.approx(1e-6)
    assert len(op.inputs) == 3
    assert len(graph.ops) == 1


@pytest.mark.parametrize("affine", ["none", "weight", "bias"])
def test_layer_norm_with_part_of_the_affine(affine: str) -> None:
    b, x = start()
    centred = b("Sub", x, b.reduce("ReduceMean", x, [2]))
    variance = b("Add", b.reduce("ReduceMean", b("Pow", centred, b.const(2.0)), [2]), b.const(1e-5))
    y = b("Div", centred, b("Sqrt", variance))
    if affine == "weight":
        y = b("Mul", y, b.weight(C))
    elif affine == "bias":
        y = b("Add", y, b.weight(1, 1, C))
    b.output(b("Relu", y))
    check(b.model(), feed(), LayerNormalization=1)


@pytest.mark.parametrize("opset", [11, 13, 17, 18])
@pytest.mark.parametrize("form", ["rsqrt", "div", "one over", "weight first"])
def test_rms_norm(opset: int, form: str) -> None:
    b, x = start(opset)
    mean = b.reduce("ReduceMean", b("Pow", x, b.const(2.0)), [-1])
    root = b("Sqrt", b("Add", mean, b.const(1e-5)))
    if form == "div":
        y = b("Mul", b("Div", x, root), b.weight(C))
    elif form == "one over":
        y = b("Mul", b("Mul", x, b("Div", b.const(1.0), root)), b.weight(C))
    else:
        y = b("Mul", x, b("Reciprocal", root))
        y = b("Mul", b.weight(C), y) if form == "weight first" else b("Mul", y, b.weight(C))
    b.output(y)
    graph, _ = check(b.model(), feed(), RMSNormalization=1)
    assert [op.attrs["fn"] for op in graph.ops_of("norm")] == ["rms_norm"]


def test_the_residual_of_an_rms_norm_is_no_bias() -> None:
    b, x = start()
    mean = b.reduce("ReduceMean", b("Mul", x, x), [-1])
    y = b("Mul", x, b("Reciprocal", b("Sqrt", b("Add", mean, b.const(1e-5)))))
    b.output(b("Add", b("Mul", y, b.weight(C)), x))
    check(b.model(), feed(), RMSNormalization=1)


def test_a_norm_over_tokens_stays() -> None:
    b, x = start()
    centred = b("Sub", x, b.reduce("ReduceMean", x, [1]))
    variance = b("Add", b.reduce("ReduceMean", b("Mul", centred, centred), [1]), b.const(1e-5))
    b.output(b("Div", centred, b("Sqrt", variance)))
    _, report = check(b.model(), feed(), LayerNormalization=0, RMSNormalization=0)
    assert any("not the last" in line for line in report.near_misses)


def test_a_norm_whose_parts_are_used_elsewhere() -> None:
    b, x = start()
    mean = b.reduce("ReduceMean", x, [-1])
    centred = b("Sub", x, mean)
    variance = b("Add", b.reduce("ReduceMean", b("Mul", centred, centred), [-1]), b.const(1e-5))
    b.output(mean)
    b.output(b("Mul", b("Div", centred, b("Sqrt", variance)), b.weight(C)))
    check(b.model(), feed(), LayerNormalization=1)


GELUS = {
    "erf": lambda b, x: b(
        "Mul",
        b("Mul", x, b("Add", b("Erf", b("Div", x, b.const(math.sqrt(2)))), b.const(1.0))),
        b.const(0.5),
    ),
    "erf, half first": lambda b, x: b(
        "Mul",
        b("Mul", b.const(0.5), x),
        b("Add", b.const(1.0), b("Erf", b("Mul", x, b.const(math.sqrt(0.5))))),
    ),
    "erf, half inside": lambda b, x: b(
        "Mul",
        x,
        b("Mul", b.const(0.5), b("Add", b.const(1.0), b("Erf", b("Mul", x, b.const(math.sqrt(0.5)))))),
    ),
    "tanh": lambda b, x: b(
        "Mul",
        b("Mul", b.const(0.5), x),
        b(
            "Add",
            b.const(1.0),
            b(
                "Tanh",
                b(
                    "Mul",
                    b.const(math.sqrt(2 / math.pi)),
                    b("Add", x, b("Mul", b.const(0.044715), b("Pow", x, b.const(3.0)))),
                ),
            ),
        ),
    ),
    "tanh, cube by products": lambda b, x: b(
        "Mul",
        b("Mul", b.const(0.5), x),
        b(
            "Add",
            b(
                "Tanh",
                b(
                    "Mul",
                    b("Mul", x, b.const(0.7978845608)),
                    b("Add", b.const(1.0), b("Mul", b("Mul", x, x), b.const(0.044715))),
                ),
            ),
            b.const(1.0),
        ),
    ),
}


@pytest.mark.parametrize("name", GELUS)
@pytest.mark.parametrize("opset", [11, 13, 18])
def test_gelu(name: str, opset: int) -> None:
    b, x = start(opset)
    hidden = b("Add", b("MatMul", x, b.weight(C, C)), b.weight(C))
    b.output(GELUS[name](b, hidden))
    tanh = name.startswith("tanh")
    graph, _ = check(b.model(), feed(), **{"Gelu (tanh)" if tanh else "Gelu": 1})
    (op,) = [op for op in graph.ops_of("elementwise") if op.attrs["fn"] == "gelu"]
    assert op.attrs["approximate"] == ("tanh" if tanh else "none")


def test_what_is_nearly_a_gelu_is_none() -> None:
    b, x = start()
    inner = b("Add", b("Erf", b("Mul", x, b.const(0.8))), b.const(1.0))
    b.output(b("Mul", b("Mul", x, inner), b.const(0.5)))
    check(b.model(), feed(), Gelu=0)


def test_half_precision() -> None:
    b = Builder(17)
    x = b.input("x", ["batch", N, C], TensorProto.FLOAT16)
    wide = b("Cast", x, to=TensorProto.FLOAT)
    centred = b("Sub", wide, b.reduce("ReduceMean", wide, [-1]))
    variance = b("Add", b.reduce("ReduceMean", b("Mul", centred, centred), [-1]), b.const(1e-5))
    y = b("Mul", b("Div", centred, b("Sqrt", variance)), b.weight(C))
    b.output(b("Cast", y, to=TensorProto.FLOAT16), TensorProto.FLOAT16)
    check(b.model(), {"x": feed()["x"].astype(np.float16)}, tolerance=2e-3, LayerNormalization=1)
