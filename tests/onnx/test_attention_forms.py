"""Decomposed attention in every spelling that exporters write: found, and still the same function."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from onnx import TensorProto, numpy_helper

from .onnx_tools import Builder, check

B, H, N, D = 2, 3, 7, 8
C = H * D
OPSETS = (11, 12, 13, 14, 15, 17, 18, 20, 21)


def feed(batch: int = B, n: int = N, seed: int = 1) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(size=(batch, n, C)).astype(np.float32)}


def heads(b: Builder, x: str, perm: tuple[int, ...] = (0, 2, 1, 3), h: int = H, n: int = N) -> str:
    """Project x and split heads: [b, n, c] -> [b, h, n, d], or another order."""
    y = b("Add", b("MatMul", x, b.weight(C, h * D)), b.weight(h * D))
    return b("Transpose", b("Reshape", y, b.ints(-1, n, h, D)), perm=list(perm))


def join(b: Builder, y: str, n: int = N) -> None:
    y = b("Reshape", b("Transpose", y, perm=[0, 2, 1, 3]), b.ints(-1, n, C))
    b.output(b("MatMul", y, b.weight(C, C)))


def softmax(b: Builder, s: str, rank: int = 4) -> str:
    return b("Softmax", s, axis=rank - 1 if b.opset < 13 else -1)


SCALES: dict[str, Callable[[Builder, str, str], tuple[str, str, Callable[[str], str]]]] = {}


def scale(name: str):
    def add(function):
        SCALES[name] = function
        return function

    return add


def same(s: str) -> str:
    return s


@scale("divided after")
def _(b, q, k):
    return q, k, lambda s: b("Div", s, b.const(math.sqrt(D)))


@scale("multiplied after, number first")
def _(b, q, k):
    return q, k, lambda s: b("Mul", b.const([D**-0.5]), s)


@scale("queries multiplied")
def _(b, q, k):
    return b("Mul", q, b.const(D**-0.5)), k, same


@scale("queries divided")
def _(b, q, k):
    return b("Div", q, b.const(math.sqrt(D))), k, same


@scale("root on both")
def _(b, q, k):
    root = b("Sqrt", b.const([D**-0.5]))
    return b("Mul", q, root), b("Mul", k, root), same


@scale("on the keys")
def _(b, q, k):
    return q, b("Div", k, b.const(math.sqrt(D))), same


@scale("none")
def _(b, q, k):
    return q, k, same


@scale("on queries and scores")
def _(b, q, k):
    return b("Mul", q, b.const(0.5)), k, lambda s: b("Mul", s, b.const(0.7))


@pytest.mark.parametrize("name", SCALES)
def test_scale_anywhere(name: str) -> None:
    b = Builder(17)
    x = b.input("x", ["batch", N, C])
    q, k, after = SCALES[name](b, heads(b, x), heads(b, x, (0, 2, 3, 1)))
    join(b, b("MatMul", softmax(b, after(b("MatMul", q, k))), heads(b, x)))
    graph, _ = check(b.model(), feed(), feed(5), Attention=1)
    (op,) = graph.ops_of("attention")
    wanted = {"none": 1.0, "on queries and scores": 0.35}.get(name, D**-0.5)
    assert op.attrs["scale"] == pytest.approx(wanted, rel=1e-6)
    assert [v.shape[1:] for v in op.inputs if v is not None] == [(H, N, D)] * 3


@pytest.mark.parametrize("spelling", ["products", "quotient", "grouped"])
@pytest.mark.parametrize("mask", [None, "Add", "Where"])
def test_capped_scores(spelling: str, mask: str | None) -> None:
    """cap * tanh(scores * scale / cap), in whatever order the factors come; the mask after it."""
    b = Builder(17)
    x = b.input("x", ["batch", N, C])
    q, k, v = heads(b, x), heads(b, x, (0, 2, 3, 1)), heads(b, x)
    if spelling == "grouped":
        few = [b("Slice", h, b.ints(0), b.ints(1), b.ints(1)) for h in (heads(b, x), heads(b, x))]
        k, v = (
            b("Reshape", b("Expand", b.unsqueeze(h, [2]), b.ints(1, 1, H, 1, 1)), b.ints(0, H, N, D))
            for h in few
        )
        k = b("Transpose", k, perm=[0, 1, 3, 2])
    scores = b("Mul", b("MatMul", q, k), b.const(D**-0.5))
    scores = b("Div", scores, b.const(3.0)) if spelling == "quotient" else b("Mul", scores, b.const(1 / 3))
    scores = b("Mul", b.const(3.0), b("Tanh", scores))
    keep = np.tril(np.ones((N, N), bool))
    if mask == "Add":
        scores = b("Add", scores, b.const(np.where(keep, 0, -1e9)))
    elif mask == "Where":
        scores = b("Where", b.const(keep, bool), scores, b.const(-np.inf))
    join(b, b("MatMul", softmax(b, scores), v))
    graph, _ = check(b.model(), feed(), feed(3), Attention=1)
    (op,) = graph.ops_of("attention")
    assert op.attrs["softcap"] == pytest.approx(3.0)
    assert op.attrs["scale"] == pytest.approx(D**-0.5)
    assert len(op.inputs) == 3 + (mask is not None)
    assert op.inputs[1].shape[1] == (1 if spelling == "grouped" else H)


def test_a_mask_before_the_cap_stays() -> None:
    b = Builder(17)
    x = b.input("x", ["batch", N, C])
    scores = b("Add", b("MatMul", heads(b, x), heads(b, x, (0, 2, 3, 1))), b.weight(N, N))
    join(b, b("MatMul", softmax(b, b("Tanh", scores)), heads(b, x)))
    _, report = check(b.model(), feed(), Attention=0)
    assert any("stands before the tanh" in line for line in report.near_misses)


@pytest.mark.parametrize("opset", OPSETS)
def test_every_operator_set(opset: int) -> None:
    b = Builder(opset)
    x = b.input("x", ["batch", N, C])
    scores = b("MatMul", heads(b, x), heads(b, x, (0, 2, 3, 1)))
    weights = softmax(b, b("Div", scores, b.const(math.sqrt(D))))
    join(b, b("MatMul", weights, heads(b, x)))
    check(b.model(), feed(), feed(1), Attention=1)


@pytest.mark.parametrize("form", ["at once", "two transposes", "folded heads", "einsum"])
def test_keys_transposed(form: str) -> None:
    b = Builder(17)
    x = b.input("x", ["batch", N, C])
    q, v = heads(b, x), heads(b, x)
    if form == "einsum":
        scores = b("Einsum", q, heads(b, x), equation="bhid,bhjd->bhij")
        weights = softmax(b, b("Mul", scores, b.const(D**-0.5)))
        join(b, b("Einsum", weights, v, equation="bhij,bhjd->bhid"))
    elif form == "folded heads":
        fold = [b("Reshape", heads(b, x), b.ints(-1, N, D)) for _ in range(3)]
        scores = b("MatMul", b("Mul", fold[0], b.const(0.2)), b("Transpose", fold[1], perm=[0, 2, 1]))
        out = b("MatMul", softmax(b, scores, 3), fold[2])
        join(b, b("Reshape", out, b.ints(-1, H, N, D)))
    else:
        k = heads(b, x, (0, 2, 3, 1)) if form == "at once" else b("Transpose", heads(b, x), perm=[0, 1, 3, 2])
        join(b, b("MatMul", softmax(b, b("MatMul", q, k)), v))
    check(b.model(), feed(), feed(3), Attention=1)


MASKS = {
    "row": (["batch", 1, 1, N], "Add"),
    "pairwise": ([1, 1, N, N], "Add"),
    "rank 2": ([N, N], "Add"),
    "per head": ([1, H, N, N], "Add"),
    "everything": (["batch", H, N, N], "Add"),
    "chosen": (["batch", 1, 1, N], "Where"),
    "chosen pairwise": ([1, 1, N, N], "Where"),
    "filled": (["batch", 1, 1, N], "masked_fill"),
    "filled with a number": (["batch", 1, 1, N], "finite"),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("opset", [13, 18])
def test_masks(name: str, opset: int) -> None:
    shape, form = MASKS[name]
    b = Builder(opset)
    x = b.input("x", ["batch", N, C])
    boolean = form != "Add"
    mask = b.input("mask", shape, TensorProto.BOOL if boolean else TensorProto.FLOAT)
    scores = b("MatMul", heads(b, x), heads(b, x, (0, 2, 3, 1)))
    if form == "Add":
        scores = b("Add", b("Div", scores, b.const(math.sqrt(D))), mask)
    elif form == "Where":
        scores = b("Where", mask, b("Div", scores, b.const(math.sqrt(D))), b.const(-np.inf))
    else:
        low = -np.inf if form == "masked_fill" else -3.4e38
        scores = b("Where", b("Not", mask), b.const(low), b("Div", scores, b.const(math.sqrt(D))))
    join(b, b("MatMul", softmax(b, scores), heads(b, x)))
    rng = np.random.default_rng(3)
    feeds = []
    for batch in (2, 5):
        full = [batch if d == "batch" else d for d in shape]
        keep = rng.random(full) > 0.4
        keep[..., 0] = True
        found = feed(batch)
        found["mask"] = keep if boolean else np.where(keep, rng.normal(size=full), -1e9).astype(np.float32)
        feeds.append(found)
    graph, _ = check(b.model(), *feeds, Attention=1)
    (op,) = graph.ops_of("attention")
    assert op.inputs[3] is not None


def test_mask_before_the_scale() -> None:
    b = Builder(17)
    x = b.input("x", ["batch", N, C])
    scores = b("Add", b("MatMul", heads(b, x), heads(b, x, (0, 2, 3, 1))), b.weight(N, N))
    join(b, b("MatMul", softmax(b, b("Mul", scores, b.const(0.3))), heads(b, x)))
    check(b.model(), feed(), Attention=1)


def test_relative_positions_and_a_mask() -> None:
    b = Builder(17)
    x = b.input("x", ["batch", N, C])
    mask = b.input("mask", ["batch", 1, 1, N])
    scores = b("MatMul", heads(b, x), heads(b, x, (0, 2, 3, 1)))
    scores = b("Add", b("Add", scores, b.weight(1, H, N, N)), mask)
    join(b, b("MatMul", softmax(b, scores), heads(b, x)))
    values = np.where(np.random.default_rng(0).random((2, 1, 1, N)) > 0.5, 0, -1e4).astype(np.float32)
    check(b.model(), {**feed(), "mask": values}, Attention=1)


@pytest.mark.parametrize("free", [False, True])
def test_a_bias_over_folded_heads_and_a_mask_over_samples(free: bool) -> None:
    """DeBERTa's: positions are scored with heads folded into the batch, the mask is added to [b, h, n, m]."""
    b = Builder(17)
    n = "n" if free else N
    x = b.input("x", ["batch", n, C])
    mask = b.input("mask", ["batch", 1, 1, n])
    length = b("Shape", x)
    shape = b.unsqueeze(b("Gather", length, b.const(1, np.int64)), [0]) if free else b.ints(N)
    q, k, v = (
        b("Reshape", heads(b, x, n=0), b("Concat", b.ints(-1), shape, b.ints(D), axis=0)) for _ in range(3)
    )
    turned = [b("Transpose", y, perm=[0, 2, 1]) for y in (k, q)]
    bias = b("MatMul", b("Mul", q, b.const(0.3)), turned[1])
    scores = b("Add", b("MatMul", q, b("Div", turned[0], b.const(3.0))), bias)
    scores = b("Reshape", scores, b("Concat", b.ints(-1, H), shape, shape, axis=0))
    weights = softmax(b, b("Add", scores, mask))
    out = b("MatMul", b("Reshape", weights, b("Concat", b.ints(-1), shape, shape, axis=0)), v)
    join(b, b("Reshape", out, b("Concat", b.ints(-1, H), shape, b.ints(D), axis=0)), n=0 if free else N)
    generator = np.random.default_rng(0)

    def feeds(batch: int, n: int) -> dict[str, np.ndarray]:
        values = np.where(generator.random((batch, 1, 1, n)) > 0.3, 0, -1e4).astype(np.float32)
        return {**feed(batch, n), "mask": values}

    graph, _ = check(b.model(), feeds(2, N), feeds(5, N), *([feeds(4, 9)] if free else []), Attention=1)
    (op,) = graph.ops_of("attention")
    assert op.inputs[3].shape[:2] == op.inputs[0].shape[:2]


def test_a_mask_over_heads_that_stay_folded_is_no_attention_of_one_head() -> None:
    b = Builder(17)
    x = b.input("x", [H, N, C])  # three single heads that nobody folded
    mask = b.input("mask", [1, H, N, N])
    q, k, v = (b("MatMul", x, b.weight(C, D)) for _ in range(3))
    scores = b("MatMul", q, b("Transpose", k, perm=[0, 2, 1]))
    scores = b("Add", b("Reshape", scores, b.ints(1, H, N, N)), mask)
    b.output(b("MatMul", b("Reshape", softmax(b, scores), b.ints(H, N, N)), v))
    values = np.random.default_rng(0).normal(size=(1, H, N, N)).astype(np.float32)
    _, report = check(b.model(), {**feed(H), "mask": values}, Attention=0)
    assert any(
        "a mask over heads that the queries, keys or values have folded" in m for m in report.near_misses
    )


@pytest.mark.parametrize("form", ["gather", "split", "wide split", "slices"])
@pytest.mark.parametrize("opset", [11, 17])
def test_packed(form: str, opset: int) -> None:
    b = Builder(opset)
    x = b.input("x", ["batch", N, C])
    packed = b("Add", b("MatMul", x, b.weight(C, 3 * C)), b.weight(3 * C))
    if form in ("gather", "split", "slices"):
        view = b("Transpose", b("Reshape", packed, b.ints(-1, N, 3, H, D)), perm=[2, 0, 3, 1, 4])
        if form == "gather":
            q, k, v = (b("Gather", view, b.const(i, np.int64), axis=0) for i in range(3))
        elif form == "split":
            q, k, v = (b.squeeze(part, [0]) for part in b.split(view, [1, 1, 1], 0))
        else:
            parts = [b("Slice", view, b.ints(i), b.ints(i + 1), b.ints(0)) for i in range(3)]
            q, k, v = (b.squeeze(part, [0]) for part in parts)
    else:
        parts = b.split(packed, [C, C, C], 2)
        q, k, v = (b("Transpose", b("Reshape", p, b.ints(-1, N, H, D)), perm=[0, 2, 1, 3]) for p in parts)
    scores = b("MatMul", b("Mul", q, b.const(D**-0.5)), b("Transpose", k, perm=[0, 1, 3, 2]))
    join(b, b("MatMul", softmax(b, scores), v))
    check(b.model(), feed(), feed(4), Attention=1)


@pytest.mark.parametrize("form", ["Expand", "Tile"])
def test_grouped_queries(form: str) -> None:
    b = Builder(17)
    groups = 3
    x = b.input("x", ["batch", N, C])
    q = heads(b, x)
    repeated = []
    for _ in range(2):
        y = b.unsqueeze(heads(b, x, h=1), [2])
        operand = b.ints(1, 1, groups, 1, 1)
        repeated.append(b("Reshape", b(form, y, operand), b.ints(-1, groups, N, D)))
    scores = b("MatMul", q, b("Transpose", repeated[0], perm=[0, 1, 3, 2]))
    join(b, b("MatMul", softmax(b, b("Mul", scores, b.const(D**-0.5))), repeated[1]))
    graph, _ = check(b.model(), feed(), feed(1), Attention=1)
    (op,) = graph.ops_of("attention")
    assert [v.shape[1] for v in op.inputs if v is not None] == [3, 1, 1]


@pytest.mark.parametrize("opset", [13, 18])
def test_rows_without_a_key_are_zero(opset: int) -> None:
    b = Builder(opset)
    x = b.input("x", ["batch", N, C])
    mask = b.input("mask", ["batch", 1, N, N], TensorProto.BOOL)
    scores = b("MatMul", heads(b, x), heads(b, x, (0, 2, 3, 1)))
    weights = softmax(b, b("Where", mask, scores, b.const(-np.inf)))
    weights = b("Where", b("IsNaN", weights), b.const(0.0), weights)
    join(b, b("MatMul", weights, heads(b, x)))
    keep = np.random.default_rng(0).random((B, 1, N, N)) > 0.5
    keep[0, :, 2] = False
    keep[1] = False
    check(b.model(), {**feed(), "mask": keep}, Attention=1)


def test_cross_attention_and_free_lengths() -> None:
    b = Builder(17)
    x, y = b.input("x", ["batch", "n", C]), b.input("y", ["batch", "m", C])

    def split(source: str, perm: tuple[int, ...]) -> str:
        h = b("MatMul", source, b.weight(C, C))
        shape = b("Shape", source)
        parts = [b.unsqueeze(b("Gather", shape, b.const(i, np.int64)), [0]) for i in range(2)]
        target = b("Concat", *parts, b.ints(H), b.ints(D), axis=0)
        return b("Transpose", b("Reshape", h, target), perm=list(perm))

    scores = b("MatMul", split(x, (0, 2, 1, 3)), split(y, (0, 2, 3, 1)))
    out = b("MatMul", softmax(b, b("Div", scores, b.const(math.sqrt(D)))), split(y, (0, 2, 1, 3)))
    out = b("Transpose", out, perm=[0, 2, 1, 3])
    shape = b("Shape", out)
    parts = [b.unsqueeze(b("Gather", shape, b.const(i, np.int64)), [0]) for i in range(2)]
    b.output(b("Reshape", out, b("Concat", *parts, b.ints(C), axis=0)))
    feeds = [{**feed(2, 4), "y": feed(2, 9)["x"]}, {**feed(1, 1), "y": feed(1, 3)["x"]}]
    graph, _ = check(b.model(), *feeds, Attention=1)
    (op,) = graph.ops_of("attention")
    q, k = op.inputs[:2]
    assert [str(d) for d in q.shape] == ["batch", "3", "n", "8"]
    assert [str(d) for d in k.shape] == ["batch", "3", "m", "8"]
    assert not graph.ops_of("size", "unknown")


def test_single_head_of_rank_three() -> None:
    b = Builder(17)
    x = b.input("x", ["batch", N, C])
    q, k, v = (b("MatMul", x, b.weight(C, C)) for _ in range(3))
    scores = b("MatMul", q, b("Transpose", k, perm=[0, 2, 1]))
    b.output(b("MatMul", softmax(b, b("Mul", scores, b.const(0.2)), 3), v))
    check(b.model(), feed(), feed(1), Attention=1)


def test_dropout_and_casts_between() -> None:
    b = Builder(13)
    x = b.input("x", ["batch", N, C])
    scores = b("MatMul", heads(b, x), heads(b, x, (0, 2, 3, 1)))
    weights = softmax(b, b("Cast", scores, to=TensorProto.FLOAT))
    weights = b("Dropout", b("Cast", weights, to=TensorProto.FLOAT))
    join(b, b("MatMul", weights, heads(b, x)))
    check(b.model(), feed(), Attention=1)


def test_what_is_no_attention_stays_with_its_reason() -> None:
    b = Builder(17)
    x = b.input("x", ["batch", N, C])
    scores = b("MatMul", heads(b, x), heads(b, x, (0, 2, 3, 1)))
    weights = softmax(b, b("Tanh", scores))
    b.output(weights)
    join(b, b("MatMul", weights, heads(b, x)))
    graph, report = check(b.model(), feed(), Attention=0)
    assert any("probabilities are an output" in line or "Tanh" in line for line in report.near_misses)
    assert len(graph.ops_of("softmax")) == 1


@pytest.mark.parametrize("fill", [0.0, 1.0, True])
def test_a_mask_of_one_value(fill: float | bool) -> None:
    """What adds zeros, or hides nothing, is no mask, whatever its size."""
    b = Builder(17)
    x = b.input("x", ["batch", N, C])
    scores = b("MatMul", heads(b, x), heads(b, x, (0, 2, 3, 1)))
    tensor = numpy_helper.from_array(np.array([fill], bool if isinstance(fill, bool) else np.float32))
    batch = b("Slice", b("Shape", x), b.ints(0), b.ints(1))
    mask = b("ConstantOfShape", b("Concat", batch, b.ints(1, N, N), axis=0), value=tensor)
    if isinstance(fill, bool):
        scores = b("Where", mask, scores, b.const(-np.inf))
    else:
        scores = b("Add", scores, mask)
    join(b, b("MatMul", softmax(b, scores), heads(b, x)))
    graph, _ = check(b.model(), feed(), Attention=1)
    (op,) = graph.ops_of("attention")
    assert len(op.inputs) == (4 if fill == 1.0 and not isinstance(fill, bool) else 3)
