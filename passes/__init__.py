"""The compiler: graph views, analyses, passes and pipelines.

Light to import: torch, onnx and the adapters are loaded when a graph is made, passes when they are looked up.
"""

from .base import Outcome, Pass, PassContext, known_passes, register
from .diff import diff_graphs, diff_texts
from .errors import (
    ElisionError,
    ModelFileError,
    NothingMatched,
    PipelineError,
    Refused,
    VerificationError,
)
from .failures import PassFailed
from .ir.graph import Graph, Op, Value
from .manager import PassReport, PipelineReport, run_pipeline
from .pipeline import format, parse

__all__ = [
    "ElisionError",
    "Graph",
    "ModelFileError",
    "NothingMatched",
    "Op",
    "Outcome",
    "Pass",
    "PassContext",
    "PassFailed",
    "PassReport",
    "PipelineError",
    "PipelineReport",
    "Refused",
    "Value",
    "VerificationError",
    "diff_graphs",
    "diff_texts",
    "format",
    "known_passes",
    "parse",
    "register",
    "run_pipeline",
]
