"""Merging by units: the tokens of an identifier or a word become one behind a layer of an encoder.

Saad, Li, Sharma and Hassan, "Token merging for code models" (arXiv 2507.14423, 2025): the hidden states of the
sub-tokens of one semantic unit are averaged, or weighed by learned attention, and the rest of the model computes on
fewer tokens. What a unit is comes from outside, as one number a token (`elision.segments_of`), in an input that the
graph gains. `cut.py` repairs everything behind: masks, position tables and relative biases, a decoder's attention to
the shorter memory, outputs with a row for every token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import sympy

from ..kernels.ops.segment_tokens import slots_for
from .analysis.layer_ends import layer_value
from .analysis.masks import causal_because
from .analysis.spaces import Analysis, TokenSpace, analyse, no_attention
from .base import NewSignature, Outcome, Pass, PassContext, as_array, register, same_examples
from .cut import Cutter
from .cut_maps import WHOLE
from .drop_policies import valid_tokens
from .errors import ElisionError, NothingMatched, PipelineError, Refused
from .ir.graph import Dim, Graph, Op, Value
from .options import check_share
from .tunable import Knob
from .writer import Writer


@dataclass(frozen=True)
class SegmentOptions:
    """`layer`: tokens become one behind so many layers, 0 is right behind the embeddings; -1 is behind the last one.
    `strategy`: the mean of a unit's tokens, or a weighted mean by attention to one learned query, which starts as the
    mean. `capacity`: how many slots a sample has, a share of its tokens (up to 1) or a number (2 and more), or
    dynamic: as many as an input `slots` is long. `bucket`: a static capacity is rounded up to a multiple of it.
    `overflow`: of a sample with more units than slots neighbours share a slot, evenly over the sample; or its outputs
    are NaN. `proportional`: a unit counts in attention as often as it has tokens. `input`: the name of the input that
    says which tokens are a unit."""

    layer: int = 0
    strategy: Literal["average", "learned"] = "average"
    capacity: float | Literal["dynamic"] = 0.75
    bucket: int = 1
    overflow: Literal["share", "nan"] = "share"
    proportional: bool = True
    input: str = "segments"

    def __post_init__(self) -> None:
        if isinstance(self.capacity, float):
            check_share("capacity", self.capacity)
        if self.bucket < 1:
            raise PipelineError(f"bucket must be at least 1, not {self.bucket}")
        if not self.input.isidentifier():
            raise PipelineError(f"input must be a name, not {self.input!r}")

    @property
    def dynamic(self) -> bool:
        return self.capacity == "dynamic"

    @property
    def slots(self) -> dict[str, Any]:
        """How `segment_tokens` is told the number of slots."""
        if isinstance(self.capacity, str):
            return {}
        if self.capacity > 1:
            return {"count": int(self.capacity), "bucket": self.bucket}
        return {"ratio": self.capacity, "bucket": self.bucket}


SLOTS = "slots"
"""The input whose length is the number of slots, where that is dynamic."""


@register
class SegmentMerge(Pass):
    """Adds an input int64 [B, N], the number of each token's unit (negative: padding), and lets tokens of equal number
    that follow each other be one from a layer on."""

    name = "segment-merge"
    exact = False
    reduces = True
    summary = "the tokens of an identifier or a word become one (token merging for code models)"
    Options = SegmentOptions

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        """Merge in place. Raises NothingMatched without attention over tokens, Refused where it is not safe."""
        options: SegmentOptions = self.options
        analysis = analyse(graph)
        space = the_space(analysis)
        value, layer = layer_value(analysis, space, options.layer)
        axis, batch_axis = _axes(analysis, space, value)
        for name in self.new_inputs():
            if name in graph.input_names:
                raise Refused(f"the graph has an input called {name!r} already")
        assert value.shape is not None
        length = value.shape[axis]
        ends = {"prefix": space.prefix, "suffix": space.suffix}
        self._check_room(space, length)

        query = None
        if options.strategy == "learned":
            query = graph.insert_parameter(_start(value, axis, batch_axis), f"{options.input}_query")
        causal = causal_because(analysis, space.blocks[0].attention)
        batch: Dim = 1 if batch_axis is None else value.shape[batch_axis]
        examples = _Examples(graph, value, context)
        segments = graph.add_input(options.input, "int64", [batch, length])
        slots = graph.add_input(SLOTS, "int64", ["segment_slots"]) if options.dynamic else None
        write = Writer.behind(graph, [value])
        valid = valid_tokens(write, analysis, space)
        made = write("segment_tokens", [segments, valid, slots], **options.slots, **ends)
        cutter = Cutter(graph, analysis, space, mismatch="lift", proportional=options.proportional)
        crossing = cutter.crossing

        def at(_: Op) -> None:
            level = crossing.level(value)
            cutter.segment_level(value, level, made, query, guard=options.overflow == "nan")

        assert write.cursor is not None
        cutter.walk({write.cursor: at})
        level = crossing.levels[-1]
        outcome = Outcome(changed=True)
        outputs = len(graph.outputs)
        if context.want_map:
            graph.add_output(crossing.composed_slot(level, WHOLE), "elision_token_map")
            outcome.extra["token_map"] = ends
        outcome.statistics.update(crossing.statistics)
        outcome.statistics["removed dead ops"] = graph.remove_dead()
        self._tell(outcome, len(space.blocks), layer, [batch, length, level.length])
        if causal:
            outcome.notes.append(
                f"attention is causal ({causal}): a unit sees the units before it, and its first tokens know its last"
            )
        added = examples.added(axis, batch_axis, None if slots is not None else options.slots, ends)
        if added is None:
            outcome.signature = NewSignature()
            return outcome
        named = dict(zip(self.new_inputs(), added))
        own = {
            name: context.example_of(name, "int64", array.shape if name != SLOTS else [None])
            for name, array in named.items()
        }
        named = {name: array if (one := own[name]) is None else one for name, array in named.items()}
        outcome.signature = same_examples(context, outputs, named)
        units = "neighbours as units, evenly over the tokens"
        if own[options.input] is not None:
            units = f"the units of the given {options.input}"
        outcome.notes.append(f"outputs were compared with {units}")
        return outcome

    def new_inputs(self) -> tuple[str, ...]:
        options: SegmentOptions = self.options
        return (options.input, SLOTS) if options.dynamic else (options.input,)

    def _check_room(self, space: TokenSpace, length: Dim) -> None:
        options: SegmentOptions = self.options
        if options.dynamic or not isinstance(length, int):
            return
        attrs = {"count": -1, "ratio": -1.0, **options.slots}
        left, least = slots_for(length, **attrs), fewest(space)
        if left < min(least, length):
            raise Refused(
                f"capacity leaves {left} slots of {length} tokens, where at least {least} are needed: "
                f"{max(space.prefix, 1)} first and {max(space.suffix, 1)} last units keep slots of their own"
            )

    def _tell(self, outcome: Outcome, layers: int, layer: int, lengths: list[Dim]) -> None:
        options: SegmentOptions = self.options
        batch, length, left = lengths
        more = f", then {SLOTS} int64 [segment_slots], as long as there are slots" if options.dynamic else ""
        outcome.notes.append(
            f"the graph takes {options.input} int64 [{batch}, {length}] behind its other inputs, a number for each "
            f"token{more}"
        )
        where = "right behind the embeddings" if layer == 0 else f"behind layer {layer} of {layers}"
        outcome.notes.append(f"{where} {length} tokens become {left} slots")

    @classmethod
    def tunable(cls, graph: Graph, given: Mapping[str, Any]) -> list[Knob]:
        """The layer, from the last one down to the embeddings."""
        space = the_space(analyse(graph))
        return [Knob("layer", tuple(range(len(space.blocks), -1, -1)))]

    @classmethod
    def applicability(cls, analysis: Analysis) -> list[str]:
        """One sentence: where tokens would become one."""
        try:
            space = the_space(analysis)
            value, _ = layer_value(analysis, space, 0)
            _axes(analysis, space, value)
        except (Refused, NothingMatched) as error:
            return [f"does not apply: {error}"]
        return [f"applies behind any of layers 0 to {len(space.blocks)}, to {space.length} tokens"]


def the_space(analysis: Analysis) -> TokenSpace:
    """The tokens that are merged: those of the only space, or of the encoder that a decoder reads. Raises
    NothingMatched, Refused."""
    spaces = [space for space in analysis.spaces if space.blocks]
    if not spaces:
        raise no_attention(analysis, SegmentMerge.name)
    if len(spaces) > 1:
        sources = [space for space in spaces if space.read_by and not space.reads]
        if len(sources) != 1:
            raise Refused(
                f"the graph has {len(spaces)} token spaces, of which {len(sources)} are read by another: which one "
                "has the units cannot be told"
            )
        spaces = sources
    merged = next((b.attention for b in spaces[0].blocks if b.attention.kind != "attention"), None)
    if merged is not None:
        raise Refused(f"{merged.target} (%{merged.name}) is over tokens that were merged or dropped before")
    return spaces[0]


def fewest(space: TokenSpace) -> int:
    """How many slots there must be: the first and the last units keep their own, and one is for the rest."""
    return max(space.prefix, 1) + max(space.suffix, 1) + 1


def _axes(analysis: Analysis, space: TokenSpace, value: Value) -> tuple[int, int | None]:
    """The token axis and the batch axis of the value to merge. Raises Refused."""
    places = analysis.token_axes(space, value)
    if len(places) != 1 or places[0][1] != WHOLE:
        raise Refused(f"the {space.length} tokens are not one axis of %{value.name}")
    batch = analysis.batch_axis(space, value)
    if space.batch and batch is None:
        raise Refused(f"the attentions have a batch axis that %{value.name} has not")
    return places[0][0], batch


def _start(value: Value, axis: int, batch_axis: int | None) -> np.ndarray:
    """The learned query as it starts: all tokens of a unit weigh alike."""
    assert value.shape is not None
    widths = [d for a, d in enumerate(value.shape) if a not in (axis, batch_axis)]
    if not all(isinstance(d, int) for d in widths):
        raise Refused(f"%{value.name} has features of symbolic width: a query for them cannot be learned")
    return np.zeros(math.prod(int(d) for d in widths), np.float32)  # type: ignore[arg-type]


def _told(graph: Graph, value: Value, arrays: list[Any]) -> tuple[int, ...] | None:
    """The shape of `value` for these inputs, where its lengths are made of theirs."""
    known: dict[sympy.Basic, sympy.Integer] = {}
    for given, array in zip(graph.inputs, arrays):
        lengths = zip(given.shape or (), map(sympy.Integer, array.shape))
        known.update((d, n) for d, n in lengths if isinstance(d, sympy.Symbol))
    dims: list[Any] = [sympy.sympify(d).xreplace(known) for d in value.shape or ()]
    return tuple(int(d) for d in dims) if dims and all(d.is_Integer for d in dims) else None


def _seen(graph: Graph, value: Value, arrays: list[Any]) -> tuple[int, ...]:
    return graph.evaluate([value], dict(zip(graph.inputs, arrays)))[0].shape


class _Examples:
    """Example inputs for the graph with the input more; taken before it is there."""

    def __init__(self, graph: Graph, value: Value, context: PassContext) -> None:
        self.arrays = [as_array(item) for item in context.example_inputs or ()]
        self.shape: tuple[int, ...] | None = None
        matched = len(self.arrays) == len(graph.inputs) and all(a is not None for a in self.arrays)
        if not matched or any(v.dtype == "bfloat16" for v in graph.inputs):
            return
        try:
            self.shape = _told(graph, value, self.arrays) or _seen(graph, value, self.arrays)
        except ElisionError:  # then there is nothing to compare with, and the outcome says so
            self.shape = None

    def added(
        self, axis: int, batch_axis: int | None, slots: dict[str, Any] | None, ends: dict[str, int]
    ) -> list[np.ndarray] | None:
        """Numbers of units that just fill the slots, and `slots` where that is an input; None without examples."""
        if self.shape is None:
            return None
        length, batch = self.shape[axis], 1 if batch_axis is None else self.shape[batch_axis]
        prefix, suffix = ends["prefix"], ends["suffix"]
        inner = length - prefix - suffix
        if slots is None:
            left = prefix + suffix + max(-(-inner // 2), min(inner, 3))
        else:
            left = slots_for(length, **{"count": -1, "ratio": -1.0, **slots})
        room = max(left - prefix - suffix, 1)
        places = np.arange(length)
        middle = prefix + (places - prefix) * room // max(inner, 1)
        number = np.where(
            places < prefix, places, np.where(places < length - suffix, middle, places + length)
        )
        made = [np.broadcast_to(number, (batch, length)).astype(np.int64)]
        return made if slots is not None else [*made, np.arange(left, dtype=np.int64)]
