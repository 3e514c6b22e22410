"""The view's primitives for turning one graph into another: evaluate, add inputs, plain ops, signature, lengths."""

from __future__ import annotations

import numpy as np
import pytest
from elision.passes.errors import ElisionError, Refused
from elision.passes.ir.onnx import OnnxGraph
from elision.passes.onnx.io import from_proto
from onnx import TensorProto

from .onnx_tools import Builder, run


def counting() -> OnnxGraph:
    """ids [1, S], x [B, S, 4]: rows of a table at cumsum(ones like ids), and x + those rows."""
    b = Builder(opset=20)
    ids, x = b.input("ids", [1, "S"], TensorProto.INT64), b.input("x", ["B", "S", 4])
    length = b("Gather", b("Shape", ids), b.const(1, np.int64))
    positions = b("Range", b.const(0, np.int64), length, b.const(1, np.int64))
    b.nodes[-1].output[0] = "positions"
    table = b.const(np.arange(40).reshape(10, 4))
    rows = b("Gather", table, "positions")
    b.nodes.append(b.nodes.pop())
    total = b("Add", x, rows)
    b.nodes[-1].output[0] = "y"
    b.output("y")
    assert positions != total
    return OnnxGraph(from_proto(b.model()))


def named(graph: OnnxGraph, name: str):
    return next(value for value in graph.values() if value.name == name)


def test_evaluate_follows_the_lengths_it_is_given() -> None:
    graph = counting()
    before = graph.text()
    ids = graph.inputs[0]
    for length in (3, 7):
        (found,) = graph.evaluate([named(graph, "positions")], {ids: np.zeros((1, length), np.int64)})
        np.testing.assert_array_equal(found, np.arange(length))
    table, again = graph.evaluate(
        [graph.ops_of("gather", "embedding")[-1].inputs[0], named(graph, "positions")],  # type: ignore[list-item]
        {ids: np.zeros((1, 2), np.int64)},
    )
    assert table.shape == (10, 4)
    assert again.tolist() == [0, 1]
    assert graph.text() == before


def test_evaluate_needs_every_input_behind_the_value() -> None:
    graph = counting()
    with pytest.raises(ElisionError, match="%y depends on the input %x, which is not fed"):
        graph.evaluate([graph.outputs[0]], {graph.inputs[0]: np.zeros((1, 2), np.int64)})
    with pytest.raises(ElisionError, match="not fed"):
        graph.evaluate([graph.inputs[1]], {})


def test_a_length_takes_no_data() -> None:
    """Shape of what other inputs make: the feeds decide it, and nothing else runs."""
    b = Builder(opset=20)
    ids = b.input("ids", [1, "S"], TensorProto.INT64)
    other = b.input("other", [1, "S", 3])
    rows = b(
        "MatMul",
        b("Add", other, b("Unsqueeze", b("Cast", ids, to=TensorProto.FLOAT), b.ints(2))),
        b.weight(3, 4),
    )
    length = b("Squeeze", b("Shape", rows, start=1, end=2), b.ints(0))
    b("Range", b.const(0, np.int64), length, b.const(1, np.int64))
    b.nodes[-1].output[0] = "count"
    b.output("count", TensorProto.INT64)
    b.output(rows)
    graph = OnnxGraph(from_proto(b.model()))
    (found,) = graph.evaluate([named(graph, "count")], {graph.inputs[0]: np.zeros((1, 5), np.int64)})
    assert found.tolist() == [0, 1, 2, 3, 4]


def test_evaluate_tells_what_onnxruntime_says() -> None:
    graph = counting()
    with pytest.raises(ElisionError):
        graph.evaluate([graph.outputs[0]], {graph.inputs[0]: np.zeros((1, 12), np.int64),
                                            graph.inputs[1]: np.zeros((1, 12, 4), np.float32)})  # fmt: skip


def test_a_graph_of_rows_at_given_positions() -> None:
    graph = counting()
    positions = graph.add_input("at", "int64", [1, "M"])
    flat = graph.insert_plain("reshape", [positions], {"shape": [positions.shape[1]]}, after=None)  # type: ignore[index]
    rows = graph.insert_plain("gather", [graph.insert_constant(np.eye(4, dtype=np.float32), "eye"), flat],
                              {"axis": 0}, after=flat.producer)  # fmt: skip
    back = graph.insert_plain("cast", [rows], {"dtype": "float64"}, after=rows.producer)
    wide = graph.insert_plain(
        "expand",
        [back],
        {"shape": [3, positions.shape[1], 4]},
        after=back.producer,  # type: ignore[index]
    )
    turned = graph.insert_plain("transpose", [wide], {"perm": [2, 0, 1]}, after=wide.producer)
    graph.set_signature([("where", positions)], [("logits", turned), ("rows", rows)])
    graph.verify()
    assert graph.input_names == ["where"] == [v.name for v in graph.model.graph.inputs]
    assert graph.output_names == ["logits", "rows"]
    turned_back, found = run(graph.model, {"where": np.array([[2, 0, 3]])})
    np.testing.assert_array_equal(found, np.eye(4)[[2, 0, 3]])
    np.testing.assert_array_equal(turned_back, np.broadcast_to(found.T[:, None], (4, 3, 3)))


def test_names_may_be_exchanged_and_are_kept_apart() -> None:
    graph = counting()
    ids, x = graph.inputs
    graph.set_signature([("ids", x), ("x", ids)], [("positions", graph.outputs[0])])
    graph.verify()
    (found,) = run(graph.model, {"ids": np.ones((1, 2, 4), np.float32), "x": np.zeros((1, 2), np.int64)})
    np.testing.assert_array_equal(found[0], 1 + np.arange(8).reshape(2, 4))


def test_a_length_is_read_off_another_input() -> None:
    graph = counting()
    graph.set_signature([("x", graph.inputs[1])], [("y", graph.outputs[0])])
    graph.verify()
    (found,) = run(graph.model, {"x": np.zeros((2, 3, 4), np.float32)})
    np.testing.assert_array_equal(found[1], np.arange(12).reshape(3, 4))


def test_an_input_that_is_still_read_cannot_go() -> None:
    graph = counting()
    with pytest.raises(Refused, match=r"Add .* still reads the input 'x'"):
        graph.set_signature([("ids", graph.inputs[0])], [("y", graph.outputs[0])])


def test_one_symbol_for_one_name_and_not_one_of_the_file() -> None:
    graph = counting()
    a = graph.add_input("a", "int32", ["S", 2])
    b = graph.add_input("b", "float32", ["S"])
    assert a.shape is not None
    assert b.shape is not None
    assert a.shape[0] == b.shape[0] != graph.inputs[0].shape[1]  # type: ignore[index]
    assert graph.copy().add_input("c", "int32", ["S"]).shape == b.shape


def test_a_new_input_may_have_the_name_of_one_that_goes() -> None:
    graph = counting()
    old = graph.inputs[1]
    new = graph.add_input("x", "float32", old.shape or ())
    graph.replace_uses(old, new)
    graph.set_signature([("ids", graph.inputs[0]), ("x", new)], [("y", graph.outputs[0])])
    graph.verify()
    assert graph.input_names == ["ids", "x"]


def test_fix_length() -> None:
    graph = counting()
    graph.fix_length(graph.inputs[1], 0, 1)
    graph.verify()
    assert graph.outputs[0].shape == (1, graph.inputs[0].shape[1], 4)  # type: ignore[index]
    graph.fix_length(graph.inputs[1], 1, 5)
    assert graph.inputs[0].shape[1] == 5  # type: ignore[index]
    assert named(graph, "positions").shape == (5,)
    graph.fix_length(graph.inputs[1], 1, 5)
    with pytest.raises(Refused, match="has length 5, not 6"):
        graph.fix_length(graph.inputs[1], 1, 6)


def test_same_length() -> None:
    graph = counting()
    mask = graph.add_input("mask", "int64", [1, "T"])
    graph.same_length(mask, 1, graph.inputs[0], 1)
    graph.verify()
    assert graph.inputs[2].shape == graph.inputs[0].shape


def test_replace_uses_reaches_every_use() -> None:
    graph = counting()
    x = graph.inputs[1]
    other = graph.add_input("other", "float32", x.shape or ())
    graph.replace_uses(x, other)
    assert not x.raw.uses()
    graph.set_signature([("ids", graph.inputs[0]), ("other", other)], [("y", graph.outputs[0])])
    graph.verify()
