"""Raising decomposed attention to the standard operator Attention (opset 23).

Every Softmax over the last axis is asked whether it stands between two products: scores = q k^T (scaled and masked on
the way), weights, weights v. The parts may come in any order and spelling; whatever cannot be expressed by
the operator leaves the nodes as they are and a reason in the report.

The scale may stand on q, on k, on both or on the scores, as a product or quotient; k^T may be a Transpose with
any permutation; the scores may be capped by a tanh; masks may be added or chosen with Where; heads may be an axis of
their own or folded into the batch (rank 3). Packed projections need no rule: they end in the same q, k and v.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import onnx_ir as ir

from ..ir.graph import Dim
from ..ir.onnx_shapes import broadcast
from .surgery import Declined, Editor


@dataclass
class Scores:
    """What was found between the product q k^T and the softmax."""

    product: ir.Node
    scale: float = 1.0
    softcap: float = 0.0  # scores are softcap * tanh(scale * q k^T / softcap); masks come after it
    masks: list[ir.Value] = field(default_factory=list)
    keep: ir.Value | None = None  # a bool mask: True where a key may be attended to
    per_head: ir.Value | None = None  # a constant factor [h, 1, 1]


def raise_attention(ed: Editor) -> None:
    for node in list(ed.graph):
        if node.op_type != "Softmax" or node.domain != "" or node.graph is not ed.graph:
            continue
        try:
            raise_one(ed, node)
            ed.count("Attention")
        except Declined as why:
            ed.near_misses.append(f"attention at {ed.label(node)}: {why}")
    ed.sweep()


def raise_one(ed: Editor, softmax: ir.Node) -> None:
    """Replace the attention around `softmax`, or raise Declined before anything is changed."""
    probabilities = softmax.outputs[0]
    shape = ed.shape(probabilities)
    if shape is None or len(shape) not in (3, 4):
        raise Declined(f"its rank is {'unknown' if shape is None else len(shape)}, not 3 or 4")
    if softmax.attributes.get_int("axis", -1) % len(shape) != len(shape) - 1:
        raise Declined("it is not over the last axis")
    weights = weights_of(ed, probabilities)
    product = ed.user(weights, "MatMul", "Reshape")
    unfolded = False
    if product is not None and product.op_type == "Reshape":
        unfolded = True
        product = ed.user(product.outputs[0], "MatMul")
    if product is None:
        raise Declined("its result is used by something else than one product with the values")
    left = product.inputs[0]
    if left is not weights and not unfolded:
        raise Declined("the values stand on the left of the product")
    value = product.inputs[1]
    scores = scores_of(ed, softmax)
    q, k, factor = operands_of(ed, scores.product)
    scale = scores.scale * factor
    assert value is not None
    emit_attention(ed, softmax, product, scores, q, k, value, scale)


def weights_of(ed: Editor, probabilities: ir.Value) -> ir.Value:
    """The value that the product reads, after the softmax and what sets rows without any key to zero.

    The operator itself gives zero for such rows in onnxruntime.
    """
    if probabilities.is_graph_output():
        raise Declined("its probabilities are an output of the graph")
    users = [use.node for use in probabilities.uses()]
    if sorted(node.op_type for node in users) == ["IsNaN", "Where"]:
        where = next(node for node in users if node.op_type == "Where")
        isnan = ed.made_by(where.inputs[0], "IsNaN")
        if isnan is not None and where.inputs[2] is probabilities and ed.number(where.inputs[1]) == 0.0:
            return where.outputs[0]
    cast = ed.user(probabilities, "Cast")
    return probabilities if cast is None else cast.outputs[0]


def scores_of(ed: Editor, softmax: ir.Node) -> Scores:
    """Walk up from the softmax to the product of queries and keys."""
    value = softmax.inputs[0]
    found: dict[str, float] = {"scale": 1.0}
    masks: list[ir.Value] = []
    keep: ir.Value | None = None
    per_head: ir.Value | None = None
    heads: Dim | None = None  # of scores that are [b * h, n, m] here and [b, h, n, m] there
    softcap = 0.0
    for _ in range(14):
        node = None if value is None else value.producer()
        if node is None or value is None:
            raise Declined("its operand is not a product of queries and keys")
        if value is not softmax.inputs[0] and not ed.used_once(value):
            raise Declined(f"the scores are used elsewhere too (%{value.name})")
        if node.domain == "" and node.op_type == "MatMul":
            if heads is not None:
                masks = [split_heads(ed, softmax, mask, heads) for mask in masks]
                keep = None if keep is None else split_heads(ed, softmax, keep, heads)
            return Scores(node, found["scale"] * (softcap or 1.0), softcap, masks, keep, per_head)
        if node.domain != "":
            raise Declined(f"{ed.label(node)} stands between the product and the softmax")
        if node.op_type in ("Mul", "Div"):
            split = ed.split_constant(node)
            if split is not None and (node.op_type == "Mul" or split[0] is node.inputs[0]):
                value, number = split
                found["scale"] *= number if node.op_type == "Mul" else 1.0 / number
            elif node.op_type == "Mul" and per_head is None and not softcap:
                value, per_head = head_factor(ed, node)
            else:
                raise Declined(f"{ed.label(node)} scales the scores by something that is not a number")
        elif node.op_type == "Tanh":
            if softcap or per_head is not None or found["scale"] <= 0:
                raise Declined(f"{ed.label(node)} bends the scores in an unusual way")
            softcap, found["scale"] = found["scale"], 1.0
            value = node.inputs[0]
        elif softcap and node.op_type in ("Add", "Where"):
            raise Declined(f"{ed.label(node)} stands before the tanh that caps the scores")
        elif node.op_type == "Add":
            if per_head is not None:
                raise Declined("the mask is added before the scores are scaled per head")
            value, mask = scores_and_mask(ed, node)
            masks.append(scaled(ed, node, mask, found["scale"]))
        elif node.op_type == "Sub":
            raise Declined("the mask is subtracted")
        elif node.op_type == "Where":
            value, extra, boolean = where_mask(ed, node)
            if boolean is not None and keep is None:
                keep = boolean
            elif extra is not None:
                masks.append(scaled(ed, node, extra, found["scale"]))
            else:
                raise Declined("two Where masks")
        elif node.op_type in ("Cast", "Identity"):
            value = node.inputs[0]
        elif node.op_type == "Reshape" and folds_heads(ed, node):
            heads = next(
                s[1] for s in map(ed.shape, (node.inputs[0], value)) if s is not None and len(s) == 4
            )
            value = node.inputs[0]
        else:
            raise Declined(f"{ed.label(node)} stands between the product and the softmax")
    raise Declined("no product of queries and keys within reach")


def split_heads(ed: Editor, before: ir.Node, mask: ir.Value, heads: Dim) -> ir.Value:
    """A mask over folded heads, [b * h, n, m], as [b, h, n, m]; any other as it is."""
    shape = ed.shape(mask)
    if shape is None or len(shape) != 3 or shape[0] == 1:
        return mask
    if not isinstance(heads, int):
        raise Declined("a mask over folded heads whose number is not static")
    tail = [d for d in shape[1:] if isinstance(d, int)]
    if len(tail) == 2:
        return ed.emit("Reshape", [mask, ed.ints([-1, heads, *tail])], before=before)
    lengths = ed.emit("Shape", [mask], {"start": 1, "end": 3}, before=before)
    target = ed.emit("Concat", [ed.ints([-1, heads]), lengths], {"axis": 0}, before=before)
    return ed.emit("Reshape", [mask, target], before=before)


def scaled(ed: Editor, node: ir.Node, mask: ir.Value, scale: float) -> ir.Value:
    """The mask as it counts after a scale that stands between it and the softmax."""
    return mask if scale == 1.0 else ed.emit("Mul", [mask, ed.like(scale, mask)], before=node)


def head_factor(ed: Editor, node: ir.Node) -> tuple[ir.Value | None, ir.Value]:
    """(the scores, a constant factor per head): the factor has length 1 along queries and keys."""
    for x, c in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
        shape = ed.shape(c)
        if (
            c is not None
            and ed.is_constant(c)
            and shape is not None
            and len(shape) >= 2
            and shape[-2:] == (1, 1)
        ):
            return x, c
    raise Declined(f"{ed.label(node)} scales the scores by something that is not a number")


def scores_and_mask(ed: Editor, node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Which operand of an Add is the scores: the one with a MatMul not far above it."""
    a, b = node.inputs[0], node.inputs[1]
    assert a is not None and b is not None
    left, right = leads_to_product(ed, a), leads_to_product(ed, b)
    if left and not right:
        return a, b
    if right and not left:
        return b, a
    if not left:
        raise Declined(f"neither operand of {ed.label(node)} comes from a product")
    # Both do: the mask is itself computed by a product (relative positions). Scores have the full shape.
    full = ed.shape(node.outputs[0])
    if ed.shape(a) == full and ed.shape(b) != full:
        return a, b
    if ed.shape(b) == full and ed.shape(a) != full:
        return b, a
    return a, b


def leads_to_product(ed: Editor, value: ir.Value) -> bool:
    for _ in range(8):
        node = value.producer()
        if node is None or node.domain != "":
            return False
        if node.op_type == "MatMul":
            return True
        if node.op_type in ("Mul", "Div", "Add", "Cast", "Identity", "Reshape", "Tanh"):
            following = [v for v in node.inputs if v is not None and not ed.is_constant(v) and v.producer()]
            if node.op_type == "Add" and len(following) == 2:
                return any(leads_to_product(ed, v) for v in following)
            if not following:
                return False
            value = following[0]
        elif node.op_type == "Where":
            following = [
                v for v in node.inputs[1:] if v is not None and not ed.is_constant(v) and v.producer()
            ]
            if not following:
                return False
            value = following[0]
        else:
            return False
    return False


def where_mask(ed: Editor, node: ir.Node) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
    """(scores, additive mask or None, bool mask or None) of Where(condition, scores, fill) and its mirror.

    A fill of minus infinity is a bool mask. A finite one becomes Where(condition, 0, fill), added: the same
    after the softmax wherever a row keeps one key, since the fill outweighs every score.
    """
    condition, a, b = node.inputs
    assert condition is not None and a is not None and b is not None
    fill_a, fill_b = ed.number(a), ed.number(b)
    if (fill_a is None) == (fill_b is None):
        raise Declined(f"{ed.label(node)} does not choose between scores and one number")
    scores, fill, inverted = (b, fill_a, True) if fill_a is not None else (a, fill_b, False)
    assert fill is not None
    if fill > -1e4 and not math.isinf(fill):
        raise Declined(f"{ed.label(node)} fills with {fill}, which does not mask")
    if math.isinf(fill):
        if inverted:
            condition = ed.emit("Not", [condition], before=node)
        return scores, None, condition
    zero, number = ed.like(0.0, scores), ed.like(fill, scores)
    parts = [number, zero] if inverted else [zero, number]
    return scores, ed.emit("Where", [condition, *parts], before=node), None


def folds_heads(ed: Editor, node: ir.Node) -> bool:
    """A Reshape between [b * h, n, m] and [b, h, n, m]."""
    a, b = ed.shape(node.inputs[0]), ed.shape(node.outputs[0])
    return a is not None and b is not None and {len(a), len(b)} == {3, 4} and a[-2:] == b[-2:]


def operands_of(ed: Editor, product: ir.Node) -> tuple[ir.Value, ir.Value, float]:
    """(q [.., n, d], k [.., m, d], the scale that stood on them); k is transposed back where that is free."""
    q, transposed = product.inputs[0], product.inputs[1]
    assert q is not None and transposed is not None
    q, factor = peel_scale(ed, q)
    transposed, factor2 = peel_scale(ed, transposed)
    factor *= factor2
    node = ed.made_by(transposed, "Transpose")
    if node is not None:
        source, inner = peel_scale(ed, node.inputs[0]) if node.inputs[0] is not None else (None, 1.0)
        assert source is not None
        perm = list(node.attributes.get_ints("perm", range(len(ed.shape(transposed) or ()))[::-1]))
        perm[-1], perm[-2] = perm[-2], perm[-1]
        if perm == list(range(len(perm))):
            return q, source, factor * inner
        return q, ed.emit("Transpose", [source], {"perm": perm}, before=product), factor * inner
    direct = through_folded_transpose(ed, transposed)
    if direct is not None:
        direct, inner = peel_scale(ed, direct)
        return q, direct, factor * inner
    rank = len(ed.shape(transposed) or ())
    if rank < 3:
        raise Declined("the keys have no batch axis")
    perm = [*range(rank - 2), rank - 1, rank - 2]
    return q, ed.emit("Transpose", [transposed], {"perm": perm}, before=product), factor


def through_folded_transpose(ed: Editor, value: ir.Value) -> ir.Value | None:
    """k of Reshape(Transpose(Reshape(k, [b * h, m, d]), [0, 2, 1]), [b, h, d, m])."""
    outer = ed.made_by(value, "Reshape")
    middle = ed.made_by(outer.inputs[0], "Transpose") if outer is not None else None
    inner = ed.made_by(middle.inputs[0], "Reshape") if middle is not None else None
    if middle is None or inner is None or list(middle.attributes.get_ints("perm", [])) != [0, 2, 1]:
        return None
    source, result = ed.shape(inner.inputs[0]), ed.shape(value)
    if source is None or result is None or len(source) != 4 or len(result) != 4:
        return None
    same = source[:2] == result[:2] and source[2] == result[3] and source[3] == result[2]
    return inner.inputs[0] if same else None


def peel_scale(ed: Editor, value: ir.Value) -> tuple[ir.Value, float]:
    """(x, c) where value = c * x with a number c; (value, 1) otherwise."""
    factor = 1.0
    for _ in range(3):
        node = ed.made_by(value, "Mul", "Div")
        split = ed.split_constant(node) if node is not None else None
        if node is None or split is None or (node.op_type == "Div" and split[0] is not node.inputs[0]):
            break
        if ed.shape(split[0]) != ed.shape(value):
            break
        value = split[0]
        factor *= split[1] if node.op_type == "Mul" else 1.0 / split[1]
    return value, factor


def emit_attention(
    ed: Editor,
    softmax: ir.Node,
    product: ir.Node,
    scores: Scores,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    scale: float,
) -> None:
    """Put the operator in front of the product with the values, and use its result."""
    out = product.outputs[0]
    mask = joined_mask(ed, softmax, scores, q)
    rank = len(ed.shape(q) or ())
    if len(ed.shape(k) or ()) != rank or len(ed.shape(v) or ()) != rank:
        raise Declined("queries, keys and values differ in rank")
    if scores.per_head is not None:
        q = ed.emit("Mul", [q, scores.per_head], before=softmax)
    folded = rank == 3
    if rank == 3:
        q, k, v, mask = unfold(ed, softmax, q, k, v, mask)
    elif rank != 4:
        raise Declined(f"queries of rank {rank}")
    k, v = fewer_heads(ed, k, v)
    shapes = [ed.shape(x) for x in (q, k, v)]
    if any(s is None for s in shapes):
        raise Declined("an operand of unknown shape")
    lead = [s[:2] for s in shapes if s is not None]
    if lead[0][0] != lead[1][0] or lead[1] != lead[2] or not divides(lead[1][1], lead[0][1]):
        raise Declined(f"queries, keys and values have the leading axes {lead[0]}, {lead[1]} and {lead[2]}")
    scale = plain_scale(scale, shapes[0][3] if shapes[0] is not None else None)
    inputs = [q, k, v] if mask is None else [q, k, v, mask]
    if any(x.dtype != q.dtype for x in (k, v)):
        raise Declined("queries, keys and values differ in type")
    attrs = {"scale": float(scale)} | ({"softcap": float(scores.softcap)} if scores.softcap else {})
    new = ed.emit("Attention", inputs, attrs, before=product, name=product.name)
    node = new.producer()
    assert node is not None
    if folded:
        target = ed.shape(out)
        if target is None:
            raise Declined("the result has no known shape")
        shape = [
            d if isinstance(d, int) else 0 if i == 0 and len(target) == 4 else -1
            for i, d in enumerate(target)
        ]
        if shape.count(-1) > 1:
            # [g, n, e] with g and n unknown: fold the first two axes of [b, h, n, e].
            new = fold_leading(ed, product, new)
        else:
            new = ed.emit("Reshape", [new, ed.ints(shape)], before=product)
    elif ed.shape(new) != ed.shape(out):
        raise Declined(f"the result is {ed.shape(out)} where Attention gives {ed.shape(new)}")
    ed.replace(out, new)


def plain_scale(scale: float, width: object) -> float:
    """1 / sqrt(d) exactly where rounding in the file came close to it (a root on q and one on k, say)."""
    usual = width**-0.5 if isinstance(width, int) and width > 0 else scale
    return usual if abs(scale - usual) <= 1e-6 * usual else scale


def divides(part: object, whole: object) -> bool:
    return part == whole or (isinstance(part, int) and isinstance(whole, int) and whole % part == 0)


def fewer_heads(ed: Editor, k: ir.Value, v: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Keys and values before each head of theirs was repeated for a group of query heads."""
    a, b = unrepeated(ed, k), unrepeated(ed, v)
    if a is None or b is None or (ed.shape(a) or ())[:2] != (ed.shape(b) or ())[:2]:
        return k, v
    return a, b


def unrepeated(ed: Editor, value: ir.Value) -> ir.Value | None:
    """x [b, g, n, d] of Reshape(Expand(x as [b, g, 1, n, d] to [b, g, r, n, d]), [b, g * r, n, d])."""
    join = ed.made_by(value, "Reshape")
    repeat = ed.made_by(join.inputs[0], "Expand", "Tile") if join is not None else None
    grown = ed.made_by(repeat.inputs[0], "Unsqueeze", "Reshape") if repeat is not None else None
    if repeat is None or grown is None:
        return None
    shapes = [ed.shape(x) for x in (grown.inputs[0], repeat.inputs[0], repeat.outputs[0], value)]
    if any(shape is None for shape in shapes):
        return None
    x, single, repeated, out = (shape or () for shape in shapes)
    if len(x) != 4 or len(out) != 4 or single != (*x[:2], 1, *x[2:]):
        return None
    same = repeated[:2] == x[:2] and repeated[3:] == x[2:] and (out[0], *out[2:]) == (x[0], *x[2:])
    return grown.inputs[0] if same and isinstance(out[1], int) else None


def fold_leading(ed: Editor, before: ir.Node, value: ir.Value) -> ir.Value:
    """[b, h, n, e] -> [b * h, n, e] with n unknown: by way of a shape computed at run time."""
    tail = ed.emit("Shape", [value], {"start": 2, "end": 4}, before=before)
    target = ed.emit("Concat", [ed.ints([-1]), tail], {"axis": 0}, before=before)
    return ed.emit("Reshape", [value, target], before=before)


def joined_mask(ed: Editor, softmax: ir.Node, scores: Scores, q: ir.Value) -> ir.Value | None:
    """One mask of rank 2 to 4 out of what was found."""
    mask: ir.Value | None = None
    for extra in scores.masks:
        mask = extra if mask is None else ed.emit("Add", [extra, mask], before=softmax)
    if scores.keep is not None:
        if mask is None:
            mask = scores.keep
        else:
            low = ed.like(-math.inf, mask)
            mask = ed.emit("Where", [scores.keep, mask, low], before=softmax)
    if mask is None:
        return None
    if mask.dtype != ir.DataType.BOOL and mask.dtype != q.dtype:
        raise Declined("the mask's type is not that of the queries")
    shape = ed.shape(mask)
    if shape is None:
        raise Declined("a mask of unknown shape")
    if len(shape) < 2:
        mask = ed.emit("Unsqueeze", [mask, ed.ints(list(range(2 - len(shape))))], before=softmax)
    full = ed.shape(scores.product.outputs[0])
    if broadcast(ed.shape(mask), full) is None:
        raise Declined("the mask does not broadcast to the scores")
    return mask


def unfold(
    ed: Editor, before: ir.Node, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None
) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value | None]:
    """Rank-3 operands as rank 4: the [b, h, n, d] that was folded into [b * h, n, d], or one head."""
    sources = [unfolded(ed, x) for x in (q, k, v)]
    shapes = [ed.shape(s) for s in sources]
    known = [s for s in shapes if s is not None]
    mask_shape = ed.shape(mask) if mask is not None else ()
    if len(known) == 3 and known[0][:2] == known[1][:2] == known[2][:2]:
        heads = known[0][1]
        mask = None if mask is None else split_heads(ed, before, mask, heads)
        a, b, c = sources
        assert a is not None and b is not None and c is not None
        return a, b, c, mask
    if mask_shape is not None and len(mask_shape) == 4:
        raise Declined("a mask over heads that the queries, keys or values have folded into the batch")
    axis = ed.ints([1])
    a, b, c = (ed.emit("Unsqueeze", [x, axis], before=before) for x in (q, k, v))
    if mask is not None and mask_shape is not None and len(mask_shape) == 3:
        mask = ed.emit("Unsqueeze", [mask, axis], before=before)
    return a, b, c, mask


def unfolded(ed: Editor, value: ir.Value) -> ir.Value | None:
    """[b, h, n, d] where value = Reshape of it to [b * h, n, d]; Unsqueeze and scaling between do not matter."""
    node = ed.made_by(value, "Reshape")
    if node is not None and folds_heads(ed, node):
        shape = ed.shape(node.inputs[0])
        return node.inputs[0] if shape is not None and len(shape) == 4 else None
    node = ed.made_by(value, "Transpose")
    if node is not None and list(node.attributes.get_ints("perm", [])) == [0, 2, 1]:
        # The keys as [b * h, d, m], transposed back by `operands_of`.
        source = ed.made_by(node.inputs[0], "Reshape")
        if source is not None and folds_heads(ed, source):
            shape = ed.shape(source.inputs[0])
            if shape is not None and len(shape) == 4:
                return ed.emit("Transpose", [source.inputs[0]], {"perm": [0, 1, 3, 2]}, before=node)
    return None
