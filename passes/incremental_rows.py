"""Which axis of every value has one entry a token, and proof that no operation mixes the tokens.

One rule a kind: given the token axes of the operands, the token axis of the results. Row i of a result may
depend on row i of the operands only; an operation that reads other rows (a convolution, a cumulative sum, a
reversal, a reduction over the tokens) has no rule for that and is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sympy

from .analysis.signatures import mixed_axes, picked_axis
from .analysis.spaces import is_attention
from .errors import Refused
from .ir.graph import Op, Value, product

Axes = Sequence[int | None]
"""The token axis of each operand, None for one without (the same for all tokens)."""

Rule = Callable[[Op, Axes], "int | None"]
"""The token axis of the op's outputs. Raises Mixes where tokens meet."""

RULES: dict[str, Rule] = {}


class Mixes(Exception):
    """What an operation does to the tokens, as the end of a sentence."""


def token_axis(op: Op, axes: Axes) -> int | None:
    """The axis of `op`'s outputs that runs along the tokens, when its operands' run along `axes`. None: no output
    depends on a token. Raises Refused, naming op and value, when a row could depend on another row."""
    if all(axis is None for axis in axes):
        return None
    try:
        rule = RULES.get(op.kind)
        if rule is None or any(out.shape is None for out in op.outputs):
            raise Mixes("is no operation that is known to treat tokens one by one")
        return rule(op, axes)
    except Mixes as why:
        index = next(i for i, axis in enumerate(axes) if axis is not None)
        value = op.inputs[index]
        assert value is not None
        raise Refused(
            f"{op.target} (%{op.name}) {why}: a new row of %{value.name} would not be enough"
        ) from None


def rule(*kinds: str) -> Callable[[Rule], Rule]:
    def enter(function: Rule) -> Rule:
        for kind in kinds:
            RULES[kind] = function
        return function

    return enter


def _first(axes: Axes) -> int:
    """The token axis of the first operand, the only one that may have one."""
    if axes[0] is None or any(axis is not None for axis in axes[1:]):
        raise Mixes("reads tokens where weights or indices are expected")
    return axes[0]


def _avoid(axis: int, mixed: Sequence[int], what: str) -> int:
    if axis in mixed:
        raise Mixes(what)
    return axis


def _operand(op: Op, index: int = 0) -> Value:
    value = op.inputs[index]
    assert value is not None
    return value


@rule("elementwise")
def _elementwise(op: Op, axes: Axes) -> int:
    back = {
        value.rank - axis for value, axis in zip(op.inputs, axes) if value is not None and axis is not None
    }
    if len(back) != 1:
        raise Mixes("combines every token with every token")
    place = back.pop()
    for value, axis in zip(op.inputs, axes):
        if axis is None and value is not None and value.shape is not None and value.rank >= place:
            if value.shape[value.rank - place] == 1:
                continue
            raise Mixes(f"combines tokens with %{value.name}, which is no row of theirs")
    return op.output.rank - place


@rule("tie")
def _tie(op: Op, axes: Axes) -> int:
    return _first(axes)


@rule("linear")
def _linear(op: Op, axes: Axes) -> int:
    return _avoid(_first(axes), [_operand(op).rank - 1], "sums over the tokens")


@rule("matmul")
def _matmul(op: Op, axes: Axes) -> int:
    a, b, out = _operand(op, 0), _operand(op, 1), op.output
    if len(axes) > 2 and axes[2] is not None:
        raise Mixes("adds a bias of tokens")
    found: set[int] = set()
    for value, axis, summed in ((a, axes[0], a.rank - 1), (b, axes[1], max(b.rank - 2, 0))):
        if axis is None:
            continue
        _avoid(axis, [summed], "sums over the tokens")
        found.add(axis - value.rank)
    if len(found) != 1:
        raise Mixes("combines every token with every token")
    back = found.pop()
    if b.rank == 1:
        back += 1  # the last axis of `a` is gone
    if a.rank == 1 and back < -1:
        back += 1
    return out.rank + back


@rule("norm")
def _norm(op: Op, axes: Axes) -> int:
    return _avoid(_first(axes), op.attrs.get("axes", ()), "normalises over the tokens")


@rule("softmax")
def _softmax(op: Op, axes: Axes) -> int:
    return _avoid(_first(axes), [op.attrs["axis"]], "normalises over the tokens")


@rule("reduce")
def _reduce(op: Op, axes: Axes) -> int:
    reduced = op.attrs["axes"]
    axis = _avoid(_first(axes), reduced, f"takes the {op.attrs.get('fn')} over the tokens")
    return axis if op.output.rank == _operand(op).rank else axis - sum(a < axis for a in reduced)


@rule("reshape")
def _reshape(op: Op, axes: Axes) -> int:
    """Rows stay rows when as many elements lie before the token axis as before, and none of it is split."""
    axis, x = _first(axes), _operand(op)
    assert x.shape is not None and op.output.shape is not None
    before = product(x.shape[:axis])
    tokens = sympy.sympify(x.shape[axis]).free_symbols
    for place, dim in enumerate(op.output.shape):
        count = None if isinstance(dim, int) or len(tokens) != 1 else sympy.cancel(dim / next(iter(tokens)))
        if count is not None and count.is_Integer and product(op.output.shape[:place]) == before:
            return place
    raise Mixes("gives the tokens another shape")


@rule("transpose")
def _transpose(op: Op, axes: Axes) -> int:
    return list(op.attrs["perm"]).index(_first(axes))


@rule("expand")
def _expand(op: Op, axes: Axes) -> int:
    return _first(axes) + op.output.rank - _operand(op).rank


@rule("concat")
def _concat(op: Op, axes: Axes) -> int:
    if len(set(axes)) != 1 or axes[0] is None:
        raise Mixes("joins tokens with what is none")
    return _avoid(axes[0], [op.attrs["axis"]], "joins other tokens to the tokens")


@rule("stack")
def _stack(op: Op, axes: Axes) -> int:
    if len(set(axes)) != 1 or axes[0] is None:
        raise Mixes("joins tokens with what is none")
    return axes[0] + (op.attrs["axis"] <= axes[0])


@rule("split", "slice")
def _slice(op: Op, axes: Axes) -> int:
    return _avoid(_first(axes), [op.attrs["axis"]], "takes some of the tokens")


@rule("select", "unbind")
def _select(op: Op, axes: Axes) -> int:
    gone = op.attrs["axis"]
    axis = _avoid(_first(axes), [gone], "picks tokens out")
    return axis - (axis > gone)


@rule("gather")
def _gather(op: Op, axes: Axes) -> int:
    axis, indices = op.attrs["axis"], _operand(op, 1)
    if axes[0] is not None and axes[1] is not None:
        raise Mixes("picks tokens by computed position")
    if axes[1] is not None:
        return axis + axes[1]
    assert axes[0] is not None
    _avoid(axes[0], [axis], "picks tokens by computed position")
    return axes[0] + (indices.rank - 1 if axes[0] > axis else 0)


@rule("embedding")
def _embedding(op: Op, axes: Axes) -> int:
    if axes[0] is not None or axes[1] is None:
        raise Mixes("looks tokens up in a table of tokens")
    return axes[1]


@rule("attention")
def _attention(op: Op, axes: Axes) -> int:
    """Tokens that attend to something else; attentions among the tokens are replaced before."""
    q, mask = _operand(op), op.operand(3)
    if axes[0] != q.rank - 2 or axes[1] is not None or axes[2] is not None:
        raise Mixes("attends over the tokens in a way that is not known")
    if op.attrs.get("causal"):
        raise Mixes("counts its queries, so that a row's place matters")
    if len(axes) > 3 and axes[3] is not None and mask is not None and axes[3] != mask.rank - 2:
        raise Mixes("has a mask that runs along the tokens as keys")
    return op.output.rank - 2


@rule("conv")
def _conv(op: Op, axes: Axes) -> int:
    if _first(axes) != 0 or _operand(op).rank != len(op.attrs["spatial"]) + 2:
        raise Mixes("convolves over the tokens")
    return 0


@rule("spatial")
def _spatial(op: Op, axes: Axes) -> int:
    fn = str(op.attrs.get("fn") or "moves positions").lower()
    axis = axes[0]
    if axis is None or any(other not in (None, axis) for other in axes):
        raise Mixes(f"({fn}) reads tokens where indices are expected")
    _avoid(axis, op.attrs["axes"], f"({fn}) mixes the tokens")
    if op.output.rank != _operand(op).rank:
        raise Mixes(f"({fn}) gives the tokens another shape")
    return axis


@rule("scatter")
def _scatter(op: Op, axes: Axes) -> int:
    return _avoid(_first(axes), op.attrs["axes"], "writes into the tokens by position")


@rule("elision")
def _elision(op: Op, axes: Axes) -> int | None:
    if is_attention(op):
        if any(axis is not None for axis in axes[4:]):
            raise Mixes("counts keys by what tokens say")
        return _attention(op, axes)
    axis, picked = axes[0], picked_axis(op)
    if picked is not None:
        if axis is None or any(other is not None for other in axes[1:]):
            raise Mixes("picks rows by what tokens say")
        axis += op.output.rank - _operand(op).rank
        return _avoid(axis, (picked, op.attrs["batch_axis"]), "picks some of the tokens")
    mixed = mixed_axes(op)
    if mixed is None:
        raise Mixes("is no operation that is known to treat tokens one by one")
    if axis is None or any(other not in (None, axis) for other in axes):
        raise Mixes("reads tokens where weights are expected")
    return _avoid(axis, range(_operand(op).rank - mixed, _operand(op).rank), "sums over the tokens")
