"""Attention masks with what says nothing removed.

Exporters build masks out of index arithmetic: every position is compared with zero, a padding mask is picked
element by element, all of it is expanded to full size. The operator broadcasts its mask, so that Expand can go;
comparisons that are always true go, and a pick of every position in order is the value itself.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..ir.graph import Shape
from .surgery import Editor, operand

LOW = -1e30
"""What stands for a finite fill near the least float: added to any score it gives itself, so a row without keys
stays uniform; the least float itself is taken for minus infinity by onnxruntime."""


def simplify_masks(ed: Editor) -> None:
    """Simplify the mask of every Attention; remove it where it masks nothing."""
    for node in list(ed.graph):
        mask = operand(node, 3)
        if node.op_type != "Attention" or node.domain != "" or mask is None or node.graph is not ed.graph:
            continue
        plain = Masks(ed, node).plain(mask)
        if plain is None:
            node.replace_input_with(3, None)
            if len(node.inputs) == 4:
                node.resize_inputs(3)
            ed.count("masks that mask nothing")
        elif plain is not mask:
            rank = len(ed.env.need(plain))
            if rank < 2:
                plain = ed.emit("Unsqueeze", [plain, ed.ints(list(range(2 - rank)))], before=node)
            node.replace_input_with(3, plain)
            ed.count("masks made plain")
    ed.sweep()


class Masks:
    """The simplification of one mask; new nodes stand in front of `before`."""

    def __init__(self, ed: Editor, before: ir.Node) -> None:
        self.ed, self.before = ed, before

    def plain(self, mask: ir.Value, depth: int = 0) -> ir.Value | None:
        """`mask` or something that broadcasts to it; None where it is neutral (all true, or all zero)."""
        ed, node = self.ed, mask.producer()
        array = ed.array(mask)
        if array is not None:
            neutral = array.all() if array.dtype == bool else not array.any()
            return None if neutral else self.soft_constant(mask, array)
        if node is None or node.domain != "" or depth > 12:
            return mask
        a, b = operand(node, 0), operand(node, 1)
        if node.op_type in ("Expand", "Identity") and a is not None:
            return self.plain(a, depth + 1)
        if node.op_type == "ConstantOfShape" and self.neutral_fill(node):
            return None
        if node.op_type in ("And", "Add") and a is not None and b is not None:
            return self.both(mask, node, a, b, depth)
        if node.op_type in ("GreaterOrEqual", "Greater") and self.always(node):
            return None
        if node.op_type == "Where":
            return self.chosen(mask, node, depth)
        if node.op_type == "Mul" and a is not None and b is not None:
            return self.soft_product(mask, a, b)
        if node.op_type in ("GatherND", "Reshape"):
            return whole_gather_nd(ed, self.before, node) or whole_gather(ed, self.before, node) or mask
        if node.op_type == "Unsqueeze" and a is not None:
            return self.grown(mask, a, depth)
        return mask

    def neutral_fill(self, node: ir.Node) -> bool:
        """Zeros of whatever size to be added, or a boolean mask that is true throughout."""
        fill = node.attributes.get_tensor("value", None)
        if fill is None:
            return True
        return bool(fill.numpy().all()) if fill.dtype == ir.DataType.BOOL else not fill.numpy().any()

    def both(self, mask: ir.Value, node: ir.Node, a: ir.Value, b: ir.Value, depth: int) -> ir.Value | None:
        left, right = self.plain(a, depth + 1), self.plain(b, depth + 1)
        if left is None or right is None:
            return right if left is None else left
        if left is a and right is b:
            return mask
        return self.ed.emit(node.op_type, [left, right], before=self.before)

    def always(self, node: ir.Node) -> bool:
        """A comparison of counted positions with a number below all of them."""
        least, bound = self.least(node.inputs[0]), self.ed.number(node.inputs[1])
        if least is None or bound is None:
            return False
        return least >= bound if node.op_type == "GreaterOrEqual" else least > bound

    def least(self, value: ir.Value | None) -> float | None:
        for _ in range(8):
            node = None if value is None else value.producer()
            if node is None or node.domain != "":
                return None
            if node.op_type == "Range":
                step = self.ed.number(node.inputs[2])
                return self.ed.number(node.inputs[0]) if step is not None and step > 0 else None
            if node.op_type not in ("Unsqueeze", "Expand", "Reshape", "Identity", "Cast"):
                return None
            value = node.inputs[0]
        return None

    def chosen(self, mask: ir.Value, node: ir.Node, depth: int) -> ir.Value | None:
        """Where(condition, x, low) and Where(not condition, low, x), with x a number or another mask."""
        ed = self.ed
        condition, x, fill = node.inputs[0], node.inputs[1], ed.number(node.inputs[2])
        if fill is None or fill > LOW:
            negated = ed.made_by(condition, "Not")
            if negated is None:
                return mask
            condition, x, fill = negated.inputs[0], node.inputs[2], ed.number(node.inputs[1])
        if fill is None or fill > LOW or x is None or condition is None:
            return mask
        found, rest = self.plain(condition, depth + 1), self.plain(x, depth + 1)
        if found is None:
            return rest
        low = LOW if np.isfinite(fill) else fill
        if found is node.inputs[0] and rest is node.inputs[1] and fill == low:
            return mask
        kept = ed.like(0.0, mask) if rest is None else rest
        return ed.emit("Where", [found, kept, ed.like(low, mask)], before=self.before)

    def soft_product(self, mask: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
        """x * low, with the least float as low."""
        for x, c in ((a, b), (b, a)):
            number = self.ed.number(c)
            if number is not None and np.isfinite(number) and number < LOW:
                return self.ed.emit("Mul", [x, self.ed.like(LOW, mask)], before=self.before)
        return mask

    def soft_constant(self, mask: ir.Value, array: np.ndarray) -> ir.Value:
        if array.dtype != np.float32 or not (np.isfinite(array) & (array < LOW)).any():
            return mask
        soft = np.where(np.isfinite(array), np.maximum(array, np.float32(LOW)), array)
        return self.ed.constant(soft.astype(array.dtype), f"{mask.name}_soft")

    def grown(self, mask: ir.Value, a: ir.Value, depth: int) -> ir.Value | None:
        """Unsqueeze of a mask, where the smaller one kept its rank."""
        found = self.plain(a, depth + 1)
        if found is None or found is a or len(self.ed.env.need(found)) != len(self.ed.env.need(a)):
            return None if found is None else mask
        node = mask.producer()
        assert node is not None
        return self.ed.emit("Unsqueeze", [found, node.inputs[1]], before=self.before)


# ---- picking every position in order -----------------------------------------------------------------
def counter(ed: Editor, value: ir.Value | None) -> tuple[object, int, int] | None:
    """(n, axis from the end, rank) where `value` counts 0 ... n - 1 along one axis and repeats along the others."""
    axis: int | None = None
    rank: int | None = None
    for _ in range(8):
        node, shape = None if value is None else value.producer(), ed.shape(value)
        if node is None or shape is None or node.domain != "":
            return None
        rank = len(shape) if rank is None else rank
        if node.op_type == "Range":
            if ed.number(node.inputs[0]) != 0.0 or ed.number(node.inputs[2]) != 1.0:
                return None
            return shape[0], -1 if axis is None else axis, rank
        if node.op_type in ("Unsqueeze", "Reshape"):
            source = ed.shape(node.inputs[0])
            long = [i for i, d in enumerate(shape) if d != 1]
            if source is None or len(long) != 1 or [d for d in source if d != 1] != [shape[long[0]]]:
                return None
            axis = long[0] - len(shape) if axis is None else axis
        elif node.op_type not in ("Expand", "Identity", "Cast"):
            return None
        value = node.inputs[0]
    return None


def in_order(ed: Editor, x: Shape, parts: list[ir.Value], target: Shape) -> list[int] | None:
    """The axes of `target` along which the parts count through the leading axes of x; others have length 1.

    Two symbolic lengths are taken to be equal: were they not, the pick would run past the end.
    """
    axes: list[int] = []
    for length, part in zip(x, parts):
        found = counter(ed, part)
        if found is None:
            return None
        count, axis, _ = found
        if count != length and (isinstance(count, int) or isinstance(length, int)):
            return None
        axes.append(axis + len(target))
    others = [i for i in range(len(target)) if i not in axes]
    if axes != sorted(set(axes)) or axes[0] < 0 or any(target[i] != 1 for i in others):
        return None
    return axes


def grow(ed: Editor, before: ir.Node, x: ir.Value, rank: int, axes: list[int]) -> ir.Value:
    """x with new axes of length 1, so that its own become `axes` of `rank`."""
    gaps = [i for i in range(rank) if i not in axes]
    return ed.emit("Unsqueeze", [x, ed.ints(gaps)], before=before) if gaps else x


def whole_gather_nd(ed: Editor, before: ir.Node, node: ir.Node) -> ir.Value | None:
    """x[arange(b)[:, None, None, None], arange(n)] as x[:, None, None, :]."""
    x = operand(node, 0)
    stack = ed.made_by(operand(node, 1), "Concat") if node.op_type == "GatherND" else None
    if x is None or stack is None or node.attributes.get_int("batch_dims", 0):
        return None
    shape, target = ed.env.need(x), ed.env.need(node.outputs[0])
    rank = len(ed.env.need(stack.outputs[0]))
    parts: list[ir.Value] = []
    for value in stack.inputs:
        single = ed.made_by(value, "Unsqueeze")
        part = single.inputs[0] if single is not None else None
        if part is None or ed.env.need(value)[-1] != 1:
            return None
        parts.append(part)
    if stack.attributes.get_int("axis", 0) % rank != rank - 1 or len(parts) != len(shape):
        return None
    axes = in_order(ed, shape, parts, target)
    return None if axes is None else grow(ed, before, x, len(target), axes)


def whole_gather(ed: Editor, before: ir.Node, node: ir.Node) -> ir.Value | None:
    """The same over flattened axes: x.flatten()[arange(n) + n * arange(b)[:, None, None, None]]."""
    target = ed.env.need(node.outputs[0])
    pick: ir.Node | None = node
    while pick is not None and pick.op_type == "Reshape":
        pick = ed.made_by(pick.inputs[0], "Reshape", "Gather", "Squeeze")
    if pick is None or pick.op_type != "Gather" or pick.attributes.get_int("axis", 0):
        return None
    flat, index = ed.made_by(pick.inputs[0], "Flatten", "Reshape"), ed.made_by(pick.inputs[1], "Add")
    x = flat.inputs[0] if flat is not None else None
    shape = ed.shape(x)
    if x is None or index is None or shape is None or len(shape) != 2 or ed.shape(pick.inputs[1]) != target:
        return None
    for inner, outer in ((index.inputs[0], index.inputs[1]), (index.inputs[1], index.inputs[0])):
        step = ed.made_by(outer, "Mul")
        if step is None or inner is None:
            continue
        strides = [v for v in step.inputs if (ed.env.ints(v) or [None]) == [shape[1]]]
        rows = [v for v in step.inputs if v not in strides]
        if len(rows) != 1 or rows[0] is None:
            continue
        axes = in_order(ed, shape, [rows[0], inner], target)
        if axes is not None:
            return grow(ed, before, x, len(target), axes)
    return None
