"""What a cut token space owes to those that still want every token: the stream that dropped tokens rest in, and sums
over weights that must count the same tokens as the sums over features that they divide."""

from __future__ import annotations

from .analysis.flow import is_float
from .analysis.spaces import Analysis, TokenSpace
from .ir.graph import Op, Value

QUIET = frozenset({"tie", "reshape", "expand", "transpose"})
"""Kinds that only say the same data in another form."""


def stream_values(analysis: Analysis, space: TokenSpace, value: Value) -> list[Value]:
    """The residual stream from `value` on: results of additions x + f(x), or of the norms right behind them where
    `value` is normed itself. A token that left the stream at `value` can stand in for itself in any of them."""
    flow = analysis.flow
    normed = _made_by_norm(value)
    places = analysis.token_axes(space, value)
    found = []
    for op in analysis.graph.ops:
        out = op.output if op.outputs else None
        if op.kind != "elementwise" or op.attrs.get("fn") not in ("add", "residual_add") or out is None:
            continue
        if out.shape != value.shape or analysis.token_axes(space, out) != places or out is value:
            continue
        a, b = op.inputs[0], op.operand(1)
        if a is None or b is None or not flow.depends(out, value):
            continue
        if not any(flow.depends(x, y) and flow.depends(y, value) for x, y in ((a, b), (b, a))):
            continue
        norms = [user for user, _ in out.users if user.kind == "norm"]
        if not normed:
            found.append(out)
        elif len(norms) == 1:
            found.append(norms[0].output)
    return found


def _made_by_norm(value: Value) -> bool:
    op = value.producer
    while op is not None and (op.kind == "tie" or op.attrs.get("fn") == "dropout"):
        source = op.inputs[0]
        op = None if source is None else source.producer
    return op is not None and op.kind == "norm"


def leading_out(analysis: Analysis, space: TokenSpace, end: Value) -> set[Op]:
    """The ops behind `end` by which outputs with a row for every token come about, one token at a time or not."""
    graph, flow = analysis.graph, analysis.flow
    wanted = [v for v in graph.outputs if analysis.token_axes(space, v) and flow.depends(v, end)]
    found: set[Op] = set()
    while wanted:
        value = wanted.pop()
        op = value.producer
        if op is None or value is end or op in found or not analysis.token_axes(space, value):
            continue
        found.add(op)
        wanted += [v for v in op.inputs if v is not None and flow.depends(v, end)]
    return found


def counted_sums(analysis: Analysis, space: TokenSpace) -> set[Op]:
    """Sums over tokens of weights that features were multiplied with: the denominators of weighted means."""
    weights = set()
    sums = [op for op in analysis.graph.ops_of("reduce") if _over_tokens(analysis, space, op)]
    for op in sums:
        value = op.inputs[0]
        assert value is not None
        if not analysis.is_content(space, value):
            continue
        product = _root(value).producer
        if product is None or product.kind != "elementwise" or product.attrs.get("fn") != "mul":
            continue
        for operand in product.inputs:
            if operand is not None and analysis.token_axes(space, operand):
                weights.add(_root(operand))
    return {
        op
        for op in sums
        if (value := op.inputs[0]) is not None
        and not analysis.is_content(space, value)
        and _root(value) in weights
    }


def _over_tokens(analysis: Analysis, space: TokenSpace, op: Op) -> bool:
    value = op.inputs[0]
    if op.attrs.get("fn") != "sum" or value is None or not is_float(value):
        return False
    axes = analysis.token_axes(space, value)
    return len(axes) == 1 and tuple(op.attrs["axes"]) == (axes[0][0],)


def _root(value: Value) -> Value:
    """What `value` is the same data as."""
    op = value.producer
    while op is not None and (op.kind in QUIET or op.attrs.get("fn") == "cast"):
        source = op.inputs[0]
        if source is None:
            break
        value, op = source, source.producer
    return value
