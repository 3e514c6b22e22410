"""From a bidirectional model to the two graphs of its canvas: export, passes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..passes.base import PassContext
from ..passes.ir.graph import Graph
from ..passes.pipeline import parse
from .lm_compile import Formats, Tell, Wanted, quantizing, run, with_largest
from .table import table_for


@dataclass
class Pair:
    """step, refresh: the two graphs of the pass `window`, lowered. notes: what the passes had to say."""

    step: Graph
    refresh: Graph
    notes: list[str] = field(default_factory=list)


def pair(
    graph: Graph, wanted: Wanted, capacity: int, formats: Formats, samples: list[np.ndarray], tell: Tell
) -> Pair:
    """The two graphs of a plain graph from token ids to logits. samples: ids [1, S] that weights of few bits are chosen
    by. Raises Refused or NothingMatched where tokens meet in another way than by attention of all to all."""
    context = PassContext(
        force=True,
        target="onnxruntime" if graph.host == "onnx" else "torch",
        table=table_for(graph.host),
        samples=[[item] for item in samples] if samples and len(graph.inputs) == 1 else None,
        formats=formats.known,
    )
    first = ["normalise"] if graph.host == "onnx" else []
    report = run(
        graph,
        parse(",".join([*first, *quantizing(wanted, formats), f"window{{capacity={capacity}}}"])),
        context,
        tell,
    )
    notes = [f"{single.name}: {note}" for single in report.passes for note in single.notes]
    refresh = report.passes[-1].extra["refresh"]
    made = []
    for part in (report.graph, refresh):
        scored = run(part, parse("keep-rows,fix-rows"), context, tell).graph
        lowered = run(with_largest(scored, context, tell, notes, spread=True), parse("lower"), context, tell)
        notes += [f"{single.name}: {note}" for single in lowered.passes for note in single.notes]
        made.append(lowered.graph)
    return Pair(*made, notes=list(dict.fromkeys(notes)))
