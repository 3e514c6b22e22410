"""bfloat16 arithmetic in a float32 model (Falcon's position biases): float32 operators with a rounding after each.

onnxruntime has no such operators on the CPU; the results have the same bits. Models whose weights are bfloat16 are left
as they are: they are made for a device that has them.
"""

from __future__ import annotations

import onnx_ir as ir

from .surgery import Editor

WIDE, NARROW = ir.DataType.FLOAT, ir.DataType.BFLOAT16
OPERATORS = {"Add", "Sub", "Mul", "Div"}
SMALL = 4096
"""A model has bfloat16 weights where one has more elements than this."""


def widen(ed: Editor) -> None:
    weights = ed.graph.initializers.values()
    if any(v.dtype == NARROW and v.const_value is not None and v.const_value.size > SMALL for v in weights):
        return
    for node in list(ed.graph):
        if node.domain != "" or node.op_type not in OPERATORS:
            continue
        if any(value is None or value.dtype != NARROW for value in node.inputs):
            continue
        wide = [ed.emit("Cast", [value], {"to": WIDE}, before=node) for value in node.inputs]
        out = ed.emit(node.op_type, wide, before=node)
        ed.replace(node.outputs[0], ed.emit("Cast", [out], {"to": NARROW}, before=node))
        ed.count("bfloat16 arithmetic in float32")
    ed.sweep()
