"""A torch graph for MLIR: the ops of the dialect taken apart into what torch-mlir lowers to linalg."""

from __future__ import annotations

from collections import Counter

from ...kernels.mlir import PRIMITIVES
from . import fx_prepare, fx_rewrite
from .fx import FxGraph


def decompose(graph: FxGraph) -> dict[str, int]:
    """Put into the place of every op of the dialect the ATen of its definition, with sorts, scatters and arg-maxima
    as comparisons and sums. In place; the numbers stay, maps to the bit.

    What the model itself sorts or scatters is left to torch-mlir. Returns how often each op was taken apart; ops and
    values that the caller holds are void unless that is empty."""
    ops = graph.ops_of("elision")
    counts = Counter(op.target.rpartition(".")[2] for op in ops)
    if not ops:
        return {}
    own = set(graph.module.graph.nodes)
    graph.take_apart(ops)
    for node in list(graph.module.graph.nodes):
        if node not in own and node.target in PRIMITIVES:
            fx_rewrite.take_apart(graph.module, node, graph._mode, PRIMITIVES[node.target])
    fx_prepare.hoist_constants(graph.module)
    fx_prepare.fill_meta(graph.module)
    fx_prepare.drop_dead(graph.module.graph)
    graph._changed()
    graph._build()
    return dict(counts)
