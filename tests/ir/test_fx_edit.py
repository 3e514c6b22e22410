"""The editing primitives of the FX view, each on a small graph; shapes static and symbolic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from elision.passes.errors import ElisionError, VerificationError
from elision.passes.ir.fx import FxGraph
from elision.passes.ir.graph import Op, Value
from torch import nn

torch.set_num_threads(1)


@torch.library.custom_op("elisiontest::halve", mutates_args=())
def halve(x: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every second position of an axis, and how many there are for each sample."""
    index = torch.arange(0, x.shape[axis], 2)
    rows = x.index_select(axis, index)
    return rows, torch.full((x.shape[0], rows.shape[axis]), 2.0)


@halve.register_fake
def _(x: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = list(x.shape)
    shape[axis] = (shape[axis] + 1) // 2
    return x.new_empty(shape), torch.empty(shape[0], shape[axis])


HALVE = torch.ops.elisiontest.halve.default


class Form(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self.linear(x))


def trace(function: Callable[..., Any], dynamic: bool = False, shape: tuple[int, ...] = (2, 8, 6)) -> FxGraph:
    dims = {0: torch.export.Dim("batch", min=2, max=99), 1: torch.export.Dim("tokens", min=4, max=99)}
    torch.manual_seed(0)
    shapes = (dims,) if dynamic else None
    return FxGraph.trace(Form(function).eval(), (torch.randn(shape),), dynamic_shapes=shapes)


def ops(graph: FxGraph, target: str) -> list[Op]:
    return [op for op in graph.ops if op.target == f"aten.{target}"]


def shape(value: Value) -> list[str]:
    return [str(d) for d in value.shape or ()]


def halved(graph: FxGraph) -> tuple[Op, Value]:
    """The graph with the tokens halved behind the linear layer; all later ops still have to follow."""
    (linear,) = graph.ops_of("linear")
    users = list(linear.output.users)
    rows, _ = graph.insert_call(HALVE, [linear.output], {"axis": 1}, after=linear).outputs
    graph.replace_uses(linear.output, rows, users)
    return linear, rows


# ---- insert, operands, outputs ---------------------------------------------------------------------------
def test_insert_gives_typed_outputs_and_keeps_the_order() -> None:
    graph = trace(lambda x: (x * 2).relu())
    (mul,) = ops(graph, "mul")
    made = graph.insert_call(HALVE, [mul.output], {"axis": 1}, after=mul)
    assert graph.ops.index(made) == graph.ops.index(mul) + 1
    assert [(v.shape, v.dtype) for v in made.outputs] == [((2, 4, 6), "float32"), ((2, 4), "float32")]
    assert (made, 0) in mul.output.users
    graph.verify()


def test_insert_before_everything_and_unknown_names() -> None:
    graph = trace(lambda x: x * 2)
    made = graph.insert_call(torch.ops.aten.neg.default, [graph.inputs[0]], after=None)
    assert graph.ops[0] is made
    with pytest.raises(ElisionError, match="no op 'nothing_like_it'"):
        graph.insert("nothing_like_it", [], after=None)
    lines = graph.text()
    with pytest.raises(VerificationError, match=r"aten\.mm cannot take its operands"):
        graph.insert_call(torch.ops.aten.mm.default, [made.output, made.output], after=made)
    assert graph.text() == lines
    graph.verify()


def test_values_stay_the_same_objects_while_shapes_follow() -> None:
    graph = trace(lambda x: (x.transpose(1, 2) * 2).unbind(1))
    transpose, mul, unbind = ops(graph, "transpose")[0], ops(graph, "mul")[0], ops(graph, "unbind")[0]
    before = [transpose.output, mul.output, *unbind.outputs]
    _, rows = halved(graph)
    assert transpose.inputs[0] is rows
    for op in (transpose, mul, unbind):
        graph.refresh(op)
    assert before == [transpose.output, mul.output, *unbind.outputs]
    assert transpose.output.shape == mul.output.shape == (2, 6, 4)
    assert all(v.shape == (2, 4) for v in graph.outputs)
    graph.verify()
    assert all(v.shape == (2, 4) for v in graph.run(torch.randn(2, 8, 6)))


def test_refresh_follows_another_rank() -> None:
    graph = trace(lambda x: (x * 2).sum(-1))
    (mul,), (total,) = ops(graph, "mul"), ops(graph, "sum")
    (linear,) = graph.ops_of("linear")
    made = graph.insert_call(torch.ops.aten.select.int, [linear.output], {"dim": 1, "index": 0}, after=linear)
    graph.set_operand(mul, 0, made.output)
    graph.refresh(mul)
    graph.refresh(total)
    assert (mul.output.shape, total.output.shape, total.attrs["axes"]) == ((2, 6), (2,), (1,))
    graph.verify()


def test_stale_shapes_fail_the_verifier() -> None:
    graph = trace(lambda x: x * 2)
    halved(graph)
    with pytest.raises(VerificationError, match=r"shape is \[2, 4, 6\], recorded \[2, 8, 6\]"):
        graph.verify()


def test_operand_inside_a_list() -> None:
    graph = trace(lambda x: torch.cat([x, x * 2, x], 1))
    (cat,), (mul,) = ops(graph, "cat"), ops(graph, "mul")
    graph.set_operand(cat, 2, mul.output)
    assert cat.inputs[1] is cat.inputs[2] is mul.output
    assert (cat, 2) in mul.output.users and len(graph.ops_of("linear")[0].output.users) == 2
    with pytest.raises(ElisionError, match="no operand 3"):
        graph.set_operand(cat, 3, mul.output)
    graph.verify()


def test_outputs_are_replaced_and_added() -> None:
    graph = trace(lambda x: {"a": x * 2, "b": [x + 1]})
    (mul,), (add,) = ops(graph, "mul"), ops(graph, "add")
    graph.replace_output(1, mul.output)
    graph.add_output(add.output, "first")
    graph.add_output(graph.ops_of("linear")[0].output, "second")
    x = torch.randn(2, 8, 6)
    for module in (graph, graph.copy()):
        result, first, second = module.run(x)
        assert torch.equal(result["b"][0], result["a"]) and torch.equal(first, second + 1)
    assert [v.name for v in graph.outputs] == ["mul", "mul", "add", "linear"]
    graph.verify()


def test_constants() -> None:
    graph = trace(lambda x: x * 2)
    (mul,) = ops(graph, "mul")
    row = graph.insert_constant(np.arange(6, dtype=np.float32), "row of six")
    other = graph.insert_constant(np.ones(6, np.float32), "row of six")
    made = graph.insert_call(torch.ops.aten.add.Tensor, [mul.output, row], after=mul)
    graph.replace_output(0, made.output)
    assert row.name == "row_of_six" and other.name == "row_of_six_1" and row.origin == "constant"
    np.testing.assert_array_equal(graph.constant_value(row), np.arange(6))
    assert graph.constant_value(mul.output) is None
    x = torch.randn(2, 8, 6)
    plain = trace(lambda x: x * 2)
    torch.testing.assert_close(graph.run(x), plain.run(x) + torch.arange(6))
    graph.verify()


def test_copies_are_independent_and_share_weights() -> None:
    graph = trace(lambda x: x * 2)
    twin = graph.copy()
    lines = graph.text()
    halved(twin)
    assert graph.text() == lines != twin.text()
    assert not graph.edited and twin.edited
    weights = [g.ops_of("linear")[0].inputs[1] for g in (graph, twin)]
    assert graph.tensor(weights[0]) is twin.tensor(weights[1])  # type: ignore[arg-type]


def test_dead_ops_go_and_written_buffers_stay() -> None:
    graph = trace(lambda x: (x * 2).relu())
    (mul,) = ops(graph, "mul")
    graph.replace_output(0, mul.output)
    assert graph.remove_dead() == 1 and ops(graph, "relu") == []
    assert graph.remove_dead() == 0
    graph.verify()


def test_text_is_stable() -> None:
    assert trace(lambda x: x.reshape(2, 48).relu()).text() == [
        "%x: float32[2, 8, 6] = input",
        "%linear: float32[2, 8, 6] = aten.linear(%x, %linear_weight, %linear_bias) {transposed=True}",
        "%reshape: float32[2, 48] = aten.reshape(%linear)",
        "%relu: float32[2, 48] = aten.relu(%reshape) {fn=relu}",
        "return %relu",
    ]


# ---- set_length ------------------------------------------------------------------------------------------
Axis = tuple[str, int]
CASES: dict[str, tuple[Callable[[torch.Tensor], Any], list[Axis], list[int]]] = {
    "reshape": (lambda x: x.reshape(x.shape[0], x.shape[1], 3, 2), [("reshape", 1)], [1]),
    "reshape_minus_one": (lambda x: x.reshape(x.shape[0], -1, 3, 2), [("reshape", 1)], [1]),
    "view": (lambda x: x.view(x.shape[0], x.shape[1], 2, 3), [("reshape", 1)], [1]),
    "expand": (lambda x: x[..., :1].expand(x.shape[0], x.shape[1], 5), [("expand", 1)], [1]),
    "arange": (lambda x: torch.arange(x.shape[1])[:, None] + x[..., :3], [("arange", 0)], [1]),
    "arange_from_one": (lambda x: torch.arange(1, x.shape[1] + 1) + x.sum(-1), [("arange", 0)], [1]),
    "arange_by_two": (lambda x: torch.arange(0, 2 * x.shape[1], 2) + x.sum(-1), [("arange", 0)], [1]),
    "zeros": (lambda x: torch.zeros(x.shape[1], 6) + x, [("zeros", 0)], [1]),
    "full": (lambda x: torch.full((x.shape[1], 6), 2.0) + x, [("full", 0)], [1]),
    "slice": (lambda x: torch.arange(200)[: x.shape[1]][:, None] * x, [("slice", 0)], [1]),
    "slice_from_two": (lambda x: torch.arange(200)[2 : x.shape[1] + 2][:, None] * x, [("slice", 0)], [1]),
    "flatten": (lambda x: x.reshape(x.shape[0], x.shape[1], 3, 2).flatten(2), [("reshape", 1)], [1]),
    "unflatten": (lambda x: x.transpose(1, 2).unflatten(1, (3, 2)), [], [3]),
    "repeat": (lambda x: torch.ones(1, 1).repeat(x.shape[1], 6) + x, [("repeat", 0)], [1]),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CASES)
def test_set_length(name: str, dynamic: bool) -> None:
    function, places, axes = CASES[name]
    graph = trace(function, dynamic)
    linear, rows = halved(graph)
    for target, axis in places:
        graph.set_length(ops(graph, target)[-1], axis, rows, 1)
    start = graph.ops.index(rows.producer) if rows.producer else 0
    for op in list(graph.ops):
        if op.kind != "size" and (graph.ops.index(op) > start or op.kind in ("create", "slice", "expand")):
            graph.refresh(op)
    graph.verify()
    (out,) = graph.outputs
    for axis in axes:
        assert out.shape is not None and rows.shape is not None and out.shape[axis] == rows.shape[1]
    module = graph.to_module()
    for batch, tokens in ((2, 8), (5, 11)) if dynamic else ((2, 8),):
        x = torch.randn(batch, tokens, 6)
        weight, bias = (graph.tensor(v) for v in linear.inputs[1:])  # type: ignore[arg-type]
        short = torch.nn.functional.linear(x, weight, bias)[:, ::2]
        torch.testing.assert_close(module(x), function(short))


@pytest.mark.parametrize("sizes", [3, [3] * 4], ids=["size", "sizes"])
def test_set_length_of_even_parts(sizes: Any) -> None:
    graph = trace(lambda x: x.transpose(1, 2).reshape(12, -1).split(sizes))
    (split,) = graph.ops_of("split")
    (linear,) = graph.ops_of("linear")
    like = graph.insert_call(HALVE, [linear.output], {"axis": 0}, after=linear).outputs[0]
    graph.set_length(split, 1, split.output, 1)  # another axis than the one that is cut: nothing to do
    graph.set_length(split, 0, like, 2)
    source = split.inputs[0]
    assert source is not None and source.producer is not None
    twice = graph.insert_call(
        torch.ops.aten.repeat.default, [source], {"repeats": [2, 1]}, after=source.producer
    )
    graph.set_operand(split, 0, twice.output)
    graph.refresh(split)
    assert [v.shape for v in split.outputs] == [(6, 8)] * 4 and split.attrs["sizes"] == (6,) * 4
    graph.verify()


def test_set_length_refuses_what_states_no_length() -> None:
    graph = trace(lambda x: x[:, -3:].relu())
    _, rows = halved(graph)
    with pytest.raises(ElisionError, match="states no length"):
        graph.set_length(ops(graph, "relu")[0], 1, rows, 1)
    with pytest.raises(ElisionError, match="counted from the end"):
        graph.set_length(ops(graph, "slice")[0], 1, rows, 1)


# ---- symbolic lengths and exporting again ----------------------------------------------------------------
def test_symbolic_attributes() -> None:
    graph = trace(lambda x: x * 2, dynamic=True)
    (mul,) = ops(graph, "mul")
    assert mul.output.shape is not None
    batch, tokens, width = mul.output.shape
    wide = {"shape": [batch, tokens * width // 2, 2]}
    made = graph.insert_call(torch.ops.aten.reshape.default, [mul.output], wide, after=mul)
    graph.replace_output(0, made.output)
    graph.verify()
    assert graph.run(torch.randn(3, 7, 6)).shape == (3, 21, 2)


def test_a_pinned_length_fails_the_verifier() -> None:
    graph = trace(lambda x: x * 2, dynamic=True)
    (mul,) = ops(graph, "mul")
    row = graph.insert_constant(np.ones((8, 6), np.float32), "rows")
    with pytest.raises(VerificationError, match="would be fixed to 8"):
        graph.insert_call(torch.ops.aten.add.Tensor, [mul.output, row], after=mul)
    graph.verify()
    assert shape(mul.output)[1] != "8"


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_to_export(dynamic: bool) -> None:
    graph = trace(lambda x: x.relu(), dynamic)
    halved(graph)
    (relu,) = ops(graph, "relu")
    graph.refresh(relu)
    x = torch.randn(3, 9, 6) if dynamic else torch.randn(2, 8, 6)
    program = graph.to_export((x,))
    again = FxGraph.from_export(program)
    assert [op.target for op in again.ops if op.kind != "size"] == [op.target for op in graph.ops]
    assert torch.equal(again.run(x), graph.run(x))
    if dynamic:
        other = torch.randn(4, 21, 6)
        assert torch.equal(program.module()(other), graph.run(other))
