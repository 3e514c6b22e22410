"""What the masks of a token space say: padding, causal order, or only a bias."""

from __future__ import annotations

import numpy as np

from ..errors import ElisionError
from ..ir.graph import Op, Value, product, static
from .flow import LOOKED_UP, is_float
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
AND = frozenset({"and", "bitwise_and", "logical_and"})
OR = frozenset({"or", "bitwise_or", "logical_or"})
NOT = frozenset({"not", "bitwise_not", "logical_not"})
STEPS = 16
"""At most so many ops are walked back from a mask."""
LARGEST = 1 << 26
"""A mask of more elements is not computed to be looked at."""
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


def told_of_keys(analysis: Analysis, space: TokenSpace, mask: Value) -> Value:
    """The least of what `mask` is made of that lets the same keys be read, keys along its last axis: true, other than 0
    or above `THRESHOLD` somewhere for the same of them. A mask of all pairs need not be written out to be asked."""
    for _ in range(STEPS):
        narrower = None if mask.producer is None else _narrower(analysis, space, mask.producer)
        if narrower is None or narrower.shape is None or mask.shape is None:
            break
        if not narrower.rank or narrower.shape[-1] != mask.shape[-1]:
            break
        mask = narrower
    return mask


def _narrower(analysis: Analysis, space: TokenSpace, op: Op) -> Value | None:
    x, fn = op.operand(0), op.attrs.get("fn")
    if x is None or op.output.shape is None:
        return None
    if op.kind in ("tie", "expand"):
        return x
    if op.kind == "reshape":
        return x if _only_units(op, 1) else None
    if op.kind != "elementwise":
        return None
    if fn == "cast":
        return None if is_float(x) or is_float(op.output) else x
    if fn in ("where", "masked_fill"):
        return _condition(analysis, op)
    if fn in AND and op.output.dtype == "bool" and len(op.inputs) == 2:
        a, b = op.inputs
        for one, other in ((a, b), (b, a)):
            if one is None or other is None or one.dtype != "bool":
                continue
            if _by_key(analysis, space, one) and _lets_all(analysis, other):
                return one
    return None


def _by_key(analysis: Analysis, space: TokenSpace, mask: Value) -> bool:
    """True when `mask` says the same to every query of a sample."""
    batch = analysis.batch_axis(space, mask)
    shape = mask.shape or ()
    return bool(shape) and all(d == 1 for axis, d in enumerate(shape[:-1]) if axis != batch)


def _condition(analysis: Analysis, op: Op) -> Value | None:
    """What is true where a choice between two constants lets a key be read; None where it is none."""
    given = [v for v in op.inputs if v is not None]
    if op.attrs["fn"] == "where":
        condition, rest = given[0], given[1:]
        names = ("self", "other")  # numbers among the operands are attributes in torch
    else:
        condition, rest = given[1], [*given[2:], given[0]]
        names = ("value", "")
    try:
        read = [_reads(analysis, op.attrs[n] if n in op.attrs else rest.pop(0), op.output) for n in names]
    except IndexError:
        return None
    if read == [True, False]:
        return condition
    turned = condition.producer
    negated = turned is not None and turned.attrs.get("fn") in NOT
    return turned.inputs[0] if turned is not None and negated and read == [False, True] else None


def _reads(analysis: Analysis, entry: object, mask: Value) -> bool | None:
    """Whether an entry of `mask`, a number or a constant, lets a key be read; None for one that does here and there."""
    from ...kernels.ops.valid_size import THRESHOLD

    data = _data(analysis, entry) if isinstance(entry, Value) else np.asarray(entry)
    if data is None or data.dtype.kind not in "bfiu":
        return None
    attends = data > THRESHOLD if is_float(mask) else data != 0
    return bool(attends.all()) if attends.all() or not attends.any() else None


def _data(analysis: Analysis, value: Value) -> np.ndarray | None:
    """What a value is that no input has a part in."""
    shape = static(value.shape)
    if analysis.flow.comes_from(value) or shape is None or product(shape) > LARGEST:
        return None
    data = analysis.graph.constant_value(value)
    if data is None and value.producer is not None and not _random(analysis, value.producer):
        try:
            data = analysis.graph.evaluate([value], {})[0]
        except ElisionError:
            return None
    return data


def _random(analysis: Analysis, op: Op) -> bool:
    """True when chance has a part in what an op gives."""
    places = analysis.flow.position
    bits = analysis.flow.ancestors[places[op]]
    names = {str(other.attrs.get("fn", "")) for other, place in places.items() if bits >> place & 1}
    return any(name.startswith(("rand", "bernoulli", "dropout")) for name in names)


def _lets_all(analysis: Analysis, mask: Value) -> bool:
    """True when a bool mask lets each key be read by some query, whatever the inputs say."""
    if mask.dtype != "bool" or mask.shape is None:
        return False
    data = _data(analysis, mask)
    if data is not None and data.ndim > 1 and np.any(data, axis=-2).all():  # of several samples every one
        return True
    return mask.rank > 1 and mask.shape[-1] == mask.shape[-2] and _own_key(analysis, mask, STEPS)


def _own_key(analysis: Analysis, mask: Value, steps: int) -> bool:
    """True when a bool mask, seen as [..., N, N], lets each query read the key of its own place."""
    op, data = mask.producer, _data(analysis, mask)
    if data is not None:
        square = data.ndim > 1 and data.shape[-1] == data.shape[-2]
        return bool(np.diagonal(data, axis1=-2, axis2=-1).all() if square else data.all())
    if op is None or not steps or mask.dtype != "bool":
        return False
    operands = [v for v in op.inputs if v is not None]
    fn = op.attrs.get("fn")
    if op.kind == "elementwise" and fn in AND | OR and len(operands) == len(op.inputs) == 2:
        found = [_own_key(analysis, v, steps - 1) for v in operands]
        return all(found) if fn in AND else any(found)
    same = op.kind in ("tie", "expand") or fn == "cast" or (op.kind == "reshape" and _only_units(op, 2))
    return same and _own_key(analysis, operands[0], steps - 1)


def _only_units(op: Op, last: int) -> bool:
    """Whether a reshape does no more than to add or drop axes of length 1, in front of the `last` ones."""
    x = op.inputs[0]
    if x is None or x.shape is None or op.output.shape is None:
        return False
    old, new = tuple(x.shape), tuple(op.output.shape)
    return old[-last:] == new[-last:] and [d for d in old if d != 1] == [d for d in new if d != 1]


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
