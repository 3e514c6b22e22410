"""The ops taken apart for MLIR give what their definitions give, without torch-mlir."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from elision.kernels.mlir import PRIMITIVES
from elision.passes.errors import Refused
from elision.passes.ir.fx import FxGraph
from elision.passes.ir.fx_mlir import decompose
from elision.passes.ir.onnx import OnnxGraph
from elision.passes.onnx import mlir as onnx_mlir
from elision.runtime.api import optimize
from onnx import helper, numpy_helper
from torch import Tensor
from torch.testing import assert_close

from ..kernels import onnx_call
from ..kernels.cases import CASES, Case, call

aten = torch.ops.aten


class OneOp(torch.nn.Module):
    """The op of a case; absent operands stay absent."""

    def __init__(self, case: Case, operands: list[Tensor | None]) -> None:
        super().__init__()
        self.case = case
        self.there = [t is not None for t in operands]

    def forward(self, *given: Tensor) -> Any:
        feed = iter(given)
        operands = [next(feed) if there else None for there in self.there]
        return tuple(call(self.case.op, operands, self.case.attrs))


def close(found: Tensor, wanted: Tensor) -> None:
    """Maps to the bit, features to 1e-5 (half precision to its own)."""
    if wanted.is_floating_point():
        assert_close(found, wanted, rtol=2e-3 if wanted.dtype == torch.float16 else 1e-5, atol=1e-5)
    else:
        assert torch.equal(found, wanted)


def targets(graph: FxGraph) -> set[Any]:
    return {node.target for node in graph.module.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_graphs(case: Case) -> None:
    operands = case.make()
    given = [t for t in operands if t is not None]
    wanted = call(case.op, operands, case.attrs)
    graph = FxGraph.trace(OneOp(case, operands), given)
    assert decompose(graph) == {case.op: 1}
    graph.verify()
    assert not [t for t in targets(graph) if t in PRIMITIVES or "elision" in str(t)]
    for one, other in zip(graph.run(*given), wanted, strict=True):
        close(one, other)
    assert decompose(graph) == {}


# Products of few bits are ONNX Runtime's own operator in files, which torch-mlir does not read: docs/mlir.md says so.
# A length that only the data say is refused.
FILES = [
    case
    for case in CASES
    if case.op != "longest_row"
    and not (case.op in ("linear_topk", "linear_spread") and case.attrs["bits"] < 16)
]


@pytest.mark.parametrize("case", FILES, ids=str)
def test_onnx_graphs(case: Case) -> None:
    operands = case.make()
    wanted = call(case.op, operands, case.attrs)
    proto = onnx_call.model(case.op, operands, case.attrs, opset=23)
    for values, tensors in (
        (proto.graph.input, [t for t in operands if t is not None]),
        (proto.graph.output, wanted),
    ):
        for value, tensor in zip(values, tensors, strict=True):
            for dim, length in zip(value.type.tensor_type.shape.dim, tensor.shape):
                dim.dim_value = length
    graph = OnnxGraph(ir.from_proto(proto))
    assert case.op in onnx_mlir.decompose(graph)
    plain = ir.to_proto(graph.model)
    onnx.checker.check_model(plain, full_check=True)
    kinds = {node.op_type for node in plain.graph.node}
    assert not kinds & {"TopK", "ScatterElements", "Attention", "Shape", "Range"} and not plain.functions
    feeds = {v.name: t.numpy() for v, t in zip(proto.graph.input, [t for t in operands if t is not None])}
    for one, other in zip(onnx_call.session(plain).run(None, feeds), wanted, strict=True):
        close(torch.from_numpy(one), other)


def test_both_pipelines_say_it_as_lower() -> None:
    """`lower{target=mlir}` is this decomposition, for models of both hosts."""
    case = next(case for case in CASES if str(case).startswith("match_padded_tokens-r=3"))
    operands = case.make()
    result = optimize(OneOp(case, operands), "lower{target=mlir}", tuple(operands))
    assert result.report.passes[0].statistics == {"match_padded_tokens taken apart": 1}
    assert not targets(result.graph) & set(PRIMITIVES)


def test_a_length_of_data_is_refused() -> None:
    case = next(case for case in CASES if case.op == "longest_row")
    operands = case.make()
    with pytest.raises(Refused, match=r"longest_row \(%longest_row\) makes a length of data"):
        optimize(OneOp(case, operands), "lower{target=mlir}", tuple(operands))


def test_dynamic_batch() -> None:
    case = next(case for case in CASES if str(case).startswith("match_tokens-r=3-3"))
    module = OneOp(case, case.make())
    batch = torch.export.Dim("batch", min=2, max=64)
    graph = FxGraph.trace(module, (torch.randn(3, 17, 8),), dynamic_shapes={"given": ({0: batch},)})
    decompose(graph)
    graph.verify()
    for length in (2, 5):
        metric = torch.randn(length, 17, 8)
        for one, other in zip(graph.run(metric), module(metric), strict=True):
            assert torch.equal(one, other)


# ---- what it is built of -----------------------------------------------------------------------------
ROWS = {
    "ties": torch.tensor([[2.0, 1.0, 2.0, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0, -0.0]]),
    "nan and infinity": torch.tensor([[torch.nan, 1.0, torch.inf, torch.nan, -torch.inf]]),
    "integers": torch.tensor([[3, 1, 3, 2], [1, 1, 0, 5]]),
    "rank 3": torch.randn(2, 5, 3),
    "one": torch.zeros(3, 1),
    "none": torch.zeros(3, 0),
}


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_sort(name: str, descending: bool) -> None:
    x = ROWS[name]
    for dim in range(x.dim()):
        wanted = torch.sort(x, dim=dim, descending=descending, stable=True)
        found = PRIMITIVES[aten.sort.stable](x, stable=True, dim=dim, descending=descending)
        assert_close(found[0], wanted.values, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found[1], wanted.indices)


@pytest.mark.parametrize("name", [n for n in ROWS if n != "none"])
def test_max(name: str) -> None:
    x = ROWS[name]
    for dim in range(x.dim()):
        for keep in (False, True):
            best, place = PRIMITIVES[aten.max.dim](x, dim, keep)
            assert_close(best, x.amax(dim, keepdim=keep), rtol=0, atol=0, equal_nan=True)
            picked = torch.gather(x, dim, place if keep else place.unsqueeze(dim))
            assert_close(picked, x.amax(dim, keepdim=True), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(
        PRIMITIVES[aten.max.dim](ROWS["ties"], 1)[1], torch.tensor([4, 0])
    )  # the first of equals


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_scatter(dim: int) -> None:
    x = torch.randn(4, 6)
    index = torch.stack([torch.randperm(x.shape[dim])[:3] for _ in range(x.shape[1 - dim % 2])])
    index = index.t() if dim % 2 == 0 else index
    source = torch.randn(index.shape)
    assert torch.equal(PRIMITIVES[aten.scatter.src](x, dim, index, source), x.scatter(dim, index, source))
    assert torch.equal(PRIMITIVES[aten.scatter.value](x, dim, index, 5.0), x.scatter(dim, index, 5.0))
    twice, sources = torch.cat([index, index], dim), torch.cat([source, source + 1], dim)
    assert torch.equal(
        PRIMITIVES[aten.scatter.src](x, dim, twice, sources), x.scatter(dim, index, source + 1)
    )
    added = PRIMITIVES[aten.scatter_add.default](x, dim, twice, sources)
    assert_close(added, x.scatter_add(dim, twice, sources))


def test_scatter_of_nothing() -> None:
    x, none = torch.randn(2, 3), torch.zeros(2, 0, dtype=torch.int64)
    assert torch.equal(PRIMITIVES[aten.scatter.src](x, 1, none, torch.zeros(2, 0)), x)


def test_rows_are_added_as_a_product() -> None:
    x, source, index = (
        torch.randn(2, 4, 3),
        torch.randn(2, 6, 3),
        torch.randint(0, 4, (2, 6, 1)).expand(2, 6, 3),
    )
    assert_close(PRIMITIVES[aten.scatter_add.default](x, 1, index, source), x.scatter_add(1, index, source))


def test_a_partial_index_is_refused() -> None:
    with pytest.raises(ValueError, match="only a part"):
        PRIMITIVES[aten.scatter.src](
            torch.zeros(3, 4), 1, torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1)
        )


# ---- what ONNX graphs are built of --------------------------------------------------------------------
def onnx_pair(
    nodes: list[onnx.NodeProto], feeds: dict[str, Tensor], outputs: dict[str, int]
) -> tuple[Any, Any, Any]:
    """What a model gives before and after, and the operators left."""
    given = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(t.numpy().dtype), t.shape)
        for name, t in feeds.items()
    ]
    made = [helper.make_tensor_value_info(name, dtype, None) for name, dtype in outputs.items()]
    opset = [helper.make_opsetid("", 23)]
    proto = helper.make_model(helper.make_graph(nodes, "g", given, made), opset_imports=opset, ir_version=10)
    graph = OnnxGraph(ir.from_proto(proto))
    onnx_mlir.decompose(graph)
    arrays = {name: t.numpy() for name, t in feeds.items()}
    before, after = (onnx_call.session(p).run(None, arrays) for p in (proto, ir.to_proto(graph.model)))
    return before, after, {op.target for op in graph.ops}


@pytest.mark.parametrize("largest", [0, 1])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_topk(largest: int, count: int) -> None:
    k = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.array([count])))
    top = helper.make_node("TopK", ["x", "k"], ["values", "indices"], axis=1, largest=largest)
    outputs = {"values": onnx.TensorProto.FLOAT, "indices": onnx.TensorProto.INT64}
    before, after, left = onnx_pair([k, top], {"x": ROWS["ties"]}, outputs)
    assert "TopK" not in left
    for one, other in zip(after, before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_scatter_elements() -> None:
    feeds = {"x": torch.randn(2, 5), "at": torch.tensor([[4, 0, 2], [1, 3, 0]]), "u": torch.randn(2, 3)}
    node = helper.make_node("ScatterElements", ["x", "at", "u"], ["y"], axis=1)
    before, after, left = onnx_pair([node], feeds, {"y": onnx.TensorProto.FLOAT})
    assert "ScatterElements" not in left
    np.testing.assert_array_equal(after[0], before[0])


@pytest.mark.parametrize("attributes", [{"axis": 0}, {"axis": 1, "reduction": "add"}])
def test_other_scatters_stay(attributes: dict[str, Any]) -> None:
    """They are the importer's business."""
    feeds = {"x": torch.randn(2, 2), "at": torch.tensor([[1, 0], [0, 1]]), "u": torch.randn(2, 2)}
    node = helper.make_node("ScatterElements", ["x", "at", "u"], ["y"], **attributes)
    before, after, left = onnx_pair([node], feeds, {"y": onnx.TensorProto.FLOAT})
    assert "ScatterElements" in left
    np.testing.assert_array_equal(after[0], before[0])
