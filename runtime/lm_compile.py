"""From a model to its step graph, in either host: export, passes, prelude."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..passes.base import Pass, PassContext
from ..passes.errors import ElisionError, Refused
from ..passes.image_ids import ROWS
from ..passes.ir.graph import Graph
from ..passes.pipeline import parse
from .lm_facts import Facts
from .lm_images import ImageFacts
from .lm_source import Source
from .lm_step import LARGEST
from .table import table_for

CONTEXT = 2048
"""Positions of the cache where nothing else is said; fewer where the model has fewer."""

SAMPLES, SAMPLE_LENGTH = 12, 256
"""How much of the calibration text is run through the model before weights are rounded."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What a user can say about compilation. bits: None keeps the formats of a quantized file, or float32. group,
    method, head_bits: as in the pass `quantize`. key_scores: with the outputs of the pass `key-scores`.
    skip: the part of its layers that is left out (pass `skip-layers`). taps: hidden states that are put out (pass
    `taps`: "last", or numbers of layers), "" for none. drop: of a vision-language model, what leaves tokens of pictures
    out ("token-drop{policy=hired budget=0.2}"), "" for nothing."""

    bits: int | None = None
    runtime: str = "onnxruntime"
    context: int | None = None
    group: int = 32
    method: str = "auto"
    head_bits: int | None = None
    key_scores: bool = False
    skip: float = 0.0
    taps: str = ""
    drop: str = ""

    def __post_init__(self) -> None:
        """Raises ElisionError for values that mean nothing."""
        if self.bits not in (None, 4, 8, 16, 32):
            raise ElisionError(f"bits is 4, 8, 16 or 32, not {self.bits}")
        if self.runtime not in ("onnxruntime", "torch"):
            raise ElisionError(f"runtime is onnxruntime or torch, not {self.runtime!r}")
        if self.context is not None and self.context < 2:
            raise ElisionError(f"a context has 2 positions or more, not {self.context}")
        if not 0 <= self.skip < 1:
            raise ElisionError(f"the part of layers to skip is at least 0 and less than 1, not {self.skip}")

    def capacity(self, facts: Facts) -> int:
        """Slots of the cache. Raises ElisionError for more positions than the model has."""
        if self.context is None:
            return min(CONTEXT, facts.positions or CONTEXT)
        if facts.positions is not None and self.context > facts.positions:
            raise ElisionError(
                f"a context of {self.context} is asked for, the model has {facts.positions} positions"
            )
        return self.context

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Formats:
    """The quantized matrices of a file, for the pass `quantize`. counts: how many there are of each type."""

    known: Any = None
    counts: dict[str, int] = field(default_factory=dict)


@dataclass
class Compiled:
    """graph: the step graph. prelude: what computes its cross.j inputs, of an encoder-decoder. example: an example of
    what the prelude reads, by name. notes: what the passes had to say."""

    graph: Graph
    prelude: Graph | None = None
    example: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def plain_graph(
    module: Any, runtime: str, tell: Tell, images: Mapping[str, Any] | None = None
) -> tuple[Graph, dict[str, np.ndarray]]:
    """A transformers model as a graph of ids (and `images`) to logits, and an example of its inputs. Raises
    ElisionError."""
    from .lm_export import plain_causal_graph

    tell("tracing the model")
    program = plain_causal_graph(module, images=images)
    example = {name: item.numpy() for name, item in (program.example_inputs or ((), {}))[1].items()}
    if runtime == "torch":
        from ..passes.ir.fx import FxGraph

        return FxGraph.from_export(program), example
    import torch

    from ..passes.ir.onnx import OnnxGraph
    from .api import quietly

    tell("exporting to ONNX")
    with quietly("the model cannot be exported to ONNX"), torch.no_grad():
        # Guards are checked where a program is called; some are written in terms that only Dynamo knows.
        program._guards_code = []
        exported = torch.onnx.export(program, dynamo=True, verbose=False, output_names=["logits"])
    if exported is None:
        raise ElisionError("torch.onnx.export gave no model")
    return OnnxGraph(exported.model), example


def step_graph(
    graph: Graph,
    wanted: Wanted,
    capacity: int,
    formats: Formats,
    samples: list[np.ndarray],
    tell: Tell,
    example: dict[str, np.ndarray] | None = None,
    images: ImageFacts | None = None,
) -> Compiled:
    """The step graph of a plain graph. samples: token ids [1, S] that weights of few bits are chosen by. images: what
    `lm_vision.parted` says of a graph with rows of pictures.

    Raises Refused or NothingMatched where the graph is not that of a causal language model."""
    todo = pipeline(wanted, capacity, formats, images)
    if graph.host == "onnx":
        todo = [*parse("normalise"), *todo]
    beside: list[Any] = (
        [] if images is None else [np.zeros((1, images.width), np.float32)]
    )  # no text's ids read it
    inputs = [value.name for value in graph.inputs]
    if samples and inputs != ["input_ids", *([ROWS] if images is not None else [])]:
        samples = []  # other inputs would have to be made up
    context = PassContext(
        force=True,
        target="onnxruntime" if graph.host == "onnx" else "torch",
        table=table_for(graph.host),
        samples=[[item, *beside] for item in samples] or None,
        formats=formats.known,
    )
    report = run(graph, todo, context, tell)
    if images is not None:
        check_positions(report.graph, images)
    found = [single.extra["prelude"] for single in report.passes if single.extra.get("prelude") is not None]
    prelude = run(found[0], parse("lower"), context, tell).graph if found else None
    notes = [f"{single.name}: {note}" for single in report.passes for note in single.notes]
    rows = with_largest(report.graph, context, tell, notes)
    lowered = run(rows, parse("lower"), context, tell)
    notes += [f"{single.name}: {note}" for single in lowered.passes for note in single.notes]
    return Compiled(lowered.graph, prelude, _source_of(example or {}, prelude), notes)


def check_positions(graph: Graph, images: ImageFacts) -> None:
    """Raises Refused where tokens that keep their positions while others are left out would be seen wrongly."""
    if images.compact or images.kept == images.rows:
        return
    for op in graph.ops:
        if op.target == "elision.cached_attention" and (op.attrs["window"] or op.operand(8) is not None):
            what = "a window" if op.attrs["window"] else "a bias by distance"
            raise Refused(
                f"{op.target} (%{op.name}) has {what}, which counts tokens: say positions=compact where some of an "
                "image's are left out"
            )


def with_largest(
    graph: Graph, context: PassContext, tell: Tell, notes: list[str], spread: bool = False
) -> Graph:
    """The step graph with the largest scores of every kept row as outputs `values` and `indices` (with `spread`, as the
    pass `head` has it), and all scores only of the rows that a new input `ask` names. Where something stands behind the
    head's product (a cap, a scale), which could make ties of scores that differ, the graph stays and a note says so:
    scores are then read whole."""
    width = graph.outputs[0].shape[-1] if graph.outputs[0].shape else None
    k = min(LARGEST, width) if isinstance(width, int) else LARGEST
    more = " spread=true" if spread else ""
    try:
        return run(
            graph, parse(f"head{{k={k} beside=true{more}}},keep-rows{{name=ask}}"), context, tell
        ).graph
    except Refused as reason:
        notes.append(f"head: {reason}")
        return graph


def run(graph: Graph, passes: list[Pass], context: PassContext, tell: Tell) -> Any:
    from ..passes.manager import run_pipeline

    def progress(index: int, count: int, single: Pass) -> None:
        tell(f"pass {index + 1} of {count}: {single.name}")

    return run_pipeline(graph, passes, context=context, progress=progress)


def pipeline(wanted: Wanted, capacity: int, formats: Formats, images: ImageFacts | None = None) -> list[Pass]:
    """What comes before the head and lowering. Weights are rounded in the plain graph, which sample texts run through
    as they are."""
    text = [f"skip-layers{{share={wanted.skip}}}"] if wanted.skip else []
    text += quantizing(wanted, formats)
    reach = "" if images is None else f" reach={images.reach}"
    text += [f"incremental{{capacity={capacity}{reach}}}", *(["key-scores"] if wanted.key_scores else [])]
    text += [f'taps{{where="{wanted.taps}"}}'] if wanted.taps else []
    text += ["keep-rows", "fix-rows"]
    return parse(",".join(text))


def quantizing(wanted: Wanted, formats: Formats) -> list[str]:
    """The pass that makes the weights what is wanted, [] where they stay."""
    bits = wanted.bits if wanted.bits is not None else 8 if formats.counts else 32
    if bits == 32:
        return []
    head = "" if wanted.head_bits is None else f" head_bits={wanted.head_bits}"
    return [f"quantize{{bits={bits} group={wanted.group} method={wanted.method}{head}}}"]


def _source_of(example: dict[str, np.ndarray], prelude: Graph | None) -> dict[str, np.ndarray]:
    names = [] if prelude is None else prelude.input_names
    return {name: array for name, array in example.items() if name in names}


# ---- weights that are quantized already ------------------------------------------------------------------
def formats_of(source: Source, wanted: Wanted, kept: list[Any], tell: Tell) -> Formats:
    """The quantized matrices of a GGUF file, or `kept`, those of a checkpoint; only those of the width that is asked
    for, where one is. Raises ModelFileError for a type that cannot be read."""
    if wanted.bits in (16, 32):
        return Formats()
    from ..passes.formats import SourceFormats

    if source.kind != "gguf":
        own = [item for item in kept if wanted.bits in (None, item.bits)]
        return Formats(SourceFormats(own), {f"{item.bits} bits": len(own) for item in own[:1]})
    from ..passes.formats.gguf import import_blocks
    from .lm_gguf import read

    tell("reading the file's own formats")
    contents = read(source.path)
    known, counts = SourceFormats(), Counter()
    for entry in contents.quantized():
        if len(entry.shape) != 2:
            continue
        made = import_blocks(entry.kind, contents.blocks(entry), entry.name)
        # A table or head of 8 bits is what 4 bits ask for as well.
        table = entry.name in ("token_embd.weight", "output.weight")
        if made is not None and (wanted.bits in (None, made.bits) or (table and made.bits == 8)):
            known.add(made)
            counts[entry.kind] += 1
    return Formats(known, dict(counts))


def samples_for(wanted: Wanted, tokenizer: Any, vocabulary: int, capacity: int) -> list[np.ndarray]:
    """Token ids of the calibration text, [] where nothing is to be calibrated."""
    if wanted.bits not in (4, 8) or wanted.method in ("rtn", "mse") or tokenizer is None:
        return []
    file = Path(__file__).parent / "data" / "calibration.txt"
    ids = np.asarray(tokenizer(file.read_text(encoding="utf-8"))["input_ids"], np.int64)
    ids = ids[ids < vocabulary]
    length = min(SAMPLE_LENGTH, capacity)
    pieces = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    step = max(1, len(pieces) // SAMPLES)
    return [piece[None] for piece in pieces[::step][:SAMPLES]]
