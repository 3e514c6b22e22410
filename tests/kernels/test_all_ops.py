"""What must hold of every op: shapes, types, ONNX against torch, whole in exported graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from elision.kernels import OPS, decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from . import onnx_call
from .cases import CASES, Case, call


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes_and_types_are_those_of_the_result(case: Case) -> None:
    operands = case.make()
    found = call(case.op, operands, case.attrs)
    op = OPS[case.op]
    shapes = op.output_shapes([None if t is None else tuple(t.shape) for t in operands], case.attrs)
    dtypes = op.output_dtypes(
        [None if t is None else str(t.dtype).split(".")[1] for t in operands], case.attrs
    )
    assert unknown(shapes, found) == [tuple(t.shape) for t in found]
    assert dtypes == [str(t.dtype).split(".")[1] for t in found]
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fakes = [None if t is None else mode.from_tensor(t, static_shapes=True) for t in operands]
        made = call(case.op, fakes, case.attrs)
        assert [tuple(t.shape) for t in made] == unknown(shapes, made)
    assert op.flops([None if t is None else tuple(t.shape) for t in operands], case.attrs) >= 0
    assert op.bytes([None if t is None else tuple(t.shape) for t in operands], case.attrs) > 0


def unknown(shapes: list[Any], found: list[torch.Tensor]) -> list[Any]:
    """The shapes, with lengths that only the data say as they were found."""
    return [
        tuple(own if length is None else length for length, own in zip(shape, tensor.shape, strict=True))
        for shape, tensor in zip(shapes, found, strict=True)
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_onnx_gives_what_torch_gives(case: Case) -> None:
    operands = case.make()
    expected = call(case.op, operands, case.attrs)
    for opset in (18, 23):
        found = onnx_call.run(case.op, operands, case.attrs, opset)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(
                one, other, rtol=2e-3 if one.dtype == torch.float16 else 1e-5, atol=1e-5
            )


class _Call(torch.nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def forward(self, *operands: Any) -> Any:
        return tuple(call(self.case.op, list(operands), self.case.attrs))


FIRST = {case.op: case for case in reversed(CASES)}


@pytest.mark.parametrize("name", OPS)
def test_export_keeps_the_op_whole(name: str) -> None:
    case = FIRST[name]
    operands = case.make()
    exported = torch.export.export(_Call(case), tuple(operands))
    targets = [n.target for n in exported.graph.nodes if n.op == "call_function"]
    assert getattr(torch.ops.elision, name).default in targets
    for one, other in zip(exported.module()(*operands), call(name, operands, case.attrs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", OPS)
def test_decomposition_table_takes_the_op_apart(name: str) -> None:
    case = FIRST[name]
    operands = case.make()
    exported = torch.export.export(_Call(case), tuple(operands)).run_decompositions(decompositions())
    assert not [n for n in exported.graph.nodes if "elision" in str(n.target)]
    for one, other in zip(exported.module()(*operands), call(name, operands, case.attrs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", OPS)
def test_results_do_not_alias_the_operands(name: str) -> None:
    case = FIRST[name]
    operands = case.make()
    held = {t.untyped_storage().data_ptr() for t in operands if t is not None}
    assert not [t for t in call(name, operands, case.attrs) if t.untyped_storage().data_ptr() in held]


def test_attributes_are_checked() -> None:
    op = OPS["merge_tokens"]
    with pytest.raises(ValueError, match="needs the attribute 'axis'"):
        op.output_shapes([(2, 4, 3), None, (2, 4), (2, 3), (2, 1)], {})
    with pytest.raises(ValueError, match="no attribute 'axes'"):
        op.complete({"axis": 1, "axes": 2})
    with pytest.raises(ValueError, match="operator set 18"):
        op.onnx_function([(3, 1), None, (2, 6), (2, 6), (2, 6)], {"axis": 1}, opset=16)
    with pytest.raises(ValueError, match="takes 1 operands"):
        OPS["mean_heads"].output_dtypes(["float32", "int32"], {})
