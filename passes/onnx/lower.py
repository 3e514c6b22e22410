"""Lowering for onnxruntime: each canonical operator in the form that its CPU kernels accept and run fastest.

Measured with onnxruntime 1.32 (fp32, one thread, [8, 12, 197, 64], milliseconds with the reshapes around it; median
of interleaved runs): without a mask MultiHeadAttention over [b, n, h * d] takes 17.1, the standard Attention over
that layout 19.2, over [b, h, n, d] 23.2, MatMul-Softmax-MatMul 24.1. With a mask the standard Attention over
[b, n, h * d] takes 16.0, MultiHeadAttention 19.2, over [b, h, n, d] 19.4, the decomposition 21.7. Gelu,
LayerNormalization and RMSNormalization are as fast as any other form that we know, so they stay.

onnxruntime's Attention does not broadcast a mask along queries and keys, as the standard allows: such masks
are expanded. Rows without any key it sets to zero, as torch's own export does with a Where around the softmax.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from ..base import Outcome
from ..ir.graph import Graph
from ..ir.onnx import OnnxGraph
from ..ir.onnx_dialect import DOMAIN, OP, op_and_attributes
from ..ir.onnx_shapes import MALFORMED, ShapeEnv
from ..lowering import Table
from .plain_masks import LOW
from .surgery import Declined, Editor, operand, used

CONTRIB = "com.microsoft"
SWAP = [0, 2, 1, 3]


def lower_graph(graph: Graph, table: Table) -> Outcome:
    """`lower` on a graph view, with its report."""
    assert isinstance(graph, OnnxGraph)
    counts = lower(graph.model, table)
    if not counts:
        return Outcome(notes=["nothing to lower: every operator has the form that onnxruntime runs fastest"])
    OnnxGraph.__init__(graph, graph.model)
    return Outcome(changed=True, statistics=dict(counts))


def lower(model: ir.Model, table: Table | None = None) -> dict[str, int]:
    """Rewrite `model` in place for onnxruntime; returns how often each rule fired."""
    if not any(is_attention(node) or is_biased(node) for node in model.graph):
        return {}
    ed = Editor(model, ShapeEnv(model).run())
    lower_biased(ed)
    lower_attention(ed)
    ed.sweep()
    common.RemoveUnusedFunctionsPass()(model)
    return ed.counts


def is_attention(node: ir.Node) -> bool:
    return node.op_type == "Attention" and node.domain == ""


def is_biased(node: ir.Node) -> bool:
    """The dialect's attention."""
    return node.domain == DOMAIN and node.metadata_props.get(OP) == "attention"


def lower_biased(ed: Editor) -> None:
    """The dialect's attention as the standard one, the logarithm of the sizes as its mask.

    The function body, which is the op's meaning, takes 1.4 times as long ([8, 12, 197, 64], one thread).
    """
    for node in list(ed.graph):
        if not is_biased(node):
            continue
        q, k, v, mask, size = (operand(node, i) for i in range(5))
        shape, width = ed.shape(q), (ed.shape(q) or (None,))[-1]
        if q is None or shape is None or len(shape) != 4 or not isinstance(width, int):
            continue
        _, attrs = op_and_attributes(node)
        scale = attrs.get("scale", 0.0) or width**-0.5
        bias = mask if size is None else size_mask(ed, node, q, mask, size)
        inputs = [q, k, v] if bias is None else [q, k, v, bias]
        causal = {"is_causal": 1} if attrs.get("causal") else {}
        new = ed.emit("Attention", inputs, {"scale": float(scale), **causal}, before=node, name=node.name)
        ed.replace(node.outputs[0], new)
        ed.count("dialect attentions made standard")


def size_mask(ed: Editor, node: ir.Node, q: ir.Value, mask: ir.Value | None, size: ir.Value) -> ir.Value:
    """log(size) along the keys, plus the mask; finite even for size 0, so that no row is without keys."""
    log = ed.emit("Max", [ed.emit("Log", [size], before=node), ed.like(LOW, size)], before=node)
    if log.dtype != q.dtype and q.dtype is not None:
        log = ed.emit("Cast", [log], {"to": q.dtype}, before=node)
    bias = ed.emit("Unsqueeze", [log, ed.ints([1, 2])], before=node)
    if mask is None:
        return bias
    if mask.dtype == ir.DataType.BOOL:
        return ed.emit("Where", [mask, bias, ed.like(LOW, bias)], before=node)
    return ed.emit("Add", [mask, bias], before=node)


def lower_attention(ed: Editor) -> None:
    """Every standard Attention in the form of the table above."""
    cache: dict[ir.Value, list[ir.Value]] = {}
    for node in list(ed.graph):
        if not is_attention(node) or node.graph is not ed.graph:
            continue
        try:
            fit_mask(ed, node)
            flatten(ed, node, cache)
        except (Declined, *MALFORMED) as why:
            # The operator is right as it stands, only slower.
            ed.near_misses.append(f"{ed.label(node)}: {why}")


# ---- masks -------------------------------------------------------------------------------------------
def fit_mask(ed: Editor, node: ir.Node) -> None:
    """The mask at rank 4 and at full length along queries and keys."""
    mask, q, k = operand(node, 3), operand(node, 0), operand(node, 1)
    if mask is None or len(ed.env.need(q)) != 4 or operand(node, 4) is not None:
        return
    assert q is not None and k is not None
    lengths = (ed.env.need(q)[2], ed.env.need(k)[2])
    shape = ed.env.need(mask)
    if len(shape) < 4:
        mask = ed.emit("Unsqueeze", [mask, ed.ints(list(range(4 - len(shape))))], before=node)
        shape = ed.env.need(mask)
    if shape[2:] != lengths:
        parts: list[ir.Value] = [ed.ints([1, 1])]
        for have, want, source in zip(shape[2:], lengths, (q, k)):
            if have == want:
                parts.append(ed.ints([1]))
            elif isinstance(want, int):
                parts.append(ed.ints([want]))
            else:
                parts.append(ed.emit("Shape", [source], {"start": 2, "end": 3}, before=node))
        if all(ed.is_constant(p) for p in parts):
            target = ed.ints([int(x) for p in parts for x in np.atleast_1d(ed.array(p)).tolist()])  # type: ignore[arg-type]
        else:
            target = ed.emit("Concat", parts, {"axis": 0}, before=node)
        mask = ed.emit("Expand", [mask, target], before=node)
        ed.count("masks expanded")
    if mask is not node.inputs[3]:
        node.replace_input_with(3, mask)


# ---- layouts -----------------------------------------------------------------------------------------
def flatten(ed: Editor, node: ir.Node, cache: dict[ir.Value, list[ir.Value]]) -> None:
    """Attention over [b, h, n, d] between split and joined heads, as one operator over [b, n, h * d]."""
    if any(operand(node, i) is not None for i in range(4, 7)) or any(used(node, i) for i in range(1, 4)):
        raise Declined("it has a cache")
    if node.attributes.get_float("softcap", 0.0) or node.attributes.get_int("softmax_precision", 0):
        raise Declined("its softmax is bent")
    values = [operand(node, i) for i in range(3)]
    sources = [flat_source(ed, value) for value in values]
    if any(source is None for source in sources):
        raise Declined("its operands are not heads split off one axis")
    join = joining(ed, node)
    width, heads, shared = ed.env.need(values[0])[3], ed.env.need(values[0])[1], ed.env.need(values[1])[1]
    if not isinstance(heads, int) or not isinstance(shared, int):
        raise Declined("the number of its heads is not static")
    scale = node.attributes.get_float("scale", 0.0) or (width**-0.5 if isinstance(width, int) else 0.0)
    if not scale:
        raise Declined("its head width is not known")
    flat = [source(node, cache) for source in sources if source is not None]
    mask, causal = operand(node, 3), node.attributes.get_int("is_causal", 0)
    float32 = all(v is not None and v.dtype == ir.DataType.FLOAT for v in values)
    after = ed.env.need(join.outputs[0])
    if mask is None and not causal and heads == shared and float32:
        attrs: dict[str, object] = {"num_heads": heads, "scale": float(scale)}
        new = ed.emit("MultiHeadAttention", flat, attrs, before=join, domain=CONTRIB, name=node.name)
        new.type, new.shape = join.outputs[0].type, join.outputs[0].shape
        ed.env.shapes[new] = after
        ed.model.opset_imports.setdefault(CONTRIB, 1)
        ed.count("MultiHeadAttention")
    else:
        attrs = {"q_num_heads": heads, "kv_num_heads": shared, "scale": float(scale)}
        if causal:
            attrs["is_causal"] = 1
        inputs = flat if mask is None else [*flat, mask]
        new = ed.emit("Attention", inputs, attrs, before=join, name=node.name)
        ed.count("Attention over joined heads")
    ed.replace(join.outputs[0], new)


def joining(ed: Editor, node: ir.Node) -> ir.Node:
    """The Reshape, behind a Transpose, that joins the heads after the operator."""
    swap = ed.user(node.outputs[0], "Transpose")
    join = ed.user(swap.outputs[0], "Reshape") if swap is not None else None
    if swap is None or join is None or list(swap.attributes.get_ints("perm", [])) != SWAP:
        raise Declined("its heads are not joined after it")
    before, after = ed.env.need(swap.outputs[0]), ed.env.need(join.outputs[0])
    if len(after) != 3 or before[:2] != after[:2]:
        raise Declined("its heads are not joined after it")
    return join


class Joined:
    """Heads [b, h, n, d] that are a view of [b, n, h * d]."""

    def __init__(self, ed: Editor, source: ir.Value, part: int = -1) -> None:
        self.ed, self.source, self.part = ed, source, part

    def __call__(self, before: ir.Node, cache: dict[ir.Value, list[ir.Value]]) -> ir.Value:
        """The value as [b, n, h * d]; of a packed projection, its part."""
        if self.part < 0:
            return self.source
        if self.source not in cache:
            producer = self.source.producer()
            assert producer is not None
            first = self.ed.emit(
                "Split",
                [self.source],
                {"axis": 2, "num_outputs": 3},
                before=before,
                outputs=3,
                name=producer.name,
            )
            split = first.producer()
            assert split is not None
            cache[self.source] = list(split.outputs)
        return cache[self.source][self.part]


def flat_source(ed: Editor, value: ir.Value | None) -> Joined | None:
    """What `value`, heads as [b, h, n, d], is split off from; None when it is not."""
    swap = ed.made_by(value, "Transpose")
    if swap is None:
        return packed_source(ed, value)
    split = ed.made_by(swap.inputs[0], "Reshape")
    if split is None or list(swap.attributes.get_ints("perm", [])) != SWAP:
        return None
    source, before, after = split.inputs[0], ed.shape(split.inputs[0]), ed.shape(split.outputs[0])
    if source is None or before is None or after is None or len(before) != 3 or before[:2] != after[:2]:
        return None
    return Joined(ed, source)


def packed_source(ed: Editor, value: ir.Value | None) -> Joined | None:
    """Part i of [b, n, 3 * h * d], by way of [b, n, 3, h, d] and [3, b, h, n, d]."""
    part, stacked = -1, None
    select = ed.made_by(value, "Gather")
    if select is not None and select.attributes.get_int("axis", 0) == 0:
        number = ed.number(select.inputs[1]) if ed.shape(select.inputs[1]) == () else None
        if number is None:
            return None
        part, stacked = int(number) % 3, select.inputs[0]
    squeeze = ed.made_by(value, "Squeeze")
    split = ed.made_by(squeeze.inputs[0], "Split") if squeeze is not None else None
    if split is not None and squeeze is not None and len(split.outputs) == 3:
        if split.attributes.get_int("axis", 0) != 0:
            return None
        part, stacked = split.outputs.index(squeeze.inputs[0]), split.inputs[0]  # type: ignore[arg-type]
    swap = ed.made_by(stacked, "Transpose")
    view = ed.made_by(swap.inputs[0], "Reshape") if swap is not None else None
    if swap is None or view is None or list(swap.attributes.get_ints("perm", [])) != [2, 0, 3, 1, 4]:
        return None
    before, after, source = ed.shape(view.inputs[0]), ed.shape(view.outputs[0]), view.inputs[0]
    if source is None or before is None or after is None or len(before) != 3 or before[:2] != after[:2]:
        return None
    # All of the packed value must be used this way, or the old transpose stays beside the new split.
    return Joined(ed, source, part) if after[2] == 3 else None
