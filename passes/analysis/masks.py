"""What the masks of a token space say: padding, causal order, or only a bias."""

from __future__ import annotations

import numpy as np

from ..ir.graph import Op, Value
from .flow import LOOKED_UP
from .spaces import Analysis, TokenSpace

ORDERS = frozenset(
    {
        "le",
        "lt",
        "ge",
        "gt",
        "less",
        "greater",
        "lessorequal",
        "greaterorequal",
        "less_equal",
        "greater_equal",
    }
)
TRIANGLES = frozenset({"tril", "triu", "trilu"})


def padding_mask(analysis: Analysis, space: TokenSpace) -> Value | None:
    """The mask of the space's first self-attention that depends on an input but not on the tokens' features.

    A key that no query may attend to under it is padding."""
    for block in space.blocks:
        mask = block.attention.operand(3)
        if mask is None or not analysis.flow.comes_from(mask):
            continue
        if analysis.flow.comes_from(mask) & LOOKED_UP:
            continue
        if space.stream is not None and analysis.flow.depends(mask, space.stream):
            continue
        if any(axis == mask.rank - 1 for axis, _ in analysis.token_axes(space, mask)):
            return mask
    return None


def causal_because(analysis: Analysis, attention: Op) -> str:
    """Why this attention is causal (a query sees no later key), "" when nothing says so."""
    if attention.attrs.get("causal"):
        return "it is marked causal"
    mask = attention.operand(3)
    if mask is None or mask.shape is None:
        return ""
    if _is_triangle(analysis, mask):
        return f"its mask %{mask.name} is triangular"
    if mask.producer is None:
        return ""
    bits = analysis.flow.ancestors[analysis.flow.position[mask.producer]]
    for op in analysis.graph.ops:
        if not bits >> analysis.flow.position[op] & 1:
            continue
        fn = str(op.attrs.get("fn", "")).lower()
        if op.kind == "spatial" and fn in TRIANGLES:
            return f"its mask comes from {op.target} (%{op.name})"
        if op.kind == "elementwise" and fn in ORDERS and _compares_positions(analysis, op):
            return f"its mask compares positions in {op.target} (%{op.name})"
        for value in op.inputs:
            if value is not None and _is_triangle(analysis, value):
                return f"its mask comes from the triangular constant %{value.name}"
    return ""


def _compares_positions(analysis: Analysis, op: Op) -> bool:
    """True when one operand runs along the queries and the other along the keys, and neither is data."""
    spread: list[set[int]] = []
    for value in op.inputs:
        if value is None or value.shape is None or analysis.flow.comes_from(value):
            return False
        shift = op.output.rank - value.rank
        along = {axis + shift for axis, length in enumerate(value.shape) if length != 1}
        spread.append(
            along & {op.output.rank - 1, op.output.rank - 2}
        )  # a batch may have positions of its own
    return len(spread) == 2 and all(spread) and not spread[0] & spread[1]


def _is_triangle(analysis: Analysis, value: Value) -> bool:
    """A constant that hides what is above the diagonal of its last two axes and nothing else, whatever it adds to the
    rest (a bias of positions that was folded into it); or one that holds one value there and another elsewhere."""
    from ...kernels.ops.valid_size import THRESHOLD

    if not analysis.graph.is_constant(value) or value.shape is None or value.rank < 2:
        return False
    if value.shape[-1] != value.shape[-2] or value.shape[-1] in (0, 1):
        return False
    data = analysis.graph.constant_value(value)
    if data is None:
        return False
    squares = np.asarray(data, dtype=np.float64).reshape(-1, *data.shape[-2:])
    upper = np.triu(np.ones(squares.shape[1:], dtype=bool), 1)
    above, below = squares[:, upper], squares[:, ~upper]
    if data.dtype != bool and bool((above <= THRESHOLD).all() and (below > THRESHOLD).all()):
        return True
    return len(squares) == 1 and bool(
        (above == above[0, 0]).all() and (below == below[0, 0]).all() and above[0, 0] != below[0, 0]
    )
