"""Rows that were folded together, [B, N, C] as [B * N, C], get their two axes back where every row is computed alone.

Some models (OPT) fold batch and tokens for their MLP. What cuts the tokens cannot cut such rows; the same ops on the
unfolded value give the same rows. A Gemm, which takes matrices only, becomes a MatMul and an Add for it.
"""

from __future__ import annotations

from .analysis.spaces import Analysis
from .ir.graph import Graph, Op, Value

MATRICES_ONLY = "Gemm"
BY_ROW = frozenset({"linear", "norm", "elementwise", "tie"})


def unfold(graph: Graph, analysis: Analysis) -> int:
    """Rewrite in place; returns how many folding reshapes were undone. The analysis is void where it is not 0."""
    found = {op: op.inputs[0] for op in folds(graph, analysis)}
    region: dict[Value, None] = {op.output: None for op in found}
    inside: list[Op] = []
    for op in graph.ops:
        if op in found or not any(v in region for v in op.inputs if v is not None):
            continue
        if _returns(analysis, op):
            continue
        if op.kind not in BY_ROW or not _alone(graph, op, region):
            return 0
        inside.append(op)
        region.update(dict.fromkeys(op.outputs))
    if any(value in region for value in graph.outputs):
        return 0
    for op, x in found.items():
        assert x is not None
        for user, index in list(op.output.users):
            graph.set_operand(user, index, x)
    for op in inside:
        if op.target == MATRICES_ONLY:
            _of_any_rank(graph, op)
        else:
            graph.refresh(op)
    if found:
        graph.remove_dead()  # the folding reshapes
    return len(found)


def folds(graph: Graph, analysis: Analysis) -> list[Op]:
    """The reshapes that fold batch and tokens."""
    return [op for op in graph.ops_of("reshape") if _folds(analysis, op)]


def _folds(analysis: Analysis, op: Op) -> bool:
    """[B, N, C] -> [B * N, C], where N is the tokens of a space."""
    x, out = op.inputs[0], op.output
    if x is None or x.rank != 3 or out.rank != 2:
        return False
    batch, tokens, channels = analysis.axes.types(x)
    keys = {space.key for space in analysis.spaces if space.blocks}
    return tokens in keys and analysis.axes.types(out) == [batch + tokens, channels]


def _returns(analysis: Analysis, op: Op) -> bool:
    """[B * N, C] -> [B, N, C]."""
    x, out = op.inputs[0], op.output
    if op.kind != "reshape" or x is None or x.rank != 2 or out.rank != 3:
        return False
    batch, tokens, _ = analysis.axes.types(out)
    return analysis.axes.type(x, 0) == batch + tokens


def _alone(graph: Graph, op: Op, region: dict[Value, None]) -> bool:
    """True when `op` computes its rows one by one, also when they have two axes in front."""
    if op.kind == "norm" and tuple(op.attrs.get("axes", ())) != (op.output.rank - 1,):
        return False
    if op.target == MATRICES_ONLY:
        x, weight, bias = op.inputs[0], op.operand(1), op.operand(2)
        plain = "alpha" not in op.attrs and "beta" not in op.attrs and (bias is None or bias.rank <= 1)
        return plain and x in region and weight is not None and graph.constant_value(weight) is not None
    return all(v is None or v in region or v.rank <= 1 or op.kind == "linear" for v in op.inputs)


def _of_any_rank(graph: Graph, op: Op) -> None:
    """A product that takes matrices only as one that takes rows with any number of axes in front."""
    x, weight, bias = op.inputs[0], op.inputs[1], op.operand(2)
    assert x is not None and weight is not None
    if op.attrs["transposed"]:
        array = graph.constant_value(weight)
        assert array is not None
        weight = graph.insert_constant(array.T, f"{weight.name}_turned")
    made = graph.insert_plain("matmul", [x, weight], {}, after=op)
    if bias is not None:
        made = graph.insert_plain("add", [made, bias], {}, after=made.producer)
    graph.replace_uses(op.output, made)
