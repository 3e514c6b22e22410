"""Dialect ops in a model: nodes that call function bodies made by the definitions in `kernels`.

A body depends on the ranks and element types of its operands, so one op may bring several functions into a model.
What the op was asked for stands in the node's metadata: the function declares only the attributes that its
body reads, and a file that was saved and read again must still be understood.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import onnx
import onnx_ir as ir

from ..errors import Refused
from .graph import Shape
from .onnx_shapes import ShapeEnv, numpy_dtype

DOMAIN = "elision"
OP, ATTRIBUTES = "elision.op", "elision.attributes"
"""Metadata keys of a dialect node: the op's name, and its attributes as JSON."""

OLDEST = 18
"""The first operator set in which the function bodies are written."""


def definition(name: str) -> Any:
    """The op's one definition. Raises Refused when the dialect has no such op."""
    from ...kernels import OPS

    if name not in OPS:
        raise Refused(f"{name!r} is not an op of the dialect")
    return OPS[name]


def make_node(model: ir.Model, op: str, inputs: Sequence[ir.Value | None], attrs: dict[str, Any]) -> ir.Node:
    """A node of dialect op `op` (outputs nameless), whose function body is put into `model` where it is missing.

    Raises Refused when the op is unknown or the model's operator set is too old for the bodies.
    """
    found = definition(op)
    opset = model.opset_imports.get("", 0)
    if opset < OLDEST:
        raise Refused(f"the model's operator set {opset} is older than {OLDEST}, which {op} needs")
    signature: list[tuple[int, int] | None] = []
    for value in inputs:
        if value is None:
            signature.append(None)
            continue
        if value.shape is None or value.dtype is None:
            raise Refused(f"{op} needs the rank and type of %{value.name}, which are not known")
        signature.append((len(value.shape), int(value.dtype)))
    pin = getattr(found, "pin", None)
    attrs = attrs if pin is None else pin([None if v is None else v.shape for v in inputs], attrs)
    proto = found.onnx_function(signature, attrs, opset)
    add_function(model, proto)
    complete = getattr(found, "complete", None)
    attrs = attrs if complete is None else complete(attrs)
    declared = {*proto.attribute, *(a.name for a in proto.attribute_proto)}
    node = ir.node(
        proto.name,
        list(inputs),
        {k: v for k, v in attrs.items() if k in declared} or None,
        domain=DOMAIN,
        overload=proto.overload,
        num_outputs=len(proto.output),
    )
    node.metadata_props[OP] = op
    node.metadata_props[ATTRIBUTES] = json.dumps(attrs, sort_keys=True)
    return node


def add_function(model: ir.Model, proto: onnx.FunctionProto) -> None:
    """Add a function to the model, once; the operator sets it needs are declared."""
    key = (proto.domain, proto.name, proto.overload)
    if key not in model.functions:
        function = ir.from_proto(proto)
        model.functions[key] = function
    for opset in proto.opset_import:
        model.opset_imports.setdefault(opset.domain, opset.version)
    model.opset_imports.setdefault(DOMAIN, 1)
    model.ir_version = max(model.ir_version or 10, 10)  # the first with overloads and metadata


def op_and_attributes(node: ir.Node) -> tuple[str, dict[str, Any]]:
    """The dialect op of a node and what it was asked for."""
    attrs: dict[str, Any] = {
        name: attr.value for name, attr in node.attributes.items() if isinstance(attr, ir.Attr)
    }
    attrs.update(json.loads(node.metadata_props.get(ATTRIBUTES, "{}")))
    return node.metadata_props.get(OP) or op_of_function(node.op_type), attrs


def op_of_function(name: str) -> str:
    """The op that a function of this name is for: element types may stand behind it (`OpDef.custom`), and the number
    of a variant (`onnx/lower_functions.py`)."""
    start, _, number = name.rpartition("_")
    name = start if number.isdecimal() else name
    types = {kind.lower() for kind, _ in onnx.TensorProto.DataType.items()}
    while (shorter := name.rpartition("_"))[2] in types:
        name = shorter[0]
    return name


def shapes_of(env: ShapeEnv, node: ir.Node) -> list[Shape | None] | None:
    """Output shapes from the op's definition; None for an op of our domain that this version does not know."""
    from ...kernels import OPS

    name, attrs = op_and_attributes(node)
    if name not in OPS:
        return None
    shapes = [None if v is None else env.need(v) for v in node.inputs]
    found = OPS[name].output_shapes(shapes, attrs)
    return [
        tuple(env.fresh(out, axis) if length is None else length for axis, length in enumerate(shape))
        for out, shape in zip(node.outputs, found)
    ]


def dtypes_of(node: ir.Node) -> list[ir.DataType | None]:
    """Element types of the outputs, from the op's definition."""
    from ...kernels import OPS

    name, attrs = op_and_attributes(node)
    if name not in OPS:
        return [out.dtype for out in node.outputs]
    names = OPS[name].output_dtypes([None if v is None else numpy_dtype(v.dtype) for v in node.inputs], attrs)
    back = {"float32": "FLOAT", "float64": "DOUBLE"}
    return [ir.DataType[back.get(n, n.upper())] for n in names]
