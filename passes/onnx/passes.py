"""The exact pass that goes before every other one on the ONNX side."""

from __future__ import annotations

from ..base import Outcome, Pass, PassContext, register
from ..errors import NothingMatched
from ..ir.graph import Graph
from ..ir.onnx import OnnxGraph
from .normalise import normalise


@register
class Normalise(Pass):
    """Brings a file of whatever exporter to one form: opset 23, whole attentions, norms and GELUs."""

    name = "normalise"
    exact = True
    summary = "bring an ONNX file of any exporter to one form"

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        host = _onnx(graph, self.name)
        before = host.text()
        report = normalise(host.model)
        OnnxGraph.__init__(host, host.model)  # the view anew: hardly a node is the same
        return Outcome(
            changed=host.text() != before,
            notes=[*report.near_misses, *report.notes],
            statistics=dict(report.rules),
        )


def _onnx(graph: Graph, name: str) -> OnnxGraph:
    if not isinstance(graph, OnnxGraph):
        raise NothingMatched(f"{name} is for ONNX graphs; this one comes from torch")
    return graph
