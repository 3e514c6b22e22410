"""Token maps of a graph that is being cut, and the two ways across a cut: lifting and restoring.

Level 0 is the token space as it was. Every cut adds a level above the one it starts from. A value that must
meet values of a higher level is *lifted* by its role (features are merged with the map, everything else takes
the rows of the kept tokens); a value that must meet the original tokens is *restored*. A level may drop tokens instead
of merging them: then features, too, are the rows of the kept tokens. And one may leave all tokens where they are and
only weigh them: it has sizes and no map.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .analysis.flow import is_float
from .analysis.spaces import Analysis, Ends, TokenSpace
from .cut_early import EarlyCut
from .errors import Refused
from .ir.graph import Dim, Graph, Op, Value

WHOLE: Ends = (0, 0)

Layout = tuple[int, int]
"""(rank, batch axis) that a value takes on to meet the other operands of an op."""

OWN: Layout = (0, 0)


@dataclass(eq=False)
class Level:
    """One level of the token space: the map that made it, and how many tokens each slot stands for.

    slot [B, N], keep [B, N'] and source [B, N-N'] int32; size [B, N'] float32, None where every size is 1. `drops`:
    what is not kept is gone (slot -1). Without a map the level has all tokens of the one below. With a map but no
    `source` it is one of units (`segment_tokens`): a slot's mean is of all tokens that have it, by `weight` [B, N]
    float32 where that is given. `keys` [B, N'] stands for the sizes in attentions."""

    number: int
    parent: Level | None
    length: Dim
    size: Value | None = None
    slot: Value | None = None
    keep: Value | None = None
    source: Value | None = None
    drops: bool = False
    weight: Value | None = None
    keys: Value | None = None
    composed: Value | None = None  # slot from level 0, made on demand
    shifted: dict[tuple[Ends, bool], list[Value]] = field(default_factory=dict)
    sizes: dict[Ends, Value] = field(default_factory=dict)
    weights: dict[Ends, Value] = field(default_factory=dict)

    @property
    def segments(self) -> bool:
        """Whether its slots are units of the level below."""
        return self.mapped and self.source is None

    def shared_source(self) -> Value:
        """`source`; where there is none `keep`, for ops that move all three."""
        found = self.source or self.keep
        assert found is not None
        return found

    @property
    def mapped(self) -> bool:
        """False where tokens are only weighed."""
        return self.keep is not None

    @property
    def loses(self) -> bool:
        """True when its sizes do not add up to the tokens that there were."""
        return self.parent is not None and (self.drops or not self.mapped)

    def chain(self) -> list[Level]:
        """The levels from just above level 0 to this one."""
        found: list[Level] = []
        level: Level | None = self
        while level is not None and level.parent is not None:
            found.append(level)
            level = level.parent
        return found[::-1]


class Crossing:
    """Values at several levels. `current(value)` is what stands for an original value now, at its own level."""

    def __init__(
        self, graph: Graph, analysis: Analysis, space: TokenSpace, *, renumber: bool = False
    ) -> None:
        self.graph = graph
        self.analysis = analysis
        self.space = space
        self.renumber = renumber  # tables of positions give their first rows, not those of the kept tokens
        self.levels = [Level(0, None, space.length)]
        self.at: dict[Value, Level] = {}
        self._variants: dict[tuple[Value, int, Layout], Value] = {}
        self._firsts: dict[tuple[object, ...], Value] = {}
        self._early = EarlyCut(self)
        self.stale: dict[Value, Value] | None = None
        """What dropped tokens read in a restored value, for each value that can be; None: zeros, in any."""
        self.statistics: dict[str, int] = {}
        self.cursor: Op | None = None  # what is inserted goes right after it

    # ---- levels --------------------------------------------------------------------------------------
    @property
    def ground(self) -> Level:
        return self.levels[0]

    def level(self, value: Value) -> Level:
        return self.at.get(value, self.ground)

    def length(self, level: Level, ends: Ends) -> Dim:
        return level.length - ends[0] - ends[1]

    def put(self, value: Value, level: Level, stands: Value | None = None) -> None:
        """From now on the original `value` lives at `level`, as `stands` when that is another value."""
        self.at[value] = level
        if stands is not None:
            self._variants[(value, level.number, OWN)] = stands

    def current(self, value: Value) -> Value:
        return self._variants.get((value, self.level(value).number, OWN), value)

    def count(self, what: str) -> None:
        self.statistics[what] = self.statistics.get(what, 0) + 1

    # ---- maps ----------------------------------------------------------------------------------------
    def map_of(self, level: Level, ends: Ends) -> list[Value]:
        """[slot, keep, source] of the step onto `level`, for the interval `ends` of the space."""
        assert level.slot is not None and level.keep is not None
        source = level.shared_source()
        if ends == WHOLE:
            return [level.slot, level.keep, source]
        key = (ends, False)
        if key not in level.shifted:
            attrs = {"start": ends[0], "stop": ends[1]}
            level.shifted[key] = self.insert("shift_map", [level.slot, level.keep, source], attrs)
        return level.shifted[key]

    def size_of(self, level: Level, ends: Ends) -> Value | None:
        return self._part(level.size, ends, level.sizes)

    def _part(self, numbers: Value | None, ends: Ends, known: dict[Ends, Value]) -> Value | None:
        """A number for each token of the interval `ends` of the space."""
        if numbers is None or ends == WHOLE:
            return numbers
        if ends not in known:
            known[ends] = self.insert("range_size", [numbers], {"start": ends[0], "stop": ends[1]})[0]
        return known[ends]

    def composed_slot(self, level: Level, ends: Ends) -> Value:
        """Slot at `level` of every original token, [B, N] int32."""
        if level.composed is None:
            chain = [step for step in level.chain() if step.mapped]
            below = chain[-2] if len(chain) > 1 else None
            if below is None:
                level.composed = level.slot
            else:
                first = self.composed_slot(below, WHOLE)
                level.composed = self.insert("compose_slots", [first, level.slot], {})[0]
        assert level.composed is not None
        if ends == WHOLE:
            return level.composed
        key = (ends, True)
        if key not in level.shifted:
            attrs = {"start": ends[0], "stop": ends[1]}
            level.shifted[key] = self.insert(
                "shift_map", [level.composed, level.keep, level.shared_source()], attrs
            )
        return level.shifted[key][0]

    def insert(self, op: str, inputs: list[Value | None], attrs: dict[str, Any]) -> list[Value]:
        self.count(op)
        outputs = self.graph.insert(op, inputs, attrs, after=self.cursor)
        self.cursor = outputs[0].producer
        return outputs

    # ---- across --------------------------------------------------------------------------------------
    def get(self, value: Value, level: Level, op: Op) -> Value:
        """`value`, an operand of `op`, at `level`; made at the cursor if it does not exist yet."""
        mine = self.level(value)
        if mine is level or not self.analysis.token_axes(self.space, value):
            return self.current(value)
        layout = self._layout(value, op)
        if level is self.ground:
            return self.restored(value)
        layout = self._layout(value, op)
        if mine in [self.ground, *level.chain()]:
            return self._lifted(value, self.current(value), mine, level, op, layout)
        return self._lifted(value, self.restored(value), self.ground, level, op, layout)

    def _layout(self, value: Value, op: Op) -> Layout:
        """The rank and batch axis that `value` must have to meet the other operands of `op`."""
        own = self.analysis.batch_axis(self.space, value)
        if own is not None or not self.space.batch:
            return value.rank, -1 if own is None else own
        if op.kind == "attention":
            q = op.inputs[0]
            assert q is not None
            return q.rank, 0
        for out in op.outputs:
            axis = self.analysis.batch_axis(self.space, out)
            if axis is None or op.kind != "elementwise":
                continue
            if out.rank - axis <= value.rank:
                return value.rank, axis - (out.rank - value.rank)
            return out.rank, axis
        raise Refused(
            f"%{value.name} has no batch axis, and {op.target} (%{op.name}) does not say where one would go"
        )

    def _lifted(
        self, value: Value, stands: Value, mine: Level, level: Level, op: Op, layout: Layout
    ) -> Value:
        axes = self.analysis.token_axes(self.space, value)
        features = len(axes) == 1 and self.analysis.is_content(self.space, value)
        mask = op.kind == "attention" and op.operand(3) is value
        features = features and not mask
        if features and self.space.batch and self.analysis.batch_axis(self.space, value) is None:
            raise Refused(
                f"{op.target} (%{op.name}) reads %{value.name}, features of the tokens that have no batch axis"
            )
        chain = level.chain()
        steps = [s for s in (chain[chain.index(mine) + 1 :] if mine in chain else chain) if s.mapped]
        first = value
        if steps and mine is self.ground and stands is value:
            first = self._first(value)
            early = None if features else self._early.made(first, steps, layout)
            if early is not None:
                return early
        for step in steps:
            key = (first, step.number, layout)
            if key not in self._variants:
                crossed = self._merged if features and not step.drops else self.selected
                if self.renumber and not features and not mask and len(axes) == 1 and is_float(value):
                    crossed = self._renumbered
                    if self.analysis.flow.comes_from(value):
                        raise Refused(
                            f"%{value.name} tells positions and is made of an input: positions=compact cannot "
                            "renumber it"
                        )
                self._variants[key] = crossed(stands, axes, step, value.rank, layout)
            stands = self._variants[key]
        return stands

    def _first(self, value: Value) -> Value:
        """The first value that was asked for and chooses by the same condition between the same values: an exporter
        writes the mask out in each layer, and taking its rows once is enough."""
        op = value.producer
        if op is None or op.kind != "elementwise" or op.attrs.get("fn") != "where" or len(op.inputs) != 3:
            return value
        parts: list[object] = [value.dtype, value.shape]
        for operand in op.inputs:
            number = None if operand is None or not self.graph.is_constant(operand) else operand.shape
            array = (
                self.graph.constant_value(operand) if operand is not None and number in ((), (1,)) else None
            )
            parts.append(operand if array is None else (str(array.dtype), array.tobytes()))
        return self._firsts.setdefault(tuple(parts), value)

    def _merged(
        self, x: Value, axes: list[tuple[int, Ends]], step: Level, own_rank: int, layout: Layout
    ) -> Value:
        """Features across one cut: the mean of each slot, weighted by size."""
        assert step.parent is not None
        axis, ends = axes[0]
        attrs = {"axis": axis, "batch_axis": layout[1]}
        if step.segments:
            weight = self._part(step.weight, ends, step.weights)
            return self.insert("merge_segments", [x, weight, *self.map_of(step, ends)[:2]], attrs)[0]
        size = self.size_of(step.parent, ends)
        return self.insert("merge_tokens", [x, size, *self.map_of(step, ends)], attrs)[0]

    def selected(
        self, x: Value, axes: list[tuple[int, Ends]], step: Level, own_rank: int, layout: Layout
    ) -> Value:
        """Positions, masks, ids and pairwise biases across one cut: the rows of the kept tokens; of units, where a mask
        says of each pair of tokens whether they may, whether any of theirs may."""
        rank, batch_axis = layout
        pairs = step.segments and len(axes) > 1 and x.dtype == "bool"
        for axis, ends in axes:
            slot, keep, _ = self.map_of(step, ends)
            attrs = {"axis": axis + rank - own_rank, "rank": rank, "batch_axis": batch_axis}
            x = self.insert(
                "any_tokens" if pairs else "select_tokens", [x, slot, keep] if pairs else [x, keep], attrs
            )[0]
        return x

    def _renumbered(
        self, x: Value, axes: list[tuple[int, Ends]], step: Level, own_rank: int, layout: Layout
    ) -> Value:
        """A table of positions across one cut: its first rows, as if the kept tokens were all there had been."""
        assert step.parent is not None and x.shape is not None
        axis = axes[0][0] + x.rank - own_rank
        gone = step.parent.length - step.length
        attrs = {"axis": axis, "start": 0, "end": -int(gone)}
        return self.insert("slice_tokens", [x], attrs)[0]

    def keep_whole(self, value: Value, stands: Value) -> None:
        """`stands` is `value` with a row for every original token."""
        self._variants[(value, 0, OWN)] = stands

    def is_whole(self, value: Value) -> bool:
        """True when all rows of `value` are there, or can be had without making any up."""
        return (
            self.level(value) is self.ground
            or (value, 0, OWN) in self._variants
            or (self.stale is not None and value in self.stale)
        )

    def restored(self, value: Value) -> Value:
        """`value` with a row for every original token: each takes the row of its slot."""
        key = (value, 0, OWN)
        found = self._variants.get(key)
        if found is None:
            level = self.level(value)
            found = self.current(value)
            if not any(step.mapped for step in level.chain()):
                return found
            base = None if self.stale is None else self.stale.get(value)
            if self.stale is not None and base is None and any(step.drops for step in level.chain()):
                raise Refused(
                    f"%{value.name} has a row for every token, and what a deleted token has there is not known"
                )
            batch = self.analysis.batch_axis(self.space, value)
            if self.space.batch and batch is None:
                raise Refused(f"%{value.name} must be restored to all tokens and has no batch axis")
            for axis, ends in self.analysis.token_axes(self.space, value):
                slot = self.composed_slot(level, ends)
                attrs = {"axis": axis, "batch_axis": -1 if batch is None else batch}
                if base is None:
                    found = self.insert("restore_tokens", [found, slot], attrs)[0]
                else:
                    found = self.insert("blend_tokens", [found, slot, base], attrs)[0]
            self._variants[key] = found
        return found
