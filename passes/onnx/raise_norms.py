"""Raising decomposed LayerNormalization, RMSNormalization and Gelu to one standard operator each.

LayerNorm: (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias, in every spelling of the square and of
the root. RMSNorm: x / sqrt(mean(x^2) + eps) * weight. Gelu and its tanh form are recognised by what they
compute: the scalar function between a value and the product at its end is evaluated on a grid of points and
compared, so that no spelling of the constants or order of the factors escapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from .surgery import Editor


def raise_norms(ed: Editor) -> None:
    """Layer and RMS normalisations, from the ReduceMean (or sum of squares) of a square."""
    for node in list(ed.graph):
        if node.op_type == "ReduceMean" and node.domain == "" and node.graph is ed.graph:
            reason = raise_norm(ed, node)
            if reason:
                ed.near_misses.append(f"norm at {ed.label(node)}: {reason}")
    ed.sweep()


def squared(ed: Editor, value: ir.Value | None) -> ir.Value | None:
    """x where `value` is x * x or x ^ 2."""
    node = ed.made_by(value, "Pow", "Mul")
    if node is None:
        return None
    a, b = node.inputs[0], node.inputs[1]
    if node.op_type == "Mul":
        return a if a is b else None
    return a if ed.number(b) == 2.0 else None


def trailing_axes(ed: Editor, node: ir.Node) -> int | None:
    """The first of the reduced axes when they are the last ones, without a gap, and are kept."""
    shape = ed.shape(node.inputs[0])
    if shape is None or not node.attributes.get_int("keepdims", 1):
        return None
    axes = (
        ed.env.known_ints(node.inputs[1]) if len(node.inputs) > 1 else node.attributes.get_ints("axes", None)
    )
    if not axes:
        return None
    found = sorted(a % len(shape) for a in axes)
    return found[0] if found == list(range(found[0], len(shape))) else None


def root_of(ed: Editor, mean: ir.Value) -> tuple[float, ir.Node, bool] | None:
    """(epsilon, the node that makes the root or its reciprocal, whether it is the reciprocal) above a mean."""
    node = ed.user(mean, "Add", "Sqrt")
    epsilon = 0.0
    if node is not None and node.op_type == "Add":
        split = ed.split_constant(node)
        if split is None:
            return None
        epsilon = split[1]
        node = ed.user(node.outputs[0], "Sqrt", "Pow")
    if node is None:
        return None
    if node.op_type == "Pow":
        power = ed.number(node.inputs[1])
        return (epsilon, node, power == -0.5) if power in (0.5, -0.5) else None
    after = ed.user(node.outputs[0], "Reciprocal", "Div", "Mul")
    if after is not None and after.op_type == "Reciprocal":
        return epsilon, after, True
    if after is not None and after.op_type == "Div" and ed.number(after.inputs[0]) == 1.0:
        return epsilon, after, True
    return epsilon, node, False


def raise_norm(ed: Editor, variance: ir.Node) -> str | None:
    """Raise the normalisation whose mean of squares is `variance`; a reason when it nearly is one."""
    centred = squared(ed, variance.inputs[0])
    if centred is None:
        return None
    root = root_of(ed, variance.outputs[0])
    if root is None:
        return None
    epsilon, root_node, reciprocal = root
    last = ed.user(root_node.outputs[0], "Mul" if reciprocal else "Div")
    if last is None:
        return "the root of the mean square is not used by one product or quotient"
    others = [v for v in last.inputs if v is not root_node.outputs[0]]
    if not reciprocal and last.inputs[1] is not root_node.outputs[0]:
        return None
    axis = trailing_axes(ed, variance)
    if axis is None:
        return "it averages over axes that are not the last ones, which LayerNormalization cannot say"
    x, kind = centred, "RMSNormalization"
    subtract = ed.made_by(centred, "Sub")
    if subtract is not None:
        mean = ed.made_by(subtract.inputs[1], "ReduceMean")
        if mean is not None and mean.inputs[0] is subtract.inputs[0] and trailing_axes(ed, mean) == axis:
            assert subtract.inputs[0] is not None
            x, kind = subtract.inputs[0], "LayerNormalization"
    numerator = others[0] if others else None
    if numerator is not centred and not (
        kind == "LayerNormalization" and same_difference(ed, numerator, centred)
    ):
        return "what is divided by the root is not what was squared"
    shape = ed.shape(x)
    if shape is None or not all(isinstance(d, int) for d in shape[axis:]):
        return "the length of the normalised axes is not static"
    lengths = [int(d) for d in shape[axis:]]
    out, weight = absorb(ed, last.outputs[0], "Mul", lengths, x)
    bias: ir.Value | None = None
    if kind == "LayerNormalization":
        out, bias = absorb(ed, out, "Add", lengths, x)
    anchor = out.producer()
    assert anchor is not None
    if weight is None:
        dtype = (x.dtype or ir.DataType.FLOAT).numpy()
        weight = ed.constant(np.ones(lengths, dtype), f"{out.name}_ones")
    inputs = [x, weight] if bias is None else [x, weight, bias]
    attrs = {"axis": axis - len(shape), "epsilon": epsilon}
    ed.replace(out, ed.emit(kind, inputs, attrs, before=anchor))
    ed.count(kind)
    return None


def same_difference(ed: Editor, a: ir.Value | None, b: ir.Value) -> bool:
    """Two Sub nodes with the same operands (older exporters write x - mean twice)."""
    first, second = ed.made_by(a, "Sub"), ed.made_by(b, "Sub")
    if first is None or second is None or first.inputs[0] is not second.inputs[0]:
        return False
    mean, other = ed.made_by(first.inputs[1], "ReduceMean"), ed.made_by(second.inputs[1], "ReduceMean")
    return first.inputs[1] is second.inputs[1] or (
        mean is not None
        and other is not None
        and mean.inputs[0] is other.inputs[0]
        and trailing_axes(ed, mean) == trailing_axes(ed, other)
    )


def absorb(
    ed: Editor, value: ir.Value, op_type: str, lengths: list[int], x: ir.Value
) -> tuple[ir.Value, ir.Value | None]:
    """(the value after it, the constant) when the only user is `value * constant` or `value + constant`."""
    node = ed.user(value, op_type)
    if node is None:
        return value, None
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    array = ed.array(other)
    if array is None or other is None or other.dtype != x.dtype:
        return value, None
    flat = array.reshape(
        [d for d in array.shape[: max(array.ndim - len(lengths), 0)] if d != 1]
        + list(array.shape)[max(array.ndim - len(lengths), 0) :]
    )
    if flat.ndim > len(lengths):
        return value, None
    try:
        full = np.broadcast_to(flat, lengths)
    except ValueError:
        return value, None
    if full.shape == array.shape:
        return node.outputs[0], other
    return node.outputs[0], ed.constant(full, f"{other.name}_flat")


# ---- scalar functions --------------------------------------------------------------------------------
GRID = np.concatenate([np.linspace(-6, 6, 49), [-30.0, -0.01, 0.01, 30.0]])
_erf = np.vectorize(math.erf)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


SCALAR: dict[str, Callable[..., np.ndarray]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Sqrt": np.sqrt,
    "Erf": _erf,
    "Tanh": np.tanh,
    "Neg": np.negative,
    "Identity": lambda x: x,
    "Cast": lambda x: x,
    "Sum": lambda *xs: np.sum(np.broadcast_arrays(*xs), axis=0),
}


def raise_gelu(ed: Editor) -> None:
    """Gelu and its tanh form, from the Erf or Tanh inside."""
    for node in list(ed.graph):
        if node.domain == "" and node.op_type in ("Erf", "Tanh") and node.graph is ed.graph:
            raise_one_gelu(ed, node)
    ed.sweep()


def raise_one_gelu(ed: Editor, core: ir.Node) -> None:
    function, approximate = (gelu, "none") if core.op_type == "Erf" else (gelu_tanh, "tanh")
    sources = upstream(ed, core)
    root: ir.Node | None = core
    for _ in range(6):
        root = ed.user(root.outputs[0], "Add", "Mul", "Div", "Cast") if root is not None else None
        if root is None:
            return
        if root.op_type not in ("Mul", "Div"):
            continue
        for x in sources:
            values = on_grid(ed, root.outputs[0], x, 16)
            if values is None or x.dtype != root.outputs[0].dtype:
                continue
            wanted = function(GRID)
            if np.all(np.abs(values - wanted) <= 1e-5 * np.maximum(1.0, np.abs(wanted))):
                new = ed.emit("Gelu", [x], {"approximate": approximate}, before=root)
                ed.replace(root.outputs[0], new)
                ed.count("Gelu" if approximate == "none" else "Gelu (tanh)")
                return


def upstream(ed: Editor, core: ir.Node) -> list[ir.Value]:
    """Values before `core` that are used more than once: where a gated function may start. Nearest first."""
    found: list[ir.Value] = []
    queue = [(core.inputs[0], 0)]
    while queue:
        value, depth = queue.pop(0)
        if value is None or depth > 6 or ed.is_constant(value) or value in found:
            continue
        if len(value.uses()) > 1 or value.is_graph_input():
            found.append(value)
        node = value.producer()
        if node is not None and node.domain == "" and node.op_type in SCALAR:
            queue += [(v, depth + 1) for v in node.inputs]
    return found


def on_grid(ed: Editor, value: ir.Value, x: ir.Value, budget: int) -> np.ndarray | None:
    """What `value` is as a scalar function of `x`, on the grid; None when it depends on anything else."""
    if value is x:
        return GRID
    number = ed.number(value)
    if number is not None:
        return np.full_like(GRID, number)
    node = value.producer()
    if node is None or node.domain != "" or node.op_type not in SCALAR or budget <= 0:
        return None
    parts = [on_grid(ed, v, x, budget - 1) if v is not None else None for v in node.inputs]
    known = [p for p in parts if p is not None]
    if len(known) != len(parts):
        return None
    with np.errstate(all="ignore"):
        return np.asarray(SCALAR[node.op_type](*known), dtype=float)
