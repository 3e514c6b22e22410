"""Element types of operators' outputs, from their schemas and operands."""

from __future__ import annotations

import functools

import onnx
import onnx_ir as ir

from . import onnx_dialect

BY_ATTRIBUTE = {"Cast": "to", "EyeLike": "dtype", "Bernoulli": "dtype", "RandomNormal": "dtype"}


def dtypes_of(node: ir.Node) -> list[ir.DataType | None]:
    """Element types of the outputs, from the operator's schema and its operands."""
    nothing: list[ir.DataType | None] = [None] * len(node.outputs)
    if node.domain == "elision":
        return onnx_dialect.dtypes_of(node)
    if node.domain not in ("", "ai.onnx"):
        # Ids or bytes come first, what says the type third.
        index = 2 if node.op_type in ("EmbedLayerNormalization", "GatherBlockQuantized") else 0
        value = node.inputs[index] if len(node.inputs) > index else None
        first = value.dtype if value is not None and node.domain == "com.microsoft" else None
        return [out.dtype or (first if i == 0 else None) for i, out in enumerate(node.outputs)]
    if node.op_type in BY_ATTRIBUTE:
        to = node.attributes.get_int(BY_ATTRIBUTE[node.op_type], 0)
        if to:
            return [ir.DataType(to)]
    if node.op_type == "ConstantOfShape":
        fill = node.attributes.get_tensor("value", None)
        return [ir.DataType.FLOAT if fill is None else fill.dtype]
    if node.op_type == "Constant":
        tensor = ir.convenience.get_const_tensor(node.outputs[0])
        return [None if tensor is None else tensor.dtype]
    types = schema_types(node.op_type)
    if types is None:
        return nothing
    formals, results = types
    bound: dict[str, ir.DataType] = {}
    for i, value in enumerate(node.inputs):
        if value is not None and value.dtype is not None and formals:
            bound.setdefault(formals[min(i, len(formals) - 1)], value.dtype)
    out: list[ir.DataType | None] = []
    for i in range(len(node.outputs)):
        result = results[min(i, len(results) - 1)] if results else ""
        out.append(result if isinstance(result, ir.DataType) else bound.get(result))
    return out


@functools.cache
def schema_types(op_type: str) -> tuple[list[str], list[str | ir.DataType]] | None:
    """The names of an operator's type variables per operand, and per output a variable or its only type."""
    try:
        schema = onnx.defs.get_schema(op_type, domain="")
    except onnx.defs.SchemaError:
        return None
    allowed = {c.type_param_str: list(c.allowed_type_strs) for c in schema.type_constraints}
    formals = [formal.type_str for formal in schema.inputs]
    results: list[str | ir.DataType] = []
    for formal in schema.outputs:
        choices = (
            [formal.type_str] if formal.type_str.startswith("tensor(") else allowed.get(formal.type_str, [])
        )
        if len(choices) == 1 and choices[0].startswith("tensor("):
            name = choices[0][7:-1]
            results.append(ir.DataType[{"float": "FLOAT", "double": "DOUBLE"}.get(name, name.upper())])
        else:
            results.append(formal.type_str)
    return formals, results
