"""The verifier of the ONNX view: structure, shapes against a fresh inference, and onnx's own checker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
import sympy

from ..errors import VerificationError
from .graph import Shape, product
from .onnx_shapes import ShapeEnv, tensor_shape

if TYPE_CHECKING:
    from .onnx import OnnxGraph

BIG = 256
"""Tensors of more elements than this are left out of what onnx's checker is shown."""


def verify(graph: OnnxGraph) -> None:
    structure(graph)
    shapes(graph)
    onnx_checker(graph)


def structure(graph: OnnxGraph) -> None:
    """Every operand is made before it is used, names are unique, and the view lists the model's nodes."""
    model = graph.model.graph
    seen: set[ir.Value] = {*model.inputs, *model.initializers.values()}
    names: dict[str, ir.Value] = {}
    for value in seen:
        names[value.name or ""] = value
    order = iter(graph.ops)
    for node in model:
        for value in node.inputs:
            if value is not None and value not in seen:
                raise VerificationError(
                    f"{node.op_type} '{node.name}' reads %{value.name} before it is computed"
                )
        for out in node.outputs:
            seen.add(out)
            if out.name and names.setdefault(out.name, out) is not out:
                raise VerificationError(f"two values are named '{out.name}'")
        if node.op_type != "Constant" and (op := next(order, None)) is not None and op.raw is not node:
            raise VerificationError(f"the view has {op.target} '{op.name}' where the model has '{node.name}'")
    for value in model.outputs:
        if value not in seen:
            raise VerificationError(f"the graph output '{value.name}' is not computed")


def shapes(graph: OnnxGraph) -> None:
    """Infer everything again from the inputs, and compare."""
    declared: dict[ir.Value, ir.Shape | None] = {
        out: out.shape for n in graph.model.graph for out in n.outputs
    }
    fresh = ShapeEnv(graph.model)
    fresh.trust_declared = graph.env.trust_declared
    fresh.run()
    for out, shape in declared.items():  # what is written into the model stays the view's
        out.shape = shape
    for op in graph.ops:
        for value in op.outputs:
            found = fresh.shapes.get(value.raw)
            if found is not None and value.shape is not None and not same(found, value.shape):
                raise VerificationError(
                    f"{op.target} '{op.name}': %{value.name} is {list(value.shape)} in the view, {list(found)} when "
                    "inferred again"
                )
        if op.raw.op_type == "Reshape" and op.raw.domain == "":
            x, y = fresh.shape(op.raw.inputs[0]), fresh.shape(op.raw.outputs[0])
            if x is not None and y is not None and not same_count(x, y):
                raise VerificationError(
                    f"Reshape '{op.name}' makes {list(y)} of {list(x)}: the elements do not fit"
                )


def same(a: Shape, b: Shape) -> bool:
    return len(a) == len(b) and all(x == y or sympy.expand(x - y) == 0 for x, y in zip(a, b))


def same_count(a: Shape, b: Shape) -> bool:
    """False only where the two element counts surely differ: both static."""
    left, right = product(a), product(b)
    return left == right or not (isinstance(left, int) and isinstance(right, int))


def onnx_checker(graph: OnnxGraph) -> None:
    """onnx's checker with strict shape inference, on a copy whose big weights are inputs (so 2 GB is no limit)."""
    proto, full = light_proto(graph.model), True
    for infos in (proto.graph.input, proto.graph.output):
        for info in infos:
            if info.type.HasField("tensor_type"):
                # The checker asks for shapes, onnxruntime does not; an unknown rank is said by no dim at all, which
                # strict inference would take for a scalar: such a model is only checked without it.
                full = full and info.type.tensor_type.HasField("shape")
                info.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(proto, full_check=full)
    except (
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
        ValueError,
        RuntimeError,
    ) as error:
        first = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), "the model is not valid"
        )
        raise VerificationError(f"onnx's checker: {first}") from error


def light_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as a ModelProto in which every large initializer is a graph input of the same name and type."""
    clone = model.clone()
    for name, value in list(clone.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and (tensor.size > BIG or isinstance(tensor, ir.ExternalTensor)):
            value.shape, value.dtype = ir.Shape(tensor_shape(tensor)), tensor.dtype
            value.const_value = None
            del clone.graph.initializers[name]
            if value not in clone.graph.inputs:
                clone.graph.inputs.append(value)
    return ir.to_proto(clone)
