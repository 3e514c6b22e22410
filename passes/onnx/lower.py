"""Lowering for onnxruntime: each canonical operator in the form that its CPU kernels run fastest, by the lowering
table, and the whole in what onnxruntime 1.20 understands.

Measured and found to make no difference, so that these stay as they are (onnxruntime 1.32, one thread, medians within
2 %): MatMul and Add or Gemm, which onnxruntime makes of them itself; Gelu or com.microsoft's Gelu, FastGelu, BiasGelu
and QuickGelu, which it fuses itself.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from ..base import Outcome
from ..ir.graph import Graph
from ..ir.onnx import OnnxGraph
from ..ir.onnx_shapes import ShapeEnv
from ..lower_steps import fuse_steps
from ..lowering import Table
from ..lowering_defaults import DEFAULTS
from . import lower_attention, lower_functions, lower_norms, lower_opset, lower_packed
from .surgery import Editor


def lower_graph(graph: Graph, table: Table) -> Outcome:
    """`lower` on a graph view, with its report."""
    assert isinstance(graph, OnnxGraph)
    fused = fuse_steps(graph)
    counts, notes = lower(graph.model, table)
    counts |= fused
    if not counts:
        notes.append("nothing to lower: every operator has the form that onnxruntime runs fastest")
        return Outcome(notes=notes)
    OnnxGraph.__init__(graph, graph.model)
    return Outcome(changed=True, notes=notes, statistics=dict(counts))


def lower(model: ir.Model, table: Table = DEFAULTS) -> tuple[dict[str, int], list[str]]:
    """Rewrite `model` in place for onnxruntime; how often each rule fired, and what was left and why.

    Doing it again does nothing."""
    ed = Editor(model, ShapeEnv(model).run())
    lower_packed.unpack_projections(ed, table)
    ed.sweep()
    lower_attention.lower_attention(ed, table)
    ed.sweep()
    lower_norms.lower_norms(ed, table)
    lower_functions.unify(ed)
    ed.sweep()
    common.RemoveUnusedFunctionsPass()(model)
    counts = ed.counts | lower_functions.one_each(model)
    notes = list(dict.fromkeys(ed.near_misses))
    notes += [f"kept for a newer onnxruntime than 1.20: {why}" for why in lower_opset.relabel(model)]
    return counts, notes
