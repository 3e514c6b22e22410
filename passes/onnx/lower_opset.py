"""The oldest onnxruntime that we write for is 1.20: operator set 21, version 10 of the file format.

Operator sets only say which definition of each operator is meant. A file can be relabelled where all its operators had
the same definition before: the same operands, outputs and attributes, and the types in use allowed.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

NEWEST, FORMAT = 21, 10
KEPT_BACK = 18
"""The oldest operator set of the function bodies: a file is never relabelled to one before it."""


def relabel(model: ir.Model) -> list[str]:
    """Bring the label of `model` down to NEWEST; the operators that do not allow it, and then nothing is changed."""
    current = model.opset_imports.get("", 0)
    if current <= NEWEST:
        newer = [f for f in model.functions.values() if f.opset_imports.get("", 0) > current >= KEPT_BACK]
        problems = [
            why
            for f in newer
            for node in f.all_nodes()
            for why in newer_than(node, f.opset_imports[""], current)
        ]
        for function in newer if not problems else ():
            function.opset_imports[""] = current
    else:
        problems = [why for node, version in every_node(model) for why in newer_than(node, version, NEWEST)]
        if not problems:
            for function in model.functions.values():
                if function.opset_imports.get("", 0) > NEWEST:
                    function.opset_imports[""] = NEWEST
            model.opset_imports[""] = NEWEST
    if not problems:
        model.ir_version = min(model.ir_version or FORMAT, FORMAT)
    return list(dict.fromkeys(problems))


def every_node(model: ir.Model) -> Iterator[tuple[ir.Node, int]]:
    """Nodes of the graph, its subgraphs and all functions, with the operator set they are written in."""
    for node in model.graph.all_nodes():
        yield node, model.opset_imports[""]
    for function in model.functions.values():
        for node in function.all_nodes():
            yield node, function.opset_imports.get("", 0)


def newer_than(node: ir.Node, version: int, oldest: int) -> list[str]:
    """Why a node of operator set `version` is not the same in `oldest`; nothing where it is."""
    if node.domain not in ("", "ai.onnx") or version <= oldest:
        return []
    if not onnx.defs.has(node.op_type, version, ""):
        return []  # one of onnxruntime's own under the standard domain
    if not onnx.defs.has(node.op_type, oldest, ""):
        return [f"{node.op_type} came after operator set {oldest}"]
    new, old = (onnx.defs.get_schema(node.op_type, v, "") for v in (version, oldest))
    if new.since_version == old.since_version:
        return []
    known = old.attributes
    for name, attr in node.attributes.items():
        if name not in known:
            return [f"{node.op_type} has no attribute {name} in operator set {oldest}"]
        if known[name].type.name != attr.type.name:  # type: ignore[attr-defined]
            return [f"{node.op_type} means another thing by {name} in operator set {oldest}"]
    for name, attr in new.attributes.items():
        if name not in node.attributes and name in known and not same_default(attr, known[name]):
            return [f"{node.op_type} has another default of {name} in operator set {oldest}"]
    if len(node.inputs) > old.max_input or len(node.outputs) > old.max_output:
        return [f"{node.op_type} has fewer operands in operator set {oldest}"]
    for values, formal in ((node.inputs, old.inputs), (node.outputs, old.outputs)):
        for index, value in enumerate(values):
            types = formal[min(index, len(formal) - 1)].types
            if value is not None and value.dtype is not None and type_text(value.dtype) not in types:
                return [f"{node.op_type} takes no {value.dtype.name.lower()} in operator set {oldest}"]
    return []


def same_default(new: onnx.defs.OpSchema.Attribute, old: onnx.defs.OpSchema.Attribute) -> bool:
    return new.default_value.SerializeToString() == old.default_value.SerializeToString()


def type_text(dtype: ir.DataType) -> str:
    """As schemas write it: "tensor(float)"."""
    return f"tensor({onnx.TensorProto.DataType.Name(int(dtype)).lower()})"  # type: ignore[attr-defined]
