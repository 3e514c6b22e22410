"""Elision: a graph compiler that makes transformers you already have cheaper by computing fewer tokens.

Only names live here. Everything is loaded on first use, so that `import elision` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import testing
    from .passes.base import NoOptions, Outcome, Pass, PassContext, known_passes, register
    from .passes.errors import (
        ElisionError,
        ModelFileError,
        NothingMatched,
        PipelineError,
        Refused,
        VerificationError,
    )
    from .passes.gate_control import GateController
    from .passes.ir.graph import Graph
    from .passes.pipeline import format, parse
    from .passes.tunable import Knob
    from .runtime.api import Result, export_onnx, optimize
    from .runtime.diffusion import DiffusionGeneration, DiffusionGenerator
    from .runtime.generate import Generation, Generator
    from .runtime.iree import compile_iree, run_iree
    from .runtime.mlir import export_mlir
    from .runtime.parts import PartsResult, optimize_parts
    from .runtime.placeholders import drop_placeholders
    from .runtime.search import TuneResult, tune
    from .runtime.segments import count_units, identifiers, segments_of, slots_of, words
    from .runtime.session import session
    from .runtime.vocabulary import DynamicBatch, DynamicVocabulary
    from .runtime.vocabulary_merges import BatchMerges, CutWords, MergeList
    from .runtime.vocabulary_predictors import Pieces, TrainedPredictor

__version__ = "0.1.0"

# Public name -> the module that defines it. "" as the attribute: the module itself.
_HOMES: dict[str, tuple[str, str]] = {
    "optimize": (".runtime.api", "optimize"),
    "export_onnx": (".runtime.api", "export_onnx"),
    "export_mlir": (".runtime.mlir", "export_mlir"),
    "compile_iree": (".runtime.iree", "compile_iree"),
    "run_iree": (".runtime.iree", "run_iree"),
    "Result": (".runtime.api", "Result"),
    "optimize_parts": (".runtime.parts", "optimize_parts"),
    "PartsResult": (".runtime.parts", "PartsResult"),
    "drop_placeholders": (".runtime.placeholders", "drop_placeholders"),
    "Generator": (".runtime.generate", "Generator"),
    "Generation": (".runtime.generate", "Generation"),
    "DiffusionGenerator": (".runtime.diffusion", "DiffusionGenerator"),
    "DiffusionGeneration": (".runtime.diffusion", "DiffusionGeneration"),
    "session": (".runtime.session", "session"),
    "tune": (".runtime.search", "tune"),
    "TuneResult": (".runtime.search", "TuneResult"),
    "DynamicVocabulary": (".runtime.vocabulary", "DynamicVocabulary"),
    "DynamicBatch": (".runtime.vocabulary", "DynamicBatch"),
    "MergeList": (".runtime.vocabulary_merges", "MergeList"),
    "CutWords": (".runtime.vocabulary_merges", "CutWords"),
    "BatchMerges": (".runtime.vocabulary_merges", "BatchMerges"),
    "Pieces": (".runtime.vocabulary_predictors", "Pieces"),
    "TrainedPredictor": (".runtime.vocabulary_predictors", "TrainedPredictor"),
    "segments_of": (".runtime.segments", "segments_of"),
    "slots_of": (".runtime.segments", "slots_of"),
    "count_units": (".runtime.segments", "count_units"),
    "identifiers": (".runtime.segments", "identifiers"),
    "words": (".runtime.segments", "words"),
    "ElisionError": (".passes.errors", "ElisionError"),
    "Refused": (".passes.errors", "Refused"),
    "NothingMatched": (".passes.errors", "NothingMatched"),
    "PipelineError": (".passes.errors", "PipelineError"),
    "ModelFileError": (".passes.errors", "ModelFileError"),
    "VerificationError": (".passes.errors", "VerificationError"),
    "Pass": (".passes.base", "Pass"),
    "PassContext": (".passes.base", "PassContext"),
    "Outcome": (".passes.base", "Outcome"),
    "NoOptions": (".passes.base", "NoOptions"),
    "register": (".passes.base", "register"),
    "known_passes": (".passes.base", "known_passes"),
    "parse": (".passes.pipeline", "parse"),
    "format": (".passes.pipeline", "format"),
    "Graph": (".passes.ir.graph", "Graph"),
    "Knob": (".passes.tunable", "Knob"),
    "GateController": (".passes.gate_control", "GateController"),
    "testing": (".testing", ""),
}

__all__ = [
    "BatchMerges",
    "CutWords",
    "DiffusionGeneration",
    "DiffusionGenerator",
    "DynamicBatch",
    "DynamicVocabulary",
    "ElisionError",
    "GateController",
    "Generation",
    "Generator",
    "Graph",
    "Knob",
    "MergeList",
    "ModelFileError",
    "NoOptions",
    "NothingMatched",
    "Outcome",
    "PartsResult",
    "Pass",
    "PassContext",
    "Pieces",
    "PipelineError",
    "Refused",
    "Result",
    "TrainedPredictor",
    "TuneResult",
    "VerificationError",
    "__version__",
    "compile_iree",
    "count_units",
    "drop_placeholders",
    "export_mlir",
    "export_onnx",
    "format",
    "identifiers",
    "known_passes",
    "optimize",
    "optimize_parts",
    "parse",
    "register",
    "run_iree",
    "segments_of",
    "session",
    "slots_of",
    "testing",
    "tune",
    "words",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'elision' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    loaded = importlib.import_module(module, __name__)
    value = getattr(loaded, attribute) if attribute else loaded
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
