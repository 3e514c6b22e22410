"""Folding: what does not depend on the inputs is computed once, and shapes are said as plainly as possible.

Three steps. Integers that symbolic shape inference knows become constants, and with them whole
Shape-Gather-Concat chains disappear; a Reshape whose target has one unknown axis gets a constant with 0 and -1.
Nodes that read only constants (a position table resized by Resize, say) are evaluated by ONNX Runtime, the
way it would itself when a session starts. Last, nodes that do nothing are removed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import ElisionError
from ..ir.onnx_run import run_model
from ..ir.onnx_shapes import constant_tensor, tensor_shape
from .surgery import Editor

BUDGET = 64 << 20
"""A folded constant may take at most this many bytes, unless it is no bigger than what it is computed from."""

RANDOM = {
    "RandomNormal",
    "RandomUniform",
    "RandomNormalLike",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
}


def fold_shapes(ed: Editor) -> None:
    """Replace every integer value that is known before the run by a constant, and simplify Reshape targets."""
    for node in ed.graph:
        if node.op_type == "Constant" and node.domain == "":
            continue
        for out in node.outputs:
            known = ed.env.data.get(out)
            if known is None or not (out.uses() or out.is_graph_output()) or out.is_graph_output():
                continue
            if not all(isinstance(x, int) for x in known.ravel()):
                continue
            if out.dtype is None or (out.dtype.is_floating_point() and node.op_type != "Cast"):
                continue
            array = np.asarray(known.tolist()).astype(out.dtype.numpy())
            ed.replace(out, ed.constant(array, f"{out.name}_known"))
            ed.count("shape values folded")
    for node in ed.graph:
        if node.op_type == "Reshape" and node.domain == "":
            plain_reshape(ed, node)
        elif node.op_type == "Slice" and node.domain == "":
            plain_slice(ed, node)


def plain_sizes(ed: Editor) -> None:
    """Vectors of known lengths and symbols as Concat of constants and `Shape(x)[i:i+1]`, whatever led to them.

    x is always one whose Shape the old computation read as well, so nothing new is kept alive.
    """
    for node in list(ed.graph):
        if node.domain != "" or node.op_type not in (
            "Concat",
            "Where",
            "Mul",
            "Gather",
            "Slice",
            "Max",
            "Add",
        ):
            continue
        out = node.outputs[0]
        known = ed.env.data.get(out)
        if known is None or known.ndim != 1 or out.dtype != ir.DataType.INT64 or is_plain_size(ed, node):
            continue
        if not (out.uses() and 2 <= known.size <= 8) or out.is_graph_output():
            continue
        lengths = lengths_above(ed, node)
        if not all(isinstance(x, int) or x in lengths for x in known):
            continue
        parts: list[ir.Value] = []
        for x in known:
            if isinstance(x, int):
                parts.append(ed.ints([x], "length"))
            else:
                source, axis = lengths[x]
                parts.append(ed.emit("Shape", [source], {"start": axis, "end": axis + 1}, before=node))
        ed.replace(out, ed.emit("Concat", parts, {"axis": 0}, before=node))
        ed.count("sizes made plain")


def is_plain_size(ed: Editor, node: ir.Node) -> bool:
    """A Concat of constants and single lengths."""
    if node.op_type != "Concat":
        return False
    shapes = [ed.made_by(v, "Shape") for v in node.inputs if not ed.is_constant(v)]
    return all(s is not None and s.attributes.get_int("end", -1) >= 0 for s in shapes)


def lengths_above(ed: Editor, node: ir.Node) -> dict[Any, tuple[ir.Value, int]]:
    """The symbols that Shape nodes above `node` read, each with a value and its axis."""
    found: dict[Any, tuple[ir.Value, int]] = {}
    queue, seen = [node], {node}
    while queue and len(seen) < 100:
        current = queue.pop(0)
        if current.op_type == "Shape" and current.domain == "":
            source = current.inputs[0]
            for axis, length in enumerate(ed.shape(source) or ()):
                if source is not None and not isinstance(length, int):
                    found.setdefault(length, (source, axis))
            continue
        for value in current.inputs:
            above = None if value is None else value.producer()
            if above is not None and above not in seen:
                seen.add(above)
                queue.append(above)
    return found


def plain_reshape(ed: Editor, node: ir.Node) -> None:
    """A constant target: lengths, 0 where the operand's axis is copied, one -1."""
    out, x = ed.shape(node.outputs[0]), ed.shape(node.inputs[0])
    if out is None or x is None or 0 in out:
        return
    target = ed.env.known_ints(node.inputs[1])
    if target is not None and ed.is_constant(node.inputs[1]) and list(target) == list(out):
        return
    static = [i for i, d in enumerate(out) if isinstance(d, int)]
    open_axes = [i for i in range(len(out)) if i not in static]
    copied = [i for i in open_axes if i < len(x) and x[i] == out[i]]
    free = [i for i in open_axes if i not in copied]
    if len(free) > 1:
        return
    parts: list[int] = [0 if i in copied else -1 if i in free else int(d) for i, d in enumerate(out)]  # type: ignore[arg-type]
    if not free and len(copied) == 1 and copied[0] != 0:
        parts[copied[0]] = -1  # the usual spelling
    if ed.is_constant(node.inputs[1]) and target == parts and not node.attributes.get_int("allowzero", 0):
        return
    node.attributes.pop("allowzero", None)
    node.replace_input_with(1, ed.ints(parts, f"{node.outputs[0].name}_shape"))
    ed.count("reshape targets made constant")


def plain_slice(ed: Editor, node: ir.Node) -> None:
    """An end that is the whole length becomes the largest integer."""
    x, ends = ed.shape(node.inputs[0]), ed.env.ints(node.inputs[2])
    third = node.inputs[3] if len(node.inputs) > 3 else None
    axes = ed.env.known_ints(third) if third is not None else None
    if x is None or ends is None or axes is None or ed.is_constant(node.inputs[2]):
        return
    plain: list[Any] = [
        np.iinfo(np.int64).max if end is not None and x[axis % len(x)] == end else end
        for axis, end in zip(axes, ends)
    ]
    if all(isinstance(end, int) for end in plain):
        node.replace_input_with(2, ed.ints(plain, f"{node.outputs[0].name}_ends"))
        ed.count("slice ends made constant")


def fold_constants(ed: Editor) -> None:
    """Evaluate what reads only constants, in one ONNX Runtime session."""
    constant: set[ir.Value] = set()
    chosen: list[ir.Node] = []
    for node in ed.graph:
        if node.op_type == "Constant" and node.domain == "":
            continue
        if node.domain not in ("", "com.microsoft") or node.op_type in RANDOM or not node.inputs:
            continue
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            continue
        if node.op_type == "DequantizeLinear":  # stays: folding it would undo the file's compression
            continue
        if all(v is None or v in constant or ed.is_constant(v) for v in node.inputs) and affordable(ed, node):
            chosen.append(node)
            constant.update(node.outputs)
    if not chosen:
        return
    inside = set(chosen)
    wanted = [
        out
        for node in chosen
        for out in node.outputs
        if out.name and not out.is_graph_output() and any(use.node not in inside for use in out.uses())
    ]
    if not wanted:
        return
    arrays = evaluate(ed, chosen, wanted)
    if arrays is None:
        return
    for out, array in zip(wanted, arrays):
        ed.replace(out, ed.constant(array, f"{out.name}_folded"))
    ed.count_many("nodes folded to constants", len(chosen))
    ed.sweep()


def affordable(ed: Editor, node: ir.Node) -> bool:
    read = sum(t.nbytes for v in node.inputs if (t := constant_tensor(v)) is not None)
    written = 0.0
    for out in node.outputs:
        shape = ed.shape(out)
        if shape is None or not all(isinstance(d, int) for d in shape):
            return False
        width = out.dtype.itemsize if out.dtype is not None else 8
        written += float(np.prod([float(d) for d in shape], initial=1.0)) * width  # type: ignore[arg-type]
    return written <= max(BUDGET, read) and read <= 4 * BUDGET


def evaluate(ed: Editor, nodes: list[ir.Node], wanted: list[ir.Value]) -> list[np.ndarray] | None:
    """The values of `wanted`; None when ONNX Runtime cannot run these nodes."""
    mapping: dict[ir.Value, ir.Value] = {}
    initializers: list[ir.Value] = []
    copies: list[ir.Node] = []
    for node in nodes:
        inputs: list[ir.Value | None] = []
        for value in node.inputs:
            if value is None:
                inputs.append(None)
                continue
            if value not in mapping:
                tensor = constant_tensor(value)
                assert tensor is not None
                held = ir.Value(name=f"c{len(mapping)}", const_value=ir.tensor(tensor.numpy()))
                held.shape, held.dtype = ir.Shape(tensor_shape(tensor)), tensor.dtype
                initializers.append(held)
                mapping[value] = held
            inputs.append(mapping[value])
        copied = ir.node(
            node.op_type, inputs, dict(node.attributes), domain=node.domain, num_outputs=len(node.outputs)
        )
        for i, out in enumerate(node.outputs):
            copied.outputs[i].name = f"v{len(mapping)}_{i}"
            copied.outputs[i].type = out.type
            mapping[out] = copied.outputs[i]
        copies.append(copied)
    graph = ir.Graph(
        [],
        [mapping[v] for v in wanted],
        nodes=copies,
        initializers=initializers,
        opset_imports=dict(ed.model.opset_imports),
        name="constants",
    )
    try:
        return run_model(ir.Model(graph, ir_version=min(ed.model.ir_version or 10, 10)), {}, optimise=True)
    except ElisionError as error:
        # Not an error of the user's: the nodes simply stay in the graph.
        ed.near_misses.append(f"constants left unfolded: {error}")
        return None


def remove_idle(ed: Editor) -> None:
    """Remove nodes that hand on what they are given."""
    for node in list(ed.graph):
        if node.domain != "" or not node.inputs or node.inputs[0] is None:
            continue
        x, out = node.inputs[0], node.outputs[0]
        if idle(ed, node) and not (out.is_graph_output() and (x.is_graph_input() or ed.is_constant(x))):
            if any(extra.uses() or extra.is_graph_output() for extra in node.outputs[1:]):
                continue
            ed.replace(out, x)
            ed.count("idle nodes removed")


def idle(ed: Editor, node: ir.Node) -> bool:
    x, out = node.inputs[0], node.outputs[0]
    shape_in, shape_out = ed.shape(x), ed.shape(out)
    kind = node.op_type
    if kind == "Identity":
        return True
    if kind == "Dropout":
        training = node.inputs[2] if len(node.inputs) > 2 else None
        return training is None or ed.number(training) == 0.0
    if shape_in is None or shape_in != shape_out:
        return False
    if kind == "Cast":
        return x is not None and x.dtype == out.dtype
    if kind == "Transpose":
        return list(node.attributes.get_ints("perm", [])) == list(range(len(shape_in)))
    if kind in ("Reshape", "Expand", "Squeeze", "Unsqueeze", "Flatten"):
        return True
    if kind == "Concat":
        return len(node.inputs) == 1
    if kind == "Slice":
        steps = (
            ed.env.known_ints(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else [1]
        )
        return steps is not None and set(steps) <= {1}
    if kind in ("Mul", "Div"):
        return ed.number(node.inputs[1]) == 1.0
    if kind in ("Add", "Sub"):
        return ed.number(node.inputs[1]) == 0.0
    return False
