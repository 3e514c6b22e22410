"""Attention for onnxruntime: over heads side by side where it can be, split heads otherwise.

Both are ops of the dialect, so one file serves twice: their function bodies are what onnxruntime runs fastest by
itself (its MultiHeadAttention where that takes the case), and our library, where it is registered, replaces them.
The standard Attention of operator set 23 is a little faster than MultiHeadAttention in onnxruntime 1.32 (up to 5 % of
a block), but onnxruntime 1.20, in which our files must run too, has no such operator.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ..errors import Refused
from ..ir.graph import Dim
from ..ir.onnx_dialect import DOMAIN, OP, make_node, op_and_attributes
from ..ir.onnx_shapes import MALFORMED, numpy_dtype
from ..lowering import ONNXRUNTIME, Table, attention_class
from .lower_packed import part_of
from .lower_softcap import write_out
from .surgery import Declined, Editor, operand, used

SWAP = [0, 2, 1, 3]
JOINED, SPLIT = "joined_attention", "attention"
"""The forms, named after the ops of the dialect."""

Cache = dict[ir.Value, list[ir.Value]]


def is_attention(node: ir.Node) -> bool:
    """The standard operator, or the dialect's over split heads."""
    if node.domain == DOMAIN:
        return node.metadata_props.get(OP) == SPLIT
    return node.op_type == "Attention" and node.domain == ""


@dataclass
class Asked:
    """What an attention node computes. q, k, v: [b, h, n, d] or, with `heads` set, [b, n, h * d]."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    mask: ir.Value | None
    size: ir.Value | None
    scale: float
    causal: bool
    heads: tuple[int, int] | None
    softcap: float = 0.0


def lower_attention(ed: Editor, table: Table) -> None:
    """Every attention in the form that the table names."""
    cache: Cache = {}
    alive: dict[ir.Value, ir.Value] = {}
    for node in list(ed.graph):
        if not is_attention(node) or node.graph is not ed.graph:
            continue
        try:
            asked = read(ed, node)
            if asked.softcap:
                bend(ed, node, asked, alive)
            elif not (asked.heads is not None or wants_joined(ed, table, asked)) or not join(
                ed, node, asked, cache
            ):
                split(ed, node, asked, alive)
        except (Declined, Refused, *MALFORMED) as why:
            # The operator is right as it stands, only slower.
            ed.near_misses.append(f"{ed.label(node)}: {why}")


def read(ed: Editor, node: ir.Node) -> Asked:
    """Raises Declined for what the dialect's attention cannot say."""
    q, k, v, mask = (operand(node, i) for i in range(4))
    if q is None or k is None or v is None:
        raise Declined("an operand is missing")
    if node.domain == DOMAIN:
        _, attrs = op_and_attributes(node)
        scale, causal = float(attrs.get("scale", 0.0)), bool(attrs.get("causal"))
        scale = scale or own_scale(ed.env.need(q)[-1])
        return Asked(q, k, v, mask, operand(node, 4), scale, causal, None)
    if any(operand(node, i) is not None for i in range(4, 7)) or any(used(node, i) for i in range(1, 4)):
        raise Declined("it has a cache, or its scores are used")
    if node.attributes.get_int("softmax_precision", 0):
        raise Declined("its softmax has a type of its own")
    rank, heads = len(ed.env.need(q)), None
    if rank == 3:
        heads = node.attributes.get_int("q_num_heads", 0), node.attributes.get_int("kv_num_heads", 0)
    if rank not in (3, 4) or heads == (0, 0):
        raise Declined(f"operands of rank {rank}")
    scale, causal = node.attributes.get_float("scale", 0.0), bool(node.attributes.get_int("is_causal", 0))
    if not scale:
        width = ed.env.need(q)[-1]
        scale = own_scale(width // heads[0] if heads is not None and isinstance(width, int) else width)
    softcap = node.attributes.get_float("softcap", 0.0)
    if softcap and heads is not None:
        raise Declined("its scores are capped and its heads lie side by side")
    return Asked(q, k, v, mask, None, scale, causal, heads, softcap)


def own_scale(width: Dim) -> float:
    """The scale of heads of this width as a number; 0 (the op finds it out) where the width is not static."""
    return float(width) ** -0.5 if isinstance(width, int) else 0.0


def wants_joined(ed: Editor, table: Table, asked: Asked) -> bool:
    masked, sized = asked.mask is not None, asked.size is not None
    shapes = [ed.shape(value) for value in (asked.q, asked.k)]
    wanted = attention_class(
        numpy_dtype(asked.q.dtype), *shapes, masked=masked, sized=sized, causal=asked.causal
    )
    choice = table.choose("attention", ONNXRUNTIME, wanted)
    return choice is None or choice.form == JOINED


# ---- the two forms -----------------------------------------------------------------------------------
def join(ed: Editor, node: ir.Node, asked: Asked, cache: Cache) -> bool:
    """`joined_attention` in the place of split heads, of the attention, and of the heads' being joined again; False
    where the operands are not heads split off one axis."""
    if asked.heads is not None:
        flat, (heads, shared), after = [asked.q, asked.k, asked.v], asked.heads, node.outputs[0]
    else:
        values = [asked.q, asked.k, asked.v]
        sources = [flat_source(ed, value) for value in values]
        joined = joining(ed, node)
        heads, shared = ed.env.need(values[0])[1], ed.env.need(values[1])[1]
        if joined is None or None in sources or not isinstance(heads, int) or not isinstance(shared, int):
            return False
        after = joined.outputs[0]
        flat = [source(node, cache) for source in sources if source is not None]
    mask = four_axes(ed, node, asked.mask)
    attrs = {"heads": heads, "kv_heads": shared, "scale": asked.scale, "causal": asked.causal}
    out = call(ed, node, JOINED, [*flat, mask, asked.size], attrs)
    ed.replace(after, zeroed(ed, node, out, mask, asked, {}))
    return True


def split(ed: Editor, node: ir.Node, asked: Asked, alive: dict[ir.Value, ir.Value]) -> None:
    """The dialect's attention in the place of the standard one."""
    if node.domain == DOMAIN:
        return
    mask = four_axes(ed, node, asked.mask)
    attrs = {"scale": asked.scale, "causal": asked.causal}
    out = call(ed, node, SPLIT, [asked.q, asked.k, asked.v, mask, None], attrs)
    ed.replace(node.outputs[0], zeroed(ed, node, out, mask, asked, alive))


def bend(ed: Editor, node: ir.Node, asked: Asked, alive: dict[ir.Value, ir.Value]) -> None:
    """Products in the place of an attention whose scores are capped: the dialect's caps none."""
    mask = four_axes(ed, node, asked.mask)
    scale = asked.scale or own_scale(ed.env.need(asked.q)[-1])
    if not scale:
        raise Declined("its head width is not static")
    out = write_out(ed, node, [asked.q, asked.k, asked.v], mask, scale, asked.softcap)
    ed.replace(node.outputs[0], zeroed(ed, node, out, mask, asked, alive))
    ed.count("capped attention written out")


def call(
    ed: Editor, node: ir.Node, op: str, inputs: list[ir.Value | None], attrs: dict[str, object]
) -> ir.Value:
    """A node of the dialect in front of `node`, counted."""
    while inputs[-1] is None:
        inputs.pop()
    new = ed.adopt(make_node(ed.model, op, inputs, attrs), before=node)
    ed.count(op)
    return new


def four_axes(ed: Editor, node: ir.Node, mask: ir.Value | None) -> ir.Value | None:
    rank = 4 if mask is None else len(ed.env.need(mask))
    if mask is None or rank == 4:
        return mask
    return ed.emit("Unsqueeze", [mask, ed.ints(list(range(4 - rank)))], before=node)


def zeroed(
    ed: Editor,
    node: ir.Node,
    out: ir.Value,
    mask: ir.Value | None,
    asked: Asked,
    alive: dict[ir.Value, ir.Value],
) -> ir.Value:
    """`out` with zeros where a boolean mask leaves a query without any key, which is what the standard operator gives
    in onnxruntime. The dialect's attention has no such rule."""
    if mask is None or mask.dtype != ir.DataType.BOOL or node.domain == DOMAIN:
        return out
    known = ed.array(mask)
    if known is not None and known.any(-1).all():
        return out
    shape = ed.env.need(mask)
    if len(ed.env.need(out)) == 3 and shape[1] != 1:
        raise Declined("its mask differs from head to head")
    if mask not in alive:
        number = ed.emit("Cast", [mask], {"to": ir.DataType.FLOAT}, before=node)
        most = ed.emit("ReduceMax", [number, ed.ints([3])], {"keepdims": 1}, before=node)
        alive[mask] = ed.emit("Cast", [most], {"to": ir.DataType.BOOL}, before=node)
    keep = alive[mask]
    if len(ed.env.need(out)) == 3:
        keep = ed.emit("Squeeze", [keep, ed.ints([1])], before=node)
    return ed.emit("Where", [keep, out, ed.like(0.0, out)], before=node)


# ---- layouts -----------------------------------------------------------------------------------------
def joining(ed: Editor, node: ir.Node) -> ir.Node | None:
    """The Reshape, behind a Transpose, that joins the heads after the operator."""
    swap = ed.user(node.outputs[0], "Transpose")
    reshape = ed.user(swap.outputs[0], "Reshape") if swap is not None else None
    if swap is None or reshape is None or list(swap.attributes.get_ints("perm", [])) != SWAP:
        return None
    before, after = ed.env.need(swap.outputs[0]), ed.env.need(reshape.outputs[0])
    return reshape if len(after) == 3 and before[:2] == after[:2] else None


class Joined:
    """Heads [b, h, n, d] that are a view of [b, n, h * d]."""

    def __init__(self, ed: Editor, source: ir.Value, part: int = -1) -> None:
        self.ed, self.source, self.part = ed, source, part

    def __call__(self, before: ir.Node, cache: Cache) -> ir.Value:
        """The value as [b, n, h * d]; of a packed projection, its part."""
        if self.part < 0:
            return self.source
        if self.source not in cache:
            attrs = {"axis": 2, "num_outputs": 3}
            first = self.ed.emit("Split", [self.source], attrs, before=before, outputs=3)
            producer = first.producer()
            assert producer is not None
            cache[self.source] = list(producer.outputs)
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
    found = part_of(ed, value)
    if found is None:
        return None
    stacked, part = found
    swap = ed.made_by(stacked, "Transpose")
    view = ed.made_by(swap.inputs[0], "Reshape") if swap is not None else None
    if swap is None or view is None or list(swap.attributes.get_ints("perm", [])) != [2, 0, 3, 1, 4]:
        return None
    before, after, source = ed.shape(view.inputs[0]), ed.shape(view.outputs[0]), view.inputs[0]
    if source is None or before is None or after is None or len(before) != 3 or before[:2] != after[:2]:
        return None
    return Joined(ed, source, part % 3) if after[2] == 3 else None
