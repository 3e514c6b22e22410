"""An ONNX graph for MLIR: our functions inlined, whole attentions taken apart, sorts and scatters as comparisons.

torch-mlir's ONNX importer takes operators one by one and knows no lengths but those that are written down, so all
lengths must be numbers. It has no Attention; TopK and ScatterElements it lowers to a dialect of its own (`tm_tensor`).
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from ..ir.graph import Op, Value, static
from ..ir.onnx import OnnxGraph
from ..ir.onnx_dialect import op_and_attributes
from ..ir.onnx_shapes import ShapeEnv
from .normalise import fold_all
from .surgery import Editor, used

PREFIX = "elision."


def decompose(graph: OnnxGraph) -> dict[str, int]:
    """Rewrite a normalised graph in place, its numbers the same; returns how often each op was taken apart.

    What has no plain form here stays: the importer then says what it does not take. Ops and values that the caller
    holds are void unless the result is empty."""
    counts = Counter(op.target for op in graph.ops if op.target.startswith(PREFIX))
    counts |= _plain_attentions(graph)
    model = graph.model
    common.InlinePass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    ed = Editor(model, ShapeEnv(model).run())
    fold_all(ed)
    rules = {"TopK": _rank, "ScatterElements": _compare}
    for node in list(ed.graph):
        if node.domain == "" and node.op_type in rules:
            counts[node.op_type] += rules[node.op_type](ed, node)
    fold_all(ed)
    common.RemoveUnusedFunctionsPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    OnnxGraph.__init__(graph, model)  # the view anew: functions have become many nodes
    return {name.removeprefix(PREFIX): times for name, times in counts.items() if times}


def _plain_attentions(graph: OnnxGraph) -> dict[str, int]:
    """Every attention as the dialect's over split heads, whose function is products and a softmax."""
    counts: Counter[str] = Counter()
    for op in list(graph.ops):
        if op.target == "Attention" and op.kind == "attention":
            (new,) = graph.insert("attention", op.inputs, op.attrs, after=op)
        elif op.target == f"{PREFIX}joined_attention":
            new = _split_heads(graph, op)
        else:
            continue
        counts[op.target] += 1
        for user, index in list(op.outputs[0].users):
            graph.set_operand(user, index, new)
        for index, value in enumerate(graph.outputs):
            if value is op.outputs[0]:
                graph.replace_output(index, new)
    graph.remove_dead()
    return counts


def _split_heads(graph: OnnxGraph, op: Op) -> Value:
    """The dialect's joined_attention, which onnxruntime's own operator may be the body of, by its definition."""
    attrs = dict(op_and_attributes(op.raw)[1])
    counts = [attrs.pop("heads"), *[attrs.pop("kv_heads")] * 2]
    after = op

    def emit(kind: str, x: Value, shape: list[int] | None = None) -> Value:
        nonlocal after
        more = [] if shape is None else [graph.insert_constant(np.array(shape), "heads").raw]
        order = {"perm": [0, 2, 1, 3]} if shape is None else None
        (made,) = graph.insert_node(kind, [x.raw, *more], order, after=after)
        after = graph.op_of(made.raw.producer())
        return made

    heads: list[Value | None] = []
    for x, count in zip(op.inputs, counts):
        assert x is not None
        heads.append(emit("Transpose", emit("Reshape", x, [0, 0, count, -1])))
    (out,) = graph.insert("attention", [*heads, *op.inputs[3:]], attrs, after=after)
    after = graph.op_of(out.raw.producer())
    return emit("Reshape", emit("Transpose", out), [0, 0, -1])


def _rank(ed: Editor, node: ir.Node) -> bool:
    """TopK along the last axis of [B, M]: an element's place is the number of elements that stand before it."""
    x, count = node.inputs[0], ed.env.known_ints(node.inputs[1])
    shape = static(ed.shape(x))
    if x is None or count is None or shape is None or len(shape) != 2:
        return False
    if node.attributes.get_int("axis", -1) % 2 != 1 or node.attributes.get_int("sorted", 1) != 1:
        return False

    def emit(kind: str, *inputs: ir.Value, **attrs: object) -> ir.Value:
        return ed.emit(kind, inputs, attrs, before=node)

    one, other = emit("Unsqueeze", x, ed.ints([2])), emit("Unsqueeze", x, ed.ints([1]))
    before = emit("Greater" if node.attributes.get_int("largest", 1) else "Less", other, one)
    earlier = ed.constant(np.tri(shape[1], k=-1, dtype=bool)[None], "earlier")
    first = emit("Or", before, emit("And", emit("Equal", other, one), earlier))
    place = emit("ReduceSum", emit("Cast", first, to=ir.DataType.INT64), ed.ints([2]), keepdims=0)
    wanted = ed.constant(np.arange(count[0]).reshape(1, -1, 1), "place")
    hit = emit("Equal", emit("Unsqueeze", place, ed.ints([1])), wanted)
    number = ed.constant(np.arange(shape[1]).reshape(1, 1, -1), "element")
    indices = emit("ReduceSum", emit("Where", hit, number, ed.ints([0])), ed.ints([2]), keepdims=0)
    ed.replace(node.outputs[1], indices)
    if used(node, 0):
        ed.replace(node.outputs[0], emit("GatherElements", x, indices, axis=1))
    return True


def _compare(ed: Editor, node: ir.Node) -> bool:
    """ScatterElements along the last axis of [B, N]: every place asks which update is for it; the last one wins."""
    data, index, updates = node.inputs
    shape, turns = static(ed.shape(data)), static(ed.shape(index))
    if data is None or index is None or index.dtype is None or updates is None:
        return False
    if shape is None or turns is None or len(shape) != 2 or shape[0] != turns[0]:
        return False
    if (
        node.attributes.get_int("axis", 0) % 2 != 1
        or node.attributes.get_string("reduction", "none") != "none"
    ):
        return False

    def emit(kind: str, *inputs: ir.Value, **attrs: object) -> ir.Value:
        return ed.emit(kind, inputs, attrs, before=node)

    if turns[1] == 0:
        ed.replace(node.outputs[0], emit("Identity", data))
        return True
    place = ed.constant(np.arange(shape[1]).reshape(1, -1, 1).astype(index.dtype.numpy()), "place")
    hit = emit("Equal", emit("Unsqueeze", index, ed.ints([1])), place)
    turn = ed.constant(np.arange(turns[1]).reshape(1, 1, -1), "turn")
    last = emit("ReduceMax", emit("Where", hit, turn, ed.ints([-1])), ed.ints([2]), keepdims=0)
    written = emit("GatherElements", updates, emit("Max", last, ed.ints([0])), axis=1)
    ed.replace(node.outputs[0], emit("Where", emit("Less", last, ed.ints([0])), data, written))
    return True
