"""Token spaces: which axes are tokens, which attentions work on them, and the stream those write to.

The type of an attention's query axis is a token space. From it follow the blocks (attention and the residual
addition that takes its result), the batch axis, the protected tokens at either end, where the space is born
and where it ends. Nothing here looks at a name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from ..errors import NothingMatched
from ..ir.graph import Dim, Graph, Op, Value
from .axes import AxisType, AxisTypes, Size
from .flow import FLOAT_INPUT, Flow, is_float
from .signatures import by_position

Ends = tuple[int, int]
"""(tokens before, tokens after) of an interval of a token space; (0, 0) is the whole space."""

TRANSPARENT = frozenset(
    {"elementwise", "linear", "matmul", "norm", "transpose", "reshape", "tie", "expand", "select", "slice"}
    | {"concat", "split", "unbind", "stack", "conv", "spatial", "reduce"}
)


@dataclass(eq=False)
class Block:
    """One self-attention of a space and the residual addition its result goes into."""

    attention: Op
    add: Op | None = None
    skip: Value | None = None  # the operand of `add` that bypasses the attention
    problem: str = ""  # why the residual addition was not found


@dataclass(eq=False)
class TokenSpace:
    """One token axis of the model. `length` may be symbolic; `prefix` and `suffix` count protected tokens."""

    key: AxisType
    length: Dim
    batch: AxisType
    blocks: list[Block] = field(default_factory=list)
    reads: list[Op] = field(default_factory=list)  # attentions whose queries are these tokens, keys others
    read_by: list[Op] = field(default_factory=list)  # attentions whose keys are these tokens, queries others
    intervals: dict[AxisType, Ends] = field(default_factory=dict)
    prefix: int = 0
    suffix: int = 0
    protected_because: list[str] = field(default_factory=list)
    birth: Op | None = None
    ends: list[str] = field(default_factory=list)
    stream: Value | None = None  # the first value of the residual stream

    @property
    def cross(self) -> list[Op]:
        return self.reads + self.read_by


class Analysis:
    """Everything the passes ask about a graph. Holds for the graph as it was when built."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.axes = AxisTypes(graph)
        self.flow = Flow(graph)

    @cached_property
    def spaces(self) -> list[TokenSpace]:
        """Token spaces in order of their first attention."""
        found: dict[AxisType, TokenSpace] = {}
        attentions = [op for op in self.graph.ops if is_attention(op)]
        for op in attentions:
            q, k = op.inputs[0], op.inputs[1]
            assert q is not None and k is not None
            if q.shape is None or k.shape is None or q.rank < 3:
                continue
            mine, theirs = self.axes.type(q, q.rank - 2), self.axes.type(k, k.rank - 2)
            for value, kind in ((q, mine), (k, theirs)):
                if kind and kind not in found and value.shape is not None:
                    found[kind] = TokenSpace(kind, value.shape[-2], self.axes.type(q, 0))
            if mine == theirs and mine:
                found[mine].blocks.append(self._block(op))
            else:
                if mine:
                    found[mine].reads.append(op)
                if theirs:
                    found[theirs].read_by.append(op)
        for space in found.values():
            self._complete(space)
        return list(found.values())

    # ---- queries -------------------------------------------------------------------------------------
    def token_axes(self, space: TokenSpace, value: Value) -> list[tuple[int, Ends]]:
        """The axes of `value` that run over the space, each with the protected ends it leaves out."""
        if value.shape is None:
            return []
        found = []
        for axis, kind in enumerate(self.axes.types(value)):
            if kind == space.key:
                found.append((axis, (0, 0)))
            elif kind and kind in space.intervals:
                start, stop = space.intervals[kind]
                if start <= space.prefix and stop <= space.suffix:
                    found.append((axis, (start, stop)))
        return found

    def batch_axis(self, space: TokenSpace, value: Value) -> int | None:
        """The axis of `value` that is the space's batch; None when it has none (or the batch is 1)."""
        if not space.batch:
            return None
        for axis, kind in enumerate(self.axes.types(value)):
            if kind == space.batch:
                return axis
        return None

    def is_content(self, space: TokenSpace, value: Value) -> bool:
        """True when the rows of `value` are features of the tokens, not positions, ids or masks."""
        if not is_float(value):
            return False
        if self.flow.comes_from(value) & FLOAT_INPUT:
            return True
        return space.stream is not None and self.flow.depends(value, space.stream)

    def grid(self, space: TokenSpace) -> tuple[int, int] | None:
        """(height, width) when the space is a product of two static axes."""
        sizes = self.axes.lengths_of(space.key)
        if len(sizes) != 2 or any(a != b for a, b in sizes):
            return None
        return sizes[0][0], sizes[1][0]

    # ---- building ------------------------------------------------------------------------------------
    def _block(self, attention: Op) -> Block:
        """Follow the attention's result to the addition of a value that bypassed the attention."""
        q, k = attention.inputs[0], attention.inputs[1]
        assert q is not None and k is not None
        seen = {attention.output}
        queue = [attention.output]
        problem = "its result reaches no residual addition"
        for _ in range(64):
            if not queue:
                break
            queue.sort(key=lambda v: self.flow.position.get(v.producer, -1) if v.producer else -1)
            value = queue.pop(0)
            for op in self.flow.after(value):
                skip = self._skip(op, value, attention)
                if skip is not None and (self.flow.depends(q, skip) or self.flow.depends(k, skip)):
                    return Block(attention, op, skip)
                if op.kind in TRANSPARENT or by_position(op):
                    for out in op.outputs:
                        if out not in seen:
                            seen.add(out)
                            queue.append(out)
                else:
                    problem = f"its result goes into {op.target} (%{op.name}) before any residual addition"
        return Block(attention, problem=problem)

    def _skip(self, op: Op, value: Value, attention: Op) -> Value | None:
        if op.kind != "elementwise" or op.attrs.get("fn") not in ("add", "residual_add"):
            return None
        others = [v for v in op.inputs if v is not None and v is not value]
        if len(others) != 1 or others[0].shape is None or others[0].rank != op.output.rank:
            return None
        other = others[0]
        if other.producer is None or self.flow.depends(other, attention.output):
            return other if other.origin == "input" else None
        return other

    def _complete(self, space: TokenSpace) -> None:
        for block in space.blocks:
            if block.skip is not None:
                space.stream = block.skip
                break
        space.birth = self._birth(space)
        for value in self.graph.values():
            if value.shape is None:
                continue
            for axis, kind in enumerate(self.axes.types(value)):
                if kind == space.key:
                    for part, (start, stop) in self.axes.intervals_of(value, axis).items():
                        if part and start[0] == start[1] and stop[0] == stop[1]:
                            space.intervals.setdefault(part, (start[0], stop[0]))
                    break
        protect(self, space)
        space.ends = list(endings(self, space))

    def _birth(self, space: TokenSpace) -> Op | None:
        for op in self.graph.ops:
            if any(self.flow.comes_from(out) for out in op.outputs) and any(
                space.key in self.axes.types(out) for out in op.outputs if out.shape is not None
            ):
                return op
        return None


def analyse(graph: Graph) -> Analysis:
    """Axis types, data flow and token spaces of `graph`."""
    return Analysis(graph)


def is_attention(op: Op) -> bool:
    if op.kind != "elision":
        return op.kind == "attention"
    name = op.target.split(".")[-1].split("::")[-1]
    return name.startswith("attention") and not name.startswith("attention_rows")


def protect(analysis: Analysis, space: TokenSpace) -> None:
    """Count the tokens at either end that must keep their place, with the reason for each.

    Two sources: parameters concatenated in front of or behind the content (class, distillation, register
    tokens), and positions that the rest of the graph picks out of the space or leaves out of it."""
    limit = space.length // 2 if isinstance(space.length, int) else 64
    for op in analysis.graph.ops:
        if op.kind == "concat" and space.key in _axis_types(analysis, op.output, op.attrs["axis"]):
            _protect_joined(analysis, space, op, limit)
        elif op.kind in ("select", "slice", "split"):
            x = op.operand(0)
            if x is None or x.shape is None or not analysis.flow.comes_from(x):
                continue
            if analysis.axes.type(x, op.attrs["axis"]) == space.key:
                _protect_picked(analysis, space, op, limit)


def _axis_types(analysis: Analysis, value: Value, axis: int) -> list[AxisType]:
    return [] if value.shape is None else [analysis.axes.type(value, axis)]


def _grow(space: TokenSpace, prefix: int, suffix: int, limit: Dim, reason: str) -> None:
    if prefix + suffix > limit or (prefix <= space.prefix and suffix <= space.suffix):
        return
    space.prefix, space.suffix = max(prefix, space.prefix), max(suffix, space.suffix)
    space.protected_because.append(reason)


def _protect_joined(analysis: Analysis, space: TokenSpace, op: Op, limit: Dim) -> None:
    axis = op.attrs["axis"]
    parts = [v for v in op.inputs if v is not None and v.shape is not None]
    lengths = [v.shape[axis] if v.shape is not None else 0 for v in parts]
    plain = [not analysis.flow.comes_from(v) for v in parts]
    if all(plain) or len(parts) != len(op.inputs):
        return
    prefix = suffix = 0
    for length, is_plain in zip(lengths, plain):
        if not is_plain or not isinstance(length, int):
            break
        prefix += length
    for length, is_plain in zip(reversed(lengths), reversed(plain)):
        if not is_plain or not isinstance(length, int):
            break
        suffix += length
    _grow(space, prefix, suffix, limit, f"{op.target} (%{op.name}) joins learned tokens to the content")


def _protect_picked(analysis: Analysis, space: TokenSpace, op: Op, limit: Dim) -> None:
    if op.kind == "select":
        index = op.attrs["index"]
        if not isinstance(index, int):
            return
        length = space.length
        if index < 0:
            _grow(space, 0, -index, limit, f"{op.target} (%{op.name}) picks token {index}")
        elif isinstance(length, int) and index >= length - 2 and index > 2:
            _grow(space, 0, length - index, limit, f"{op.target} (%{op.name}) picks token {index}")
        elif index < 16:
            _grow(space, index + 1, 0, limit, f"{op.target} (%{op.name}) picks token {index}")
        return
    total = analysis.axes.lengths.size(space.length)
    for start, stop in part_bounds(analysis, op):
        taken = total[0] - start[0] - stop[0]
        if isinstance(limit, int) and total[0] == total[1] and start[0] > limit >= stop[0] + taken:
            _grow(space, 0, stop[0] + taken, limit, f"{op.target} (%{op.name}) picks the last tokens")
        elif start[0] == start[1] and stop[0] == stop[1]:  # all but a fixed number at either end
            _grow(space, start[0], stop[0], limit, f"{op.target} (%{op.name}) leaves tokens at the ends out")
        elif start == (0, 0) and total[0] - stop[0] == total[1] - stop[1]:
            _grow(space, total[0] - stop[0], 0, limit, f"{op.target} (%{op.name}) picks the first tokens")


def part_bounds(analysis: Analysis, op: Op) -> Iterator[tuple[Size, Size]]:
    """(positions before, positions after) each output of a slice or split."""
    x, axis = op.inputs[0], op.attrs["axis"]
    if x is None or x.shape is None or op.attrs.get("step", 1) != 1:
        return
    sizes = analysis.axes.lengths
    total = sizes.size(x.shape[axis])
    start: Size = (0, 0)
    if op.kind == "slice":
        bound = op.attrs["start"]
        if isinstance(bound, Value):
            return
        start = sizes.size(bound or 0)
        if start[0] < 0:
            start = (total[0] + start[0], total[1] + start[1])
    for out in op.outputs:
        if out.shape is None:
            return
        length = sizes.size(out.shape[axis])
        yield start, (total[0] - start[0] - length[0], total[1] - start[1] - length[1])
        start = (start[0] + length[0], start[1] + length[1])


def endings(analysis: Analysis, space: TokenSpace) -> Iterator[str]:
    """Where content leaves the space, one sentence each."""
    seen: set[str] = set()
    for op in analysis.graph.ops:
        for value in op.inputs:
            if value is None or value.shape is None or not analysis.flow.comes_from(value):
                continue
            if not analysis.token_axes(space, value):
                continue
            if any(analysis.token_axes(space, out) for out in op.outputs):
                continue
            what = {
                "select": f"picks token {op.attrs.get('index')}",
                "reduce": f"takes the {op.attrs.get('fn')} over the tokens",
                "reshape": "gives the tokens another shape",
                "conv": "convolves over the tokens",
                "gather": "picks tokens by computed position",
                "attention": "is read by other queries",
                "size": "",
                "slice": "",
            }.get(op.kind, "uses the tokens up")
            sentence = f"{op.target} (%{op.name}) {what}"
            if what and sentence not in seen:
                seen.add(sentence)
                yield sentence
    for index, value in enumerate(analysis.graph.outputs):
        if analysis.token_axes(space, value):
            yield f"output {index} (%{value.name}) has one row per token"


def no_attention(analysis: Analysis, who: str) -> NothingMatched:
    """What the pass `who` says of a graph in which no tokens attend to each other."""
    graph = analysis.graph
    return NothingMatched(
        f"{who} found no self-attention over tokens "
        f"({len(graph.ops_of('attention'))} attention ops among {len(graph.ops)} operations)"
    )
