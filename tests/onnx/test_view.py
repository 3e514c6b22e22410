"""OnnxGraph: reading, every editing primitive, copies, and the verifier."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import sympy
from elision.passes.errors import Refused, VerificationError
from elision.passes.ir.graph import Op
from elision.passes.ir.onnx import OnnxGraph
from elision.passes.onnx.io import from_proto, to_proto
from elision.passes.onnx.normalise import normalise
from onnx import TensorProto, helper

from .onnx_tools import Builder, run

N, H, D = 6, 2, 4
C = H * D


def block(opset: int = 17, free: bool = False) -> onnx.ModelProto:
    """One attention over tokens that begin with a class token."""
    b = Builder(opset)
    x = b.input("x", ["batch", "n" if free else N - 1, C])
    batch = b("Slice", b("Shape", x), b.ints(0), b.ints(1))
    cls = b("Expand", b.weight(1, 1, C), b("Concat", batch, b.ints(1, 1), axis=0))
    tokens = b("Concat", cls, x, axis=1)
    if not free:
        tokens = b("Add", tokens, b.weight(1, N, C))
    shape = b("Shape", tokens)
    first_two = b("Slice", shape, b.ints(0), b.ints(2))

    def heads() -> str:
        y = b("MatMul", tokens, b.weight(C, C))
        target = b("Concat", first_two, b.ints(H, D), axis=0)
        return b("Transpose", b("Reshape", y, target), perm=[0, 2, 1, 3])

    q, k, v = heads(), heads(), heads()
    scores = b("MatMul", b("Mul", q, b.const(D**-0.5)), b("Transpose", k, perm=[0, 1, 3, 2]))
    out = b("Transpose", b("MatMul", b("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
    out = b("Add", b("Reshape", out, b("Concat", first_two, b.ints(C), axis=0)), tokens)
    b.output(b("Gather", out, b.const(0, np.int64), axis=1))
    return b.model()


def view(free: bool = False) -> OnnxGraph:
    model = from_proto(block(free=free))
    normalise(model)
    return OnnxGraph(model)


def feed(batch: int = 2, n: int = N - 1) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).normal(size=(batch, n, C)).astype(np.float32)}


def names(graph: OnnxGraph) -> list[str]:
    return [op.kind for op in graph.ops]


def first(graph: OnnxGraph, kind: str) -> Op:
    return graph.ops_of(kind)[0]


def tokens_of(graph: OnnxGraph) -> Op:
    """The concatenation of class token and patches (sizes are concatenated too)."""
    return next(op for op in graph.ops_of("concat") if op.output.rank == 3)


def test_kinds_and_shapes() -> None:
    graph = view()
    assert [v.name for v in graph.inputs] == ["x"]
    op = first(graph, "attention")
    batch = graph.inputs[0].shape[0]
    assert isinstance(batch, sympy.Symbol)
    assert [v.shape for v in op.inputs] == [(batch, H, N, D)] * 3
    assert op.output.shape == (batch, H, N, D)
    assert op.attrs == {"scale": 0.5, "causal": False}
    assert first(graph, "select").attrs == {"axis": 1, "index": 0}
    assert tokens_of(graph).attrs == {"axis": 1}
    linear = first(graph, "linear")
    assert linear.attrs["transposed"] is False
    assert linear.inputs[1].origin == "parameter"
    assert graph.constant_value(linear.inputs[1]).shape == (C, C)
    assert graph.constant_value(linear.inputs[0]) is None
    for value in graph.values():
        for user, index in value.users:
            assert user.inputs[index] is value
    for op in graph.ops:
        assert all(out.producer is op for out in op.outputs)


def test_free_lengths() -> None:
    graph = view(free=True)
    n = sympy.Symbol("n", integer=True, positive=True)
    assert first(graph, "attention").inputs[0].shape[2] == n + 1
    graph.verify()


def test_networkx() -> None:
    graph = view()
    network = graph.to_networkx()
    assert all(op in network for op in graph.ops)


def test_text_is_stable_and_readable() -> None:
    graph = view()
    lines = graph.text()
    assert lines == view().text()
    assert lines[0] == "input %x: float32[batch, 5, 8]"
    assert any("= Attention(" in line and "{scale=0.5}" in line for line in lines)
    assert lines[-1].startswith("output %")


def test_copy_is_independent() -> None:
    graph = view()
    before = graph.text()
    twin = graph.copy()
    assert twin.text() == before
    twin.set_operand(first(twin, "attention"), 0, first(twin, "attention").inputs[1])
    twin.verify()
    assert graph.text() == before
    weight = first(graph, "linear").inputs[1].raw.const_value
    assert first(twin, "linear").inputs[1].raw.const_value is weight


def test_set_operand_refresh_and_removal() -> None:
    graph = view()
    op = first(graph, "attention")
    query, key = op.inputs[0], op.inputs[1]
    graph.set_operand(op, 0, key)
    assert op.inputs[0] is key
    assert (op, 0) in key.users
    assert (op, 0) not in query.users
    removed = graph.remove_dead()
    assert removed == 3  # the projection, reshape and transpose of the queries
    graph.verify()
    run(to_proto(graph.model), feed())
    with pytest.raises(Refused, match="has no operand 7"):
        graph.set_operand(op, 7, key)


def test_set_operand_past_the_end() -> None:
    graph = view()
    op = first(graph, "attention")
    mask = graph.insert_constant(np.zeros((1, 1, N, N), np.float32), "mask")
    graph.set_operand(op, 3, mask)
    assert op.inputs[3] is mask
    graph.verify()
    (a,), (b,) = run(graph.model, feed()), run(block(), feed())
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_outputs() -> None:
    graph = view()
    name = graph.outputs[0].name
    (wanted,) = run(block(), feed())
    attention = first(graph, "attention").output
    graph.add_output(attention, "heads")
    graph.add_output(graph.inputs[0], "same")
    assert [v.name for v in graph.outputs] == [name, "heads", "same"]
    graph.verify()
    found = run(graph.model, feed())
    np.testing.assert_allclose(found[0], wanted, atol=1e-5)
    assert found[1].shape == (2, H, N, D)
    np.testing.assert_array_equal(found[2], feed()["x"])
    graph.replace_output(0, first(graph, "norm").output if graph.ops_of("norm") else attention)
    assert graph.outputs[0].name == name
    graph.verify()
    assert run(graph.model, feed())[0].shape == (2, H, N, D)
    with pytest.raises(Refused, match="already has"):
        graph.add_output(attention, "x")


def test_set_length_of_a_reshape() -> None:
    """Half of the tokens from the class token on: reshapes follow, static and with a free length."""
    for free in (False, True):
        graph = view(free)
        (wanted,) = run(graph.model, feed(2, N - 1))
        concat = tokens_of(graph)
        tokens = concat.output
        end = graph.insert_constant(np.asarray([3], np.int64), "end").raw
        start = graph.insert_constant(np.asarray([0], np.int64), "start").raw
        axis = graph.insert_constant(np.asarray([1], np.int64), "axis").raw
        users = list(tokens.users)
        cut = graph.insert_node("Slice", [tokens.raw, start, end, axis], after=concat)[0]
        for op, index in users:
            if op.kind == "elementwise" and op.inputs[1 - index].origin == "parameter":
                raw = op.inputs[1 - index].raw
                table = graph.insert_node("Slice", [raw, start, end, axis], after=cut.producer)[0]
                graph.set_operand(op, 1 - index, table)
            graph.set_operand(op, index, cut)
            graph.refresh(op)
        for op in graph.ops[graph.ops.index(cut.producer) + 1 :]:
            if op.kind == "reshape":
                graph.set_length(op, 1, op.inputs[0], 1)
            graph.refresh(op)
        length = first(graph, "attention").inputs[0].shape[2]
        assert length == 3 or str(length) == "Min(3, n + 1)"
        graph.verify()
        (found,) = run(graph.model, feed(2, N - 1))
        assert found.shape == wanted.shape
        assert not np.allclose(found, wanted)


def test_set_length_refuses() -> None:
    graph = view()
    with pytest.raises(Refused, match="no shape argument"):
        graph.set_length(first(graph, "linear"), 1, graph.inputs[0], 1)


def test_set_length_of_expand_range_and_slice() -> None:
    b = Builder(17)
    x, y = b.input("x", ["batch", "n"]), b.input("y", ["batch", "m"])
    size = b("Squeeze", b("Shape", x, start=1, end=2))
    positions = b("Cast", b("Range", b.const(0, np.int64), size, b.const(1, np.int64)), to=TensorProto.FLOAT)
    grown = b("Expand", b.weight(1, 1), b("Shape", x))
    full = b("ConstantOfShape", b("Shape", x))
    b.output(b("Add", b("Add", grown, positions), b("Add", full, x)))
    b.output(b("Neg", y))
    graph = OnnxGraph(from_proto(b.model()))
    other = graph.inputs[1]
    for kind in ("create", "expand"):
        for op in graph.ops_of(kind):
            graph.set_length(op, len(op.output.shape) - 1, other, 1)
    for op in graph.ops:
        if op.kind == "elementwise" and graph.inputs[0] in op.inputs:
            graph.set_operand(op, op.inputs.index(graph.inputs[0]), other)
        graph.refresh(op)
    graph.verify()
    assert str(graph.outputs[0].shape[1]) == "m"
    feeds = {"x": np.ones((2, 7), np.float32), "y": np.ones((2, 3), np.float32)}
    assert run(graph.model, feeds)[0].shape == (2, 3)


def test_the_verifier_finds_what_is_wrong() -> None:
    graph = view()
    op = first(graph, "attention")
    op.output.shape = (1, 2, 3, 4)
    with pytest.raises(VerificationError, match="inferred again"):
        graph.verify()
    graph = view()
    node = first(graph, "attention").raw
    graph.model.graph.remove(node)
    graph.model.graph.insert_before(graph.model.graph[0], node)
    with pytest.raises(VerificationError, match="before it is computed"):
        graph.verify()


def fake_op() -> SimpleNamespace:
    """`double_rows(x, y?; times)`: x * times, as a function whose name says the rank."""

    def function(inputs, attrs, opset):
        rank, dtype = inputs[0]
        assert dtype == TensorProto.FLOAT
        body = [
            helper.make_node("Constant", [], ["t"], value_float=float(attrs["times"])),
            helper.make_node("Mul", ["x", "t"], ["out"]),
            helper.make_node("Shape", ["x"], ["length"]),
        ]
        return helper.make_function(
            "elision", f"scale_rank{rank}_times{attrs['times']}", ["x", "y"], ["out", "length"], body,
            [helper.make_opsetid("", opset)],
        )  # fmt: skip

    return SimpleNamespace(
        name="scale",
        onnx_function=function,
        output_shapes=lambda shapes, attrs: [shapes[0], (len(shapes[0]),)],
        output_dtypes=lambda dtypes, attrs: [dtypes[0], "int64"],
    )


@pytest.fixture
def dialect(monkeypatch) -> None:
    import elision.kernels

    monkeypatch.setattr(elision.kernels, "OPS", {"scale": fake_op()}, raising=False)


def test_insert_a_dialect_op(dialect) -> None:
    graph = view()
    (wanted,) = run(graph.model, feed())
    linear = first(graph, "linear")
    for times in (2, 2, 3):  # the second needs no new function
        out, length = graph.insert("scale", [linear.output, None], {"times": times}, after=linear)
        assert out.shape == linear.output.shape
        assert (length.shape, length.dtype) == ((3,), "int64")
        op = out.producer
        assert op.kind == "elision"
        assert op.target == "elision.scale"
        assert op.attrs["times"] == times
        assert graph.ops[graph.ops.index(linear) + 1] is op
    assert len(graph.model.functions) == 2
    user = next(op for op, _ in linear.output.users if op.kind == "reshape")
    graph.set_operand(user, 0, out)
    graph.add_output(out, "scaled")
    graph.remove_dead()
    graph.verify()
    assert any("elision.scale(" in line and "times=3" in line for line in graph.text())
    found = run(graph.model, feed())
    assert not np.allclose(found[0], wanted)
    again = OnnxGraph(from_proto(to_proto(graph.model, "standard")))
    again.verify()
    (kept,) = again.ops_of("elision")
    assert kept.attrs["times"] == 3
    assert kept.output.shape == out.shape


def test_insert_refuses(dialect) -> None:
    graph = view()
    with pytest.raises(Refused, match="not an op of the dialect"):
        graph.insert("nothing", [graph.inputs[0]], after=None)
    old = OnnxGraph(from_proto(block(opset=13)))
    with pytest.raises(Refused, match="older than 18"):
        old.insert("scale", [old.inputs[0], None], {"times": 2}, after=None)


def test_inserting_before_everything(dialect) -> None:
    graph = view()
    out, _ = graph.insert("scale", [graph.inputs[0], None], {"times": 2}, after=None)
    assert graph.ops[0] is out.producer
    for op, index in list(graph.inputs[0].users):
        if op is not out.producer and op.kind != "size":
            graph.set_operand(op, index, out)
    graph.remove_dead()
    graph.verify()
    run(graph.model, feed())


def test_values_that_a_body_reads_are_operands() -> None:
    b = Builder(17)
    x = b.input("x", ["batch", C])
    flag = b.input("flag", [], TensorProto.BOOL)
    hidden = b("Relu", x)

    def body(op: str) -> onnx.GraphProto:
        node = helper.make_node(op, [hidden], [f"{op}_out"])
        return helper.make_graph([node], op, [], [helper.make_tensor_value_info(f"{op}_out", 1, None)])

    b.output(b("If", flag, then_branch=body("Neg"), else_branch=body("Abs")))
    model = from_proto(b.model())
    normalise(model)
    graph = OnnxGraph(model)
    op = first(graph, "unknown")
    value = graph.ops[0].output
    assert value in op.inputs
    with pytest.raises(Refused, match="inside a body"):
        graph.set_operand(op, op.inputs.index(value), graph.inputs[0])
    graph.remove_dead()
    run(graph.model, {"x": np.ones((2, C), np.float32), "flag": np.asarray(True)})


def deep(layers: int) -> onnx.ModelProto:
    b = Builder(17)
    y = b.input("x", ["batch", "n", C])
    for _ in range(layers):
        shape = b("Shape", y)
        parts = [b.unsqueeze(b("Gather", shape, b.const(i, np.int64)), [0]) for i in range(2)]
        split = b("Reshape", b("MatMul", y, b.weight(C, C)), b("Concat", *parts, b.ints(H, D), axis=0))
        back = b("Reshape", b("Transpose", split, perm=[0, 1, 2, 3]), b("Concat", *parts, b.ints(C), axis=0))
        y = b("Add", y, b("Relu", back))
    b.output(y)
    return b.model()


def build_seconds(layers: int) -> tuple[float, int]:
    model = from_proto(deep(layers))
    best = float("inf")
    for _ in range(2):
        started = time.perf_counter()
        graph = OnnxGraph(model)
        best = min(best, time.perf_counter() - started)
    return best, len(graph.ops)


def test_thousands_of_operations_build_fast() -> None:
    small, few = build_seconds(100)
    large, many = build_seconds(400)
    assert many > 4000
    assert large < 3.0
    assert large < 12 * small  # four times the nodes; a quadratic step would show as sixteen
    assert few * 4 == many


def test_thousands_of_operations_normalise_fast() -> None:
    model = from_proto(deep(400))
    started = time.perf_counter()
    normalise(model)
    assert time.perf_counter() - started < 20
    assert not OnnxGraph(model).ops_of("size")


@pytest.mark.parametrize("mask", ["none", "additive", "bool"])
def test_the_dialects_attention_is_lowered(mask: str) -> None:
    """Size-biased attention: the function body and the lowered form agree, padding and all."""
    graph = view()
    op = first(graph, "attention")
    sizes = np.array([[1, 2, 3, 0, 1, 0], [4, 1, 1, 1, 1, 1]], np.float32)
    size = graph.insert_constant(sizes, "size")
    operands = [*op.inputs, None, size]
    if mask != "none":
        keep = np.random.default_rng(0).random((2, 1, 1, N)) > 0.3
        array = keep if mask == "bool" else np.where(keep, 0.5, -2).astype(np.float32)
        operands[3] = graph.insert_constant(array, "mask")
    (out,) = graph.insert("attention", operands, {"scale": op.attrs["scale"]}, after=op)
    for user, index in list(op.output.users):
        graph.set_operand(user, index, out)
    graph.remove_dead()
    graph.verify()
    plain, lowered = to_proto(graph.model, "standard"), to_proto(graph.model)
    assert "attention" in {n.op_type for n in plain.graph.node}
    assert "attention" not in {n.op_type for n in lowered.graph.node}
    assert [f.name for f in lowered.functions] == ["joined_attention"]
    (a,), (b,) = run(plain, feed()), run(lowered, feed())
    np.testing.assert_allclose(a, b, atol=1e-5)
