"""A function is called like its op where the library of custom ops takes its element types, and otherwise not."""

from __future__ import annotations

import pytest
import torch
from elision.kernels import OPS
from elision.passes.ir.onnx import OnnxGraph
from elision.passes.ir.onnx_dialect import op_of_function
from elision.passes.onnx.io import from_proto
from onnx import TensorProto

from . import onnx_call
from .cases import token_map

FLOAT, HALF, DOUBLE, INT64, INT32 = (
    int(getattr(TensorProto, name)) for name in ("FLOAT", "FLOAT16", "DOUBLE", "INT64", "INT32")
)
MAP = [(2, INT32)] * 3


@pytest.mark.parametrize(
    ("op", "signature", "attrs", "name"),
    [
        ("merge_tokens", [(3, FLOAT), None, *MAP], {"axis": 1}, "merge_tokens"),
        ("merge_tokens", [(3, HALF), None, *MAP], {"axis": 1}, "merge_tokens"),
        ("merge_tokens", [(3, DOUBLE), None, *MAP], {"axis": 1}, "merge_tokens_double"),
        ("restore_tokens", [(3, INT64), (2, INT32)], {"axis": 1}, "restore_tokens"),
        ("match_tokens", [(3, DOUBLE)], {"r": 2}, "match_tokens_double"),
        ("attention", [(4, FLOAT)] * 3, {}, "attention"),
        ("attention", [(4, FLOAT)] * 3 + [(4, INT64)], {}, "attention_int64"),
        ("attention", [(4, DOUBLE)] * 3 + [(4, DOUBLE)], {}, "attention_double"),
        ("select_tokens", [(2, INT64), (2, INT32)], {"axis": 1, "rank": 2}, "select_tokens"),
    ],
)
def test_names(op: str, signature: list, attrs: dict, name: str) -> None:
    assert OPS[op].onnx_function(signature, attrs).name == name
    assert op_of_function(name) == op


def test_what_is_no_element_type_is_another_op() -> None:
    assert op_of_function("merge_tokens_fast") == "merge_tokens_fast"


def test_a_file_without_our_metadata_is_understood() -> None:
    operands = [torch.randn(2, 13, 4).double(), None, *token_map(2, 13, 4)]
    model = onnx_call.model("merge_tokens", operands, {"axis": 1})
    (op,) = [op for op in OnnxGraph(from_proto(model)).ops if op.kind == "elision"]
    assert op.target == "elision.merge_tokens"
    assert op.attrs["op"] == "merge_tokens"
