"""The dialect's attentions, as `lower` writes them, back in the form that analyses read: files of ours are normalised
like anybody's."""

from __future__ import annotations

import onnx_ir as ir

from ..ir.onnx_dialect import make_node, op_and_attributes
from .plain import join_heads, split_heads
from .surgery import Declined, Editor, operand


def joined_attention(ed: Editor, node: ir.Node) -> None:
    """Over heads side by side: heads as an axis, attention, heads joined again."""
    _, attrs = op_and_attributes(node)
    counts = (attrs["heads"], attrs["kv_heads"], attrs["kv_heads"])
    parts = [split_heads(ed, node, operand(node, i), count) for i, count in enumerate(counts)]
    out = over_heads(ed, node, parts, operand(node, 3), operand(node, 4), attrs)
    ed.replace(node.outputs[0], join_heads(ed, node, out))


def attention(ed: Editor, node: ir.Node) -> None:
    """Without sizes it is the standard operator; with them it stays, the mark of a file that was merged."""
    if operand(node, 4) is not None:
        raise Declined("its keys have sizes")
    _, attrs = op_and_attributes(node)
    parts = [value for value in node.inputs[:3] if value is not None]
    ed.replace(node.outputs[0], over_heads(ed, node, parts, operand(node, 3), None, attrs))


def over_heads(
    ed: Editor,
    node: ir.Node,
    parts: list[ir.Value],
    mask: ir.Value | None,
    size: ir.Value | None,
    attrs: dict[str, object],
) -> ir.Value:
    """Attention over [b, h, n, d] in front of `node`."""
    causal, scale = bool(attrs.get("causal")), attrs.get("scale") or 0.0
    if size is not None:
        inputs = [*parts, mask, size]
        made = make_node(ed.model, "attention", inputs, {"scale": scale, "causal": causal})
        return ed.adopt(made, before=node)
    given: dict[str, object] = {"scale": scale} if scale else {}
    given |= {"is_causal": 1} if causal else {}
    ed.count("Attention")
    return ed.emit("Attention", parts if mask is None else [*parts, mask], given, before=node, name=node.name)


ROWS = {"joined_attention": joined_attention, "attention": attention}
