"""Models that were exported with a key/value cache, as the plain models they continue: the past set to length 0.

A cache is recognised by structure: a graph input that is concatenated before new keys or values and put out again,
or that an attention operator takes as its past. With an empty past the model reads a whole text at once, and what
is made for plain models applies. Texts are not padded then, so that operators which count the tokens of a mask
(GroupQueryAttention) are plain causal attention. The inputs of an encoder's keys and values, which nothing is added
to, stay.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import sympy

from ..errors import Refused
from ..ir.onnx import OnnxGraph
from ..ir.onnx_shapes import ShapeEnv, constant_tensor
from .normalise import normalise
from .surgery import Editor, operand, used

MICROSOFT = "com.microsoft"
# Operators with a cache: where the past comes in, where the present goes out.
PAST = {
    ("", "Attention"): ((4, 5), (1, 2)),
    (MICROSOFT, "MultiHeadAttention"): ((6, 7), (1, 2)),
    (MICROSOFT, "GroupQueryAttention"): ((3, 4), (1, 2)),
    (MICROSOFT, "Attention"): ((4,), (1,)),
}


def without_cache(graph: OnnxGraph) -> int:
    """`drop_cache` for a view: normalised again and built anew where anything went, so that ops and values that the
    caller holds are void."""
    count = drop_cache(graph.model)
    if count:
        normalise(graph.model)
        OnnxGraph.__init__(graph, graph.model)
    return count


def drop_cache(model: ir.Model) -> int:
    """Take the caches out of `model`, in place; how many inputs went. 0: it has none, nothing was changed. What is
    left wants normalising: lengths that were sums with the past's are plain now.

    Raises Refused, naming the operator, where a cache is used in a way that is not known."""
    ed = Editor(model, ShapeEnv(model).run())
    joins = list(find_joins(ed))
    holders = [node for node in ed.graph if holds_cache(node)]
    if not joins and not holders:
        return 0
    gone: dict[ir.Value, int] = {past: axis for past, _, axis in joins}
    presents: set[ir.Value] = set()
    for _, node, _ in joins:
        presents.update(put_out(node.outputs[0]))
    for node in holders:
        ins, outs = PAST[node.domain, node.op_type]
        for index in ins:
            past = operand(node, index)
            if past is None or not past.is_graph_input():
                raise Refused(f"{ed.label(node)} has a past that is no input of the graph")
            gone[past] = len(ed.shape(past) or ()) - 2
            node.replace_input_with(index, None)
        for index in outs:
            if used(node, index):
                presents.update(put_out(node.outputs[index]))
    forget_outputs(ed, presents)
    for _, node, _ in joins:
        new = node.inputs[1]
        assert new is not None
        ed.replace(node.outputs[0], new)
    lengths = past_lengths(ed, gone)
    for past, axis in gone.items():
        replace_by_nothing(ed, past, axis)
    shorten(model, lengths)
    ed.sweep()
    return len(gone)


def find_joins(ed: Editor) -> Iterator[tuple[ir.Value, ir.Node, int]]:
    """(past, the Concat that puts new entries behind it, the axis) for every cache that is a plain tensor."""
    for past in ed.graph.inputs:
        if past.dtype is None or not past.dtype.is_floating_point() or len(ed.shape(past) or ()) < 3:
            continue
        shape = ed.shape(past) or ()
        for node in joined_by(past):
            axis = node.attributes.get_int("axis", 0) % len(shape)
            if not isinstance(shape[axis], int) and put_out(node.outputs[0]):
                yield past, node, axis
                break


def joined_by(past: ir.Value) -> Iterator[ir.Node]:
    """Every Concat of the past, as it stands, and something behind it."""
    queue = [past]
    while queue:
        for use in queue.pop().uses():
            node = use.node
            if node.domain != "" or use.idx != 0:
                continue
            if node.op_type == "Concat" and len(node.inputs) == 2:
                yield node
            elif node.op_type == "Identity" or (node.op_type == "Concat" and len(node.inputs) == 1):
                queue.append(node.outputs[0])


def holds_cache(node: ir.Node) -> bool:
    """An attention operator with a past."""
    if (node.domain, node.op_type) not in PAST:
        return False
    return any(operand(node, index) is not None for index in PAST[node.domain, node.op_type][0])


def put_out(value: ir.Value) -> list[ir.Value]:
    """The graph outputs that are `value`, or its last entries (a window), as it stands or in another type."""
    found, queue = [], [value]
    while queue:
        current = queue.pop()
        if current.is_graph_output():
            found.append(current)
        for use in current.uses():
            if use.node.op_type in ("Identity", "Cast", "Slice") and use.node.domain == "" and use.idx == 0:
                queue.append(use.node.outputs[0])
    return found


def forget_outputs(ed: Editor, presents: set[ir.Value]) -> None:
    """Take `presents` out of the outputs, and inputs that are handed through (an encoder's keys and values)."""
    kept = [out for out in ed.graph.outputs if out not in presents and not handed_through(out)]
    if not kept:
        raise Refused("the graph puts out nothing but a cache")
    ed.graph.outputs.clear()
    ed.graph.outputs.extend(kept)


def handed_through(value: ir.Value) -> bool:
    node = value.producer()
    while node is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value.is_graph_input()


def past_lengths(ed: Editor, gone: dict[ir.Value, int]) -> set[sympy.Symbol]:
    """The symbols that are lengths of a past."""
    found: set[sympy.Symbol] = set()
    for past, axis in gone.items():
        length = (ed.shape(past) or ())[axis] if axis >= 0 else 1
        if isinstance(length, sympy.Symbol):
            found.add(length)
    return found


def replace_by_nothing(ed: Editor, past: ir.Value, axis: int) -> None:
    """An empty tensor where anything still reads the past (its length, mostly), and the input goes."""
    if past.uses():
        shape = ed.shape(past) or ()
        lengths = [0 if i == axis else d if isinstance(d, int) else 1 for i, d in enumerate(shape)]
        dtype = (past.dtype or ir.DataType.FLOAT).numpy()
        past.replace_all_uses_with(ed.constant(np.zeros(lengths, dtype), f"{past.name}_empty"))
    ed.graph.inputs.remove(past)


def shorten(model: ir.Model, lengths: set[sympy.Symbol]) -> None:
    """Inputs without the length of the past; what the file says of other shapes is void."""
    env = ShapeEnv(model)
    nothing = [(length, 0) for length in lengths]
    for value in model.graph.inputs:
        shape = env.shape(value)
        if shape is None:
            continue
        dims = [d if isinstance(d, int) else d.subs(nothing) for d in shape]
        value.shape = ir.Shape([int(d) if isinstance(d, int) or d.is_Integer else str(d) for d in dims])
    for node in model.graph.all_nodes():
        for out in node.outputs:
            if constant_tensor(out) is None:
                out.shape = None
