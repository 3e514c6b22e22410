"""Dialect ops in a model: their function bodies, taken from the definitions in `kernels`."""

from __future__ import annotations

import onnx
import onnx_ir as ir

DOMAIN = "elision"


def add_function(model: ir.Model, op: str) -> None:
    """Add the FunctionProto of dialect op `op` (and of the dialect ops its body calls) to `model`, once."""
    from ...kernels import OPS

    if any(f.domain == DOMAIN and f.name == op for f in model.functions.values()):
        return
    function = OPS[op].onnx_function()
    if isinstance(function, onnx.FunctionProto):
        function = ir.from_proto(function)
    model.functions[function.identifier()] = function
    model.opset_imports.setdefault(DOMAIN, 1)
    for node in function:
        if node.domain == DOMAIN:
            add_function(model, node.op_type)
