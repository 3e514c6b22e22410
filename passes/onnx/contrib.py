"""Operators of ONNX Runtime's own domain, com.microsoft, written out in standard ones.

Files that went through ONNX Runtime's optimisers hold fused operators: whole attentions with their projections,
normalisations with the residual before them, biased Gelus. Each row below takes one apart, so that the rules
after it see the forms they know. An operator with a cache, a mask of an unusual kind or an output that has
no standard counterpart stays as it is, with the reason in the report. Source: the operators' documentation
(docs/ContribOperators.md of ONNX Runtime).
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from ..errors import Refused
from ..ir.onnx_shapes import MALFORMED
from . import contrib_grouped, contrib_nbits, plain_rotary, raise_dialect
from .contrib_attention import ATTENTIONS
from .surgery import Declined, Editor, operand, used

DOMAIN = "com.microsoft"

Unpacker = Callable[[Editor, ir.Node], None]


def unpack(ed: Editor) -> None:
    """Take every operator of the domain apart that a row below knows."""
    for node in list(ed.graph):
        ed.env.update(node)  # what was taken apart before it has a shape now
        rows = BY_DOMAIN.get(node.domain, {})
        action = rows.get(node.op_type)
        if action is None:
            continue
        try:
            action(ed, node)
            ed.count(f"{node.op_type} taken apart")
        except (Declined, Refused, *MALFORMED) as why:
            ed.near_misses.append(f"{ed.label(node)}: {why}")
    ed.sweep()


# ---- Gelus -------------------------------------------------------------------------------------------
def biased(ed: Editor, node: ir.Node) -> ir.Value:
    """The first operand, plus the second where there is one."""
    x, bias = operand(node, 0), operand(node, 1)
    assert x is not None
    return x if bias is None else ed.emit("Add", [x, bias], before=node)


def gelu(ed: Editor, node: ir.Node) -> None:
    ed.replace(node.outputs[0], ed.emit("Gelu", [biased(ed, node)], {"approximate": "none"}, before=node))


def fast_gelu(ed: Editor, node: ir.Node) -> None:
    ed.replace(node.outputs[0], ed.emit("Gelu", [biased(ed, node)], {"approximate": "tanh"}, before=node))


def quick_gelu(ed: Editor, node: ir.Node) -> None:
    """x * sigmoid(alpha * x)."""
    x = operand(node, 0)
    assert x is not None
    alpha = node.attributes.get_float("alpha", 1.702)
    inner = x if alpha == 1.0 else ed.emit("Mul", [x, ed.like(alpha, x)], before=node)
    gate = ed.emit("Sigmoid", [inner], before=node)
    ed.replace(node.outputs[0], ed.emit("Mul", [x, gate], before=node))


# ---- normalisations ----------------------------------------------------------------------------------
def norm_of(
    ed: Editor, node: ir.Node, x: ir.Value, weight: ir.Value | None, bias: ir.Value | None, rms: bool
) -> ir.Value:
    """The normalisation over the last axis, with the node's epsilon."""
    epsilon = node.attributes.get_float(
        "epsilon", 1e-5 if node.op_type != "SkipLayerNormalization" else 1e-12
    )
    attrs = {"axis": -1, "epsilon": epsilon}
    if rms:
        return ed.emit("RMSNormalization", [x, weight], attrs, before=node)
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return ed.emit("LayerNormalization", inputs, attrs, before=node)


def skip_norm(ed: Editor, node: ir.Node) -> None:
    """norm(x + skip + bias), and the sum as fourth output."""
    rms = node.op_type == "SkipSimplifiedLayerNormalization"
    if any(used(node, i) for i in (1, 2)):
        raise Declined("its mean or its deviation is used")
    x, skip, weight = (operand(node, i) for i in range(3))
    beta, bias = (None, operand(node, 3)) if rms else (operand(node, 3), operand(node, 4))
    total = ed.emit("Add", [x, skip], before=node)
    if bias is not None:
        total = ed.emit("Add", [total, bias], before=node)
    result = norm_of(ed, node, total, weight, beta, rms)
    if used(node, 3):
        ed.replace(node.outputs[3], total)
    ed.replace(node.outputs[0], result)


def simplified_norm(ed: Editor, node: ir.Node) -> None:
    """RMSNorm under the name it had before the standard took it up."""
    if used(node, 1):
        raise Declined("its deviation is used")
    x, weight = operand(node, 0), operand(node, 1)
    assert x is not None
    attrs = {
        "axis": node.attributes.get_int("axis", -1),
        "epsilon": node.attributes.get_float("epsilon", 1e-5),
    }
    ed.replace(node.outputs[0], ed.emit("RMSNormalization", [x, weight], attrs, before=node))


def embed_norm(ed: Editor, node: ir.Node) -> None:
    """LayerNormalization of the sum of word, position and segment embeddings."""
    ids, segments, words, positions, segment_table, weight, bias = (operand(node, i) for i in range(7))
    mask, position_ids = operand(node, 7), operand(node, 8)
    assert ids is not None
    if used(node, 1) and (mask is None or node.attributes.get_int("mask_index_type", 1) == 0):
        raise Declined("it makes a mask out of nothing")
    total = ed.emit("Gather", [words, ids], {"axis": 0}, before=node)
    if position_ids is not None:
        rows = ed.emit("Gather", [positions, position_ids], {"axis": 0}, before=node)
    else:
        length = ed.emit("Shape", [ids], {"start": 1, "end": 2}, before=node)
        rows = ed.emit("Slice", [positions, ed.ints([0]), length, ed.ints([0])], before=node)
    total = ed.emit("Add", [total, rows], before=node)
    if segments is not None and segment_table is not None:
        found = ed.emit("Gather", [segment_table, segments], {"axis": 0}, before=node)
        total = ed.emit("Add", [total, found], before=node)
    result = norm_of(ed, node, total, weight, bias, False)
    if used(node, 1):
        count = ed.emit("ReduceSum", [mask, ed.ints([1])], {"keepdims": 0}, before=node)
        ed.replace(node.outputs[1], count)
    if used(node, 2):
        ed.replace(node.outputs[2], total)
    ed.replace(node.outputs[0], result)


# ---- products ----------------------------------------------------------------------------------------
def fused_matmul(ed: Editor, node: ir.Node) -> None:
    """alpha * A B, each transposed in its last two axes or not."""
    attrs = node.attributes
    if attrs.get_int("transBatchA", 0) or attrs.get_int("transBatchB", 0):
        raise Declined("its batch axes are transposed")
    parts: list[ir.Value] = []
    for index, flag in enumerate(("transA", "transB")):
        value = operand(node, index)
        assert value is not None
        rank = len(ed.env.need(value))
        if attrs.get_int(flag, 0) and rank > 1:
            perm = [*range(rank - 2), rank - 1, rank - 2]
            value = ed.emit("Transpose", [value], {"perm": perm}, before=node)
        parts.append(value)
    out = ed.emit("MatMul", parts, before=node)
    alpha = attrs.get_float("alpha", 1.0)
    if alpha != 1.0:
        out = ed.emit("Mul", [out, ed.like(alpha, out)], before=node)
    ed.replace(node.outputs[0], out)


def bias_add(ed: Editor, node: ir.Node) -> None:
    """x + bias + skip, as diffusion models have it."""
    x, bias, skip = (operand(node, i) for i in range(3))
    total = ed.emit("Add", [x, bias], before=node)
    ed.replace(node.outputs[0], ed.emit("Add", [total, skip], before=node))


def bias_softmax(ed: Editor, node: ir.Node) -> None:
    """Softmax over the last axis of scores + mask."""
    x, mask = operand(node, 0), operand(node, 1)
    shape = ed.env.need(x)
    if node.attributes.get_int("axis", 1) % len(shape) != len(shape) - 1:
        raise Declined("it is not over the last axis")
    if not node.attributes.get_int("is_inner_broadcast", 1) and ed.env.need(mask)[1:] != shape[1:]:
        raise Declined("its mask is repeated along the outer axes")
    total = ed.emit("Add", [x, mask], before=node)
    ed.replace(node.outputs[0], ed.emit("Softmax", [total], {"axis": -1}, before=node))


ROWS: dict[str, Unpacker] = {
    "Gelu": gelu,
    "BiasGelu": gelu,
    "FastGelu": fast_gelu,
    "QuickGelu": quick_gelu,
    "SkipLayerNormalization": skip_norm,
    "SkipSimplifiedLayerNormalization": skip_norm,
    "SimplifiedLayerNormalization": simplified_norm,
    "EmbedLayerNormalization": embed_norm,
    "FusedMatMul": fused_matmul,
    "TransposeMatMul": fused_matmul,
    "BiasAdd": bias_add,
    "BiasSoftmax": bias_softmax,
    "RotaryEmbedding": plain_rotary.contrib_rotary,
    **ATTENTIONS,
    "GroupQueryAttention": contrib_grouped.grouped_attention,
    **contrib_nbits.ROWS,
}
STANDARD: dict[str, Unpacker] = {
    "SimplifiedLayerNormalization": simplified_norm,  # ONNX Runtime writes it under the standard domain, wrongly
    "RotaryEmbedding": plain_rotary.rotary,
}
BY_DOMAIN = {DOMAIN: ROWS, "": STANDARD, "elision": raise_dialect.ROWS}
