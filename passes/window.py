"""window: from a plain bidirectional graph to a pair that computes only what moves.

A masked diffusion model decides a canvas of masked tokens step by step, and computes every position at every step.
Most of them hardly move (Window-Diffusion; Fast-dLLM, Wu et al. 2025; dKV-Cache, Ma et al. 2025): their keys and
values are kept for some steps. The *refresh graph* computes positions 0 .. E-1 from their ids and puts out their keys
and values; the *step graph* computes a few rows against a cache of them. Who is refreshed, active and visible, and
when, is no matter of the graphs: a policy says it for every step. The step graph is `incremental`'s, but that every
row sees what it is told to see, before it and behind it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .base import Outcome, PassContext, register
from .errors import PipelineError, Refused
from .incremental import Incremental
from .incremental_operands import Inserter
from .incremental_pairs import read_full
from .incremental_plan import Plan
from .ir.graph import Graph


@dataclass(frozen=True)
class WindowOptions:
    """`window`: undecided tokens that are seen. `active`: those of them that a step computes. `refresh`: steps from
    one refresh to the next (these three are what a sampler does unless it is told otherwise; the graphs are the same).
    `capacity`: slots of every cache, and positions that the tables hold. `ids`, `mask`, `positions`: names of the
    inputs with token ids, their padding mask and their positions (input_ids, attention_mask, position_ids)."""

    window: int = 128
    active: int = 32
    refresh: int = 32
    capacity: int = 2048
    ids: str = ""
    mask: str = ""
    positions: str = ""

    def __post_init__(self) -> None:
        check_window(self.window, self.active, self.refresh)
        if self.capacity < 2:
            raise PipelineError(f"capacity must be at least 2, not {self.capacity}")


def check_window(window: int, active: int, refresh: int) -> None:
    """Raises PipelineError for numbers that no window has."""
    if active < 1:
        raise PipelineError(f"at least 1 token is active, not {active}")
    if refresh < 1:
        raise PipelineError(f"there is a refresh every 1 or more steps, not {refresh}")
    if window < active:
        raise PipelineError(f"a window of {window} tokens has no room for {active} active ones")


@register
class Window(Incremental):
    """Gives a bidirectional graph a key/value cache.

    The graph becomes the step graph: inputs and outputs as of `incremental`, where a row sees the slots that `prefix`
    and `ancestors` list, whatever their positions. `Outcome.extra["refresh"]` is the refresh graph: the inputs of the
    plain graph, batch 1; its outputs, then key.i and value.i [1, heads, E, width] of every attention in order, as the
    caches hold them."""

    name = "window"
    exact = True
    summary = "a few active tokens of a bidirectional model against keys and values kept from earlier steps"
    Options = WindowOptions
    read_rule = staticmethod(read_full)

    def _positions_held(self) -> int:
        return self.options.capacity

    @staticmethod
    def example_rows(count: int) -> list[np.ndarray]:
        prefix = np.tile(np.array([[0, count]], np.int32), (count, 1))
        return [np.arange(count, dtype=np.int32), prefix, np.full((count, 1), -1, np.int32)]

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        """Rewrite in place. Raises NothingMatched without token ids or without an attention among them, Refused
        where tokens meet in another way than by attention of all to all."""
        outcome = super().run(graph, context)
        options: WindowOptions = self.options
        outcome.extra["settings"] = {name: getattr(options, name) for name in ("window", "active", "refresh")}
        return outcome

    def _before(self, graph: Graph, plan: Plan, outcome: Outcome) -> None:
        if plan.cuts:
            raise Refused(f"%{plan.cuts[0].name} depends on an input that holds no tokens of the canvas")
        outcome.extra["refresh"] = refresh_graph(graph, plan)


def refresh_graph(graph: Graph, plan: Plan) -> Graph:
    """A copy of the plain graph that puts out keys and values too."""
    twin = graph.copy()
    ops = dict(zip(graph.ops, twin.ops, strict=True))
    inserter = Inserter(twin)
    outputs = list(zip(twin.output_names, twin.outputs))
    for number, attention in enumerate(plan.attentions):
        inserter.cursor = ops[attention.op]
        own = replace(attention, op=ops[attention.op], inner=[ops[op] for op in attention.inner])
        _, k, v = inserter.operands(own)
        outputs += [(f"key.{number}", k), (f"value.{number}", v)]
    twin.set_signature(list(zip(twin.input_names, twin.inputs)), outputs)
    twin.remove_dead()
    return twin
