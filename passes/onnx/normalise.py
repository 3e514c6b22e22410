"""Normalising: whatever exporter wrote a file, what comes out is one dialect of ONNX.

Opset 23 (the first with Attention and RMSNormalization), functions inlined except our own, constants folded, shapes
plain, and the blocks of a transformer as one operator each. The function that the model computes stays the
same; operators that are not recognised stay as they were, with the reason in the report.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import version_converter

from ..errors import ModelFileError
from ..ir.onnx_shapes import ShapeEnv
from . import contrib, fold, plain, plain_bfloat, plain_masks, raise_attention, raise_norms
from .surgery import Editor

OPSET = 23
STRAY = "elision.stray"
"""Where operators that the model's operator set does not have wait while the rest is converted."""


@dataclass
class NormaliseReport:
    """What normalising did. `rules`: how often each rule fired; `near_misses`: what almost matched, and why not."""

    opset_before: int
    opset_after: int
    nodes_before: int
    nodes_after: int
    rules: dict[str, int] = field(default_factory=dict)
    near_misses: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def attentions(self) -> int:
        return self.rules.get("Attention", 0)

    def lines(self) -> list[str]:
        """The report as text, one fact a line."""
        head = f"{self.nodes_before} nodes of opset {self.opset_before} -> {self.nodes_after} of {self.opset_after}"
        return [head, *(f"{name}: {n}" for name, n in self.rules.items()), *self.near_misses, *self.notes]


def normalise(model: ir.Model) -> NormaliseReport:
    """Bring `model` to the canonical form, in place. Raises ModelFileError when the model is not consistent."""
    started = time.perf_counter()
    before = model.opset_imports.get("", 0)
    report = NormaliseReport(before, before, count_nodes(model), 0)
    step(model, lambda: common.RemoveInitializersFromInputsPass()(model), "weights that are inputs too")
    step(model, lambda: inline(model), "inlining functions")
    convert(model, report)
    step(
        model,
        lambda: common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model),
        "constants",
    )
    ed = Editor(model, ShapeEnv(model).run())
    step(model, lambda: rewrite(ed), "rewriting")
    report.opset_after = model.opset_imports.get("", 0)
    report.rules, report.near_misses = ed.counts, unique(ed.near_misses)
    report.nodes_after = count_nodes(model)
    report.seconds = time.perf_counter() - started
    return report


def rewrite(ed: Editor) -> None:
    """All rules, cheap ones first; folding again where raising made new constants."""
    if ed.model.opset_imports.get("", 0) < OPSET:
        ed.near_misses.append("nothing raised: the model could not be brought to a newer operator set")
        return
    contrib.unpack(ed)
    fold_all(ed)
    share(ed)
    plain.simplify(ed)
    plain_bfloat.widen(ed)
    raise_norms.raise_norms(ed)
    raise_norms.raise_gelu(ed)
    raise_attention.raise_attention(ed)
    plain_masks.simplify_masks(ed)
    fold_all(ed)
    share(ed)
    tidy(ed)


def fold_all(ed: Editor) -> None:
    """Fold until nothing changes: a folded value may be the last unknown of a shape, and that of a constant."""
    for _ in range(6):
        before = dict(ed.counts)
        fold.fold_shapes(ed)
        fold.plain_sizes(ed)
        fold.fold_constants(ed)
        fold.remove_idle(ed)
        ed.sweep()
        if ed.counts == before:
            return
        ed.env.run()  # lengths that hung on a value which now is a constant


def share(ed: Editor) -> None:
    """Equal subexpressions once: Shape nodes above all."""
    common.CommonSubexpressionEliminationPass()(ed.model)
    ed.sweep()


def tidy(ed: Editor) -> None:
    """Names for nameless nodes, unique ones for all; the inputs and outputs of the model untouched."""
    common.RemoveUnusedFunctionsPass()(ed.model)
    common.RemoveUnusedOpsetsPass()(ed.model)
    seen: set[str] = set()
    for index, node in enumerate(ed.graph):
        if not node.name or node.name in seen:
            node.name = ed.node_name(node.name or f"{node.op_type}_{index}")
        seen.add(node.name)


def count_nodes(model: ir.Model) -> int:
    return sum(1 for node in model.graph if node.op_type != "Constant")


def unique(lines: list[str]) -> list[str]:
    return list(dict.fromkeys(lines))


def step(model: ir.Model, action: Callable[[], object], what: str) -> None:
    """Run one step; what breaks it is a fact about the file, told in one line."""
    try:
        action()
    except ModelFileError:
        raise
    except Exception as error:
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelFileError(f"the model cannot be normalised ({what}: {text[:200]})") from error


def inline(model: ir.Model) -> None:
    """Inline every model-local function but those of our own dialect."""
    if any(f.domain != "elision" for f in model.functions.values()):
        common.InlinePass(criteria=lambda function: function.domain != "elision")(model)
        common.RemoveUnusedFunctionsPass()(model)


def convert(model: ir.Model, report: NormaliseReport) -> None:
    """Bring the standard domain to OPSET; a model that cannot be converted stays what it is, with a note."""
    if "ai.onnx" in model.opset_imports:
        model.opset_imports.setdefault("", model.opset_imports.pop("ai.onnx"))
    version = model.opset_imports.get("", 0)
    if version == 0:
        model.opset_imports[""] = OPSET
    if version >= OPSET or version == 0:
        return
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)  # the converter tells at warning level that it uses onnx's own one
    clone = model.clone()
    strays = [node for node in clone.graph.all_nodes() if is_stray(node, version)]
    for node in strays:
        node.domain = STRAY  # the converter knows nothing of them, and leaves other domains alone
    if strays:
        clone.opset_imports[STRAY] = 1
    # The converter writes functions into the graph; those of our dialect must stay operators.
    ours = {key: clone.functions.pop(key) for key in list(clone.functions) if key[0] == "elision"}
    try:
        version_converter.convert_version(clone, OPSET, fallback=True)
    except Exception as error:
        report.notes.append(f"opset {version} kept: {str(error).splitlines()[0][:160]}")
        return
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
    for key, function in ours.items():
        function.opset_imports[""] = OPSET  # bodies mean the same in every operator set from 18 on
        clone.functions[key] = function
    for node in clone.graph.all_nodes():
        if node.domain == STRAY:
            node.domain = ""
    clone.opset_imports.pop(STRAY, None)
    if clone.opset_imports.get("", 0) == OPSET:
        adopt(model, clone)
    else:
        report.notes.append(f"opset {version} kept: no converter to {OPSET} for one of its operators")


def is_stray(node: ir.Node, version: int) -> bool:
    """An operator under the standard domain that the standard has only later, or not at all: onnxruntime, saving
    a graph that it has optimised, writes such files."""
    return node.domain == "" and not onnx.defs.has(node.op_type, version, "")


def adopt(model: ir.Model, other: ir.Model) -> None:
    """Let `model` hold the graph of `other`, so that callers keep their object."""
    model.graph = other.graph
    model.functions.clear()
    for function in other.functions.values():
        model.functions[function.identifier()] = function
    model.ir_version = max(model.ir_version or 10, 10)
