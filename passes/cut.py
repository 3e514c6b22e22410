"""Cutting a token space: after a value gets fewer tokens, everything that meets it is repaired by role.

One walk over the operations in order. Each op is asked which of its operands run over the token space and at
which level they are; lower operands are lifted to the highest level, an op that uses the token axis up (a
convolution, a reshape to a grid, an output) gets the original tokens back, a mean over the tokens becomes a
mean weighted by size, an attention gets the sizes of its keys. What the walk does not know it refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from .analysis import signatures
from .analysis.flow import is_float
from .analysis.spaces import Analysis, Ends, TokenSpace, part_bounds
from .cut_maps import WHOLE, Crossing, Level
from .cut_whole import counted_sums, leading_out, stream_values
from .errors import Refused
from .ir.graph import Graph, Op, Value

Mismatch = Literal["lift", "restore"]

Part = tuple[int, int]
"""(start, end) as in a Python slice; an end of 0 is the end of the axis."""

MEANS = frozenset({"mean", "sum"})


class Cutter:
    """Walks a graph once, calling `cut_at` after ops and repairing what follows.

    `mismatch`: when features of two levels meet, "lift" the lower (the stream stays short) or "restore" the
    higher (the stream stays whole, only a sub-layer is short). `proportional`: later attentions add the
    logarithm of the size to the logits of each key (Bolya et al. 2023, eq. 1). `renumber`: tables of positions give
    their first rows, not those of the kept tokens. `short_outputs`: outputs have a row for every token that is left."""

    def __init__(
        self,
        graph: Graph,
        analysis: Analysis,
        space: TokenSpace,
        *,
        mismatch: Mismatch,
        proportional: bool,
        renumber: bool = False,
        short_outputs: bool = False,
        null_key: bool = False,
    ) -> None:
        self.graph = graph
        self.analysis = analysis
        self.space = space
        self.mismatch: Mismatch = mismatch
        self.proportional = proportional
        self.short_outputs = short_outputs
        self.null_key = null_key
        self.crossing = Crossing(graph, analysis, space, renumber=renumber)
        self.keys: dict[Op, Value] = {}  # the key operand of each attention as it is now
        self._end: Op | None = None  # what makes the end of the stream that dropped tokens rest in
        self._leading_out: set[Op] = set()
        self._counted = counted_sums(analysis, space)
        self._whole: dict[tuple[int, Ends], Value] = {}  # (axis, ends) -> a value whose axis is still whole
        # Lengths change in place during the walk: what depends on them is read before it.
        found = {op: self._protected_part(op) for op in graph.ops_of("select", "slice", "split")}
        self._bounds: dict[Op, list[Part]] = {op: parts for op, parts in found.items() if parts is not None}

    def walk(self, after: dict[Op, Callable[[Op], None]]) -> None:
        """Visit all ops; right after op `o` was repaired, call `after[o](o)`."""
        for op in list(self.graph.ops):
            self._visit(op)
            self.crossing.cursor = self._replaced_by(op)
            for out in op.outputs:
                if self.crossing.level(out) is self.crossing.ground:
                    for place in self.analysis.token_axes(self.space, out):
                        self._whole.setdefault(place, self.crossing.current(out))
            if op in after:
                after[op](op)
        self._outputs()

    def add_level(self, value: Value, level: Level, slot: Value, keep: Value, source: Value) -> Level:
        """Cut at `value` (at `level`): merge it with a new map. Returns the new level."""
        attrs = self._token_axis(value)
        inputs = [self.crossing.current(value), level.size, slot, keep, source]
        merged, size = self.crossing.insert("merge_tokens", inputs, attrs)
        return self._level(value, merged, Level(0, level, 0, size, slot, keep, source))

    def drop_level(self, value: Value, level: Level, made: list[Value], *, guard: bool = True) -> Level:
        """Cut at `value` (at `level`): leave tokens out. `made` are slot, keep, source, size and fits of
        `drop_tokens`; guard: samples that do not fit become NaN. Returns the new level."""
        slot, keep, source, size, fits = made
        if level.size is not None:
            raise Refused(f"%{value.name}: tokens that were merged before cannot be dropped")
        attrs = self._token_axis(value)
        x = self.crossing.insert(
            "select_tokens", [self.crossing.current(value), keep], {**attrs, "rank": value.rank}
        )[0]
        if guard:
            x = self.crossing.insert("guard_rows", [x, fits], {"batch_axis": max(attrs["batch_axis"], 0)})[0]
        return self._level(value, x, Level(0, level, 0, size, slot, keep, source, drops=True))

    def weigh_level(self, value: Value, level: Level, size: Value) -> Level:
        """From `value` (at `level`) on the tokens, all still there, have the sizes `size`. Returns the new level."""
        if level.size is not None:
            raise Refused(f"%{value.name}: tokens that were merged before cannot be weighed")
        self._token_axis(value)
        new = Level(len(self.crossing.levels), level, level.length, size)
        self.crossing.levels.append(new)
        self.crossing.put(value, new, self.crossing.current(value))
        return new

    def rest_at(self, value: Value) -> None:
        """Let dropped tokens keep the rows that they have at `value`, where all are asked for: in the stream behind
        it, and from its end on in what leads to outputs of every token, which is then computed for all."""
        found = stream_values(self.analysis, self.space, value)
        self.crossing.stale = dict.fromkeys(found, self.crossing.current(value))
        if found:
            end = max(found, key=lambda v: self.analysis.flow.position[v.producer])  # type: ignore[index]
            self._end = end.producer
            self._leading_out = leading_out(self.analysis, self.space, end)

    def segment_level(
        self, value: Value, level: Level, made: list[Value], query: Value | None, *, guard: bool
    ) -> Level:
        """Cut at `value` (at `level`): tokens of one unit become one. `made` are slot, keep, size, used and fits of
        `segment_tokens`; `query` [C] makes their mean a weighted one. guard: samples that do not fit become NaN.
        Returns the new level."""
        slot, keep, size, used, fits = made
        if level.size is not None:
            raise Refused(f"%{value.name}: tokens that were merged before cannot be merged by units")
        attrs = self._token_axis(value)
        x = self.crossing.current(value)
        weight = None
        if query is not None:
            weight = self.crossing.insert("segment_weights", [x, query, slot], attrs)[0]
        y = self.crossing.insert("merge_segments", [x, weight, slot, keep], attrs)[0]
        if guard:
            y = self.crossing.insert("guard_rows", [y, fits], {"batch_axis": max(attrs["batch_axis"], 0)})[0]
        keys = size if self.proportional else used
        return self._level(value, y, Level(0, level, 0, size, slot, keep, weight=weight, keys=keys))

    def _token_axis(self, value: Value) -> dict[str, int]:
        axes = self.analysis.token_axes(self.space, value)
        if len(axes) != 1 or axes[0][1] != WHOLE:
            raise Refused(f"%{value.name} has no axis that is the token axis of the space")
        batch = self.analysis.batch_axis(self.space, value)
        return {"axis": axes[0][0], "batch_axis": -1 if batch is None else batch}

    def _level(self, value: Value, stands: Value, new: Level) -> Level:
        """Enter a new level, of which `stands` is what `value` is there."""
        assert new.keep is not None and new.keep.shape is not None
        new.number, new.length = len(self.crossing.levels), new.keep.shape[-1]
        self.crossing.levels.append(new)
        self.crossing.put(value, new, stands)
        return new

    # ---- one op --------------------------------------------------------------------------------------
    def _tokens(self, value: Value | None) -> list[tuple[int, Ends]]:
        return [] if value is None else self.analysis.token_axes(self.space, value)

    def _replaced_by(self, op: Op) -> Op:
        """The last op that belongs to `op` now: what replaced it, or itself."""
        cursor, ops = self.crossing.cursor, self.graph.ops
        if cursor is not None and ops.index(cursor) > ops.index(op):
            return cursor
        return op

    def _visit(self, op: Op) -> None:
        ground = self.crossing.ground
        original = list(op.inputs)
        if op in self._leading_out:
            self._for_all(op)
        if op in self._counted and self._count(op):
            return
        tokens = [v for v in original if v is not None and self._tokens(v)]
        levels = [self.crossing.level(v) for v in tokens]
        target = max(levels, key=lambda level: level.number, default=ground)
        if op.kind == "attention" and op.inputs[1] is not None:
            self.keys[op] = op.inputs[1]
        if target is ground:
            self._rewire(op, original, ground)
            return
        if op.kind == "size":
            self._measure(op)
            return
        if op.kind in ("unknown", "elision") and not signatures.by_position(op):
            name = tokens[levels.index(target)].name
            raise Refused(
                f"{op.target} (%{op.name}) reads %{name}, whose tokens are cut, and has no known role"
            )
        if self.mismatch == "restore" and self._features_differ(tokens):
            target = ground
        if target is not ground and self._pool(op, target):
            return
        if target is not ground and op in self._bounds and self._parts(op, tokens[0], target):
            return
        if target is not ground and not self._passes(op, original):
            self._not_again(op, target)
            target = ground
        self._rewire(op, original, target)
        if target is ground:
            return
        if op.kind == "attention":
            self._attend(op, original, target)
            return
        self._stretch(op, original, target)
        for out in op.outputs:
            if self._tokens(out):
                self.crossing.put(out, target)

    def _for_all(self, op: Op) -> None:
        """What `op` makes of all tokens, beside what it will make of those that are left."""
        crossing = self.crossing
        if crossing.level(self._end_value()) is crossing.ground:
            return
        inputs: list[Value | None] = [
            v if v is None else crossing.restored(v) if self._tokens(v) else crossing.current(v)
            for v in op.inputs
        ]
        position = {other: index for index, other in enumerate(self.graph.ops)}
        made_by = [v.producer for v in inputs if v is not None and v.producer is not None]
        if crossing.cursor is not None:
            made_by.append(crossing.cursor)
        last = max(made_by, key=lambda one: position[one])
        for out, new in zip(op.outputs, self.graph.repeat(op, inputs, after=last)):
            crossing.keep_whole(out, new)
        crossing.cursor = self.graph.ops[self.graph.ops.index(last) + 1]

    def _end_value(self) -> Value:
        assert self._end is not None
        return self._end.output

    def _count(self, op: Op) -> bool:
        """A sum of weights over tokens of which some are gone: those that are left, as often as they count."""
        level = self.crossing.levels[-1]
        return level.loses and self.crossing.level(op.inputs[0]) is not level and self._pool(op, level)  # type: ignore[arg-type]

    def _not_again(self, op: Op, level: Level) -> None:
        """Merged tokens come back as copies; of dropped ones nothing is left that could be computed with."""
        tokens = [v for v in op.inputs if v is not None and self._tokens(v)]
        if any(step.drops for step in level.chain()) and not all(map(self.crossing.is_whole, tokens)):
            raise Refused(
                f"{op.target} (%{op.name}) needs all {self.space.length} tokens, of which some are gone"
            )

    def _rewire(self, op: Op, original: list[Value | None], level: Level) -> None:
        """Let every operand be what stands for it at `level`."""
        changed = False
        for index, value in enumerate(original):
            if value is None:
                continue
            new = self.crossing.get(value, level, op) if self._tokens(value) else self.crossing.current(value)
            if new is not value:
                self.graph.set_operand(op, index, new)
                changed = True
        if changed and level is self.crossing.ground:
            self.graph.refresh(op)

    def _features_differ(self, tokens: list[Value]) -> bool:
        """True when features of different levels meet."""
        content = {self.crossing.level(v).number for v in tokens if self.analysis.is_content(self.space, v)}
        return len(content) > 1

    def _passes(self, op: Op, original: list[Value | None]) -> bool:
        """True when `op` treats the tokens one by one: every token axis of an operand goes on to an output."""
        if op.kind == "attention":
            return True
        groups = signatures.groups(op)
        outputs = set(op.outputs)
        through = {port for group in groups for port in group if any(v in outputs for v, _ in group)}
        for index, value in enumerate(original):
            for axis, ends in self._tokens(value):
                assert value is not None
                if not self._axis_passes(op, index, (value, axis), ends, through):
                    return False
        return True

    def _axis_passes(
        self, op: Op, index: int, port: tuple[Value, int], ends: Ends, through: set[tuple[Value, int]]
    ) -> bool:
        axis = port[1]
        if op.kind in ("select", "slice", "split") and op.attrs["axis"] == axis:
            return op in self._bounds and self._counts_from_start(op)
        if op.kind == "reshape":
            batch = self.analysis.batch_axis(self.space, port[0])
            folded = batch is not None and self.analysis.batch_axis(self.space, op.output) is None
            if folded and not self._unfolds(op.output):
                return False
            return any(e == ends for _, e in self._tokens(op.output))
        if op.kind == "concat" and op.attrs["axis"] == axis:
            return any(a == axis for a, _ in self._tokens(op.output))
        if op.kind == "softmax" and op.attrs["axis"] == axis:
            return False
        if op.kind in ("norm", "spatial", "scatter") and axis in op.attrs.get("axes", ()):
            return False
        return port in through

    def _unfolds(self, value: Value) -> bool:
        """True when a value that lost its batch axis (to heads, say) gets it back before it meets another value."""
        waiting, seen = [value], {value}
        while waiting:
            for op, _ in waiting.pop().users:
                alone = sum(v is not None and bool(self._tokens(v)) for v in op.inputs) == 1
                if op.kind not in ("reshape", "transpose", "tie", "elementwise") or not alone:
                    return False
                if self.analysis.batch_axis(self.space, op.output) is None and op.output not in seen:
                    seen.add(op.output)
                    waiting.append(op.output)
        return not seen & set(self.graph.outputs)

    def _protected_part(self, op: Op) -> list[Part] | None:
        """The parts that an op takes out of the tokens, when a cut does not move their ends; else None."""
        x, axis = op.inputs[0], op.attrs["axis"]
        places = dict(self._tokens(x))
        if x is None or x.shape is None or axis not in places:
            return None
        ends = places[axis]
        prefix, suffix = self.space.prefix - ends[0], self.space.suffix - ends[1]
        length = x.shape[axis]
        if op.kind == "select":
            index = op.attrs["index"]
            if not isinstance(index, int):
                return None
            if isinstance(length, int) and 0 <= length - index <= suffix:
                index -= length
            inside = 0 <= index < prefix or -suffix <= index < 0
            return [(index, index + 1)] if inside else None
        if op.attrs.get("step", 1) != 1:
            return None
        total = self.analysis.axes.lengths.size(length)
        parts: list[Part] = []
        for start, stop in part_bounds(self.analysis, op):
            taken = (total[0] - start[0] - stop[0], total[1] - start[1] - stop[1])
            if start[0] == start[1] <= prefix and stop[0] == stop[1] <= suffix:
                parts.append((start[0], -stop[0]))
            elif start[0] == start[1] and taken[0] == taken[1] and start[0] + taken[0] <= prefix:
                parts.append((start[0], start[0] + taken[0]))
            elif stop[0] == stop[1] and taken[0] == taken[1] and stop[0] + taken[0] <= suffix:
                parts.append((-stop[0] - taken[0], -stop[0]))
            else:
                return None
        return parts or None

    def _counts_from_start(self, op: Op) -> bool:
        """True when the op as it stands takes the same tokens whatever is removed behind the first ones."""
        if op.kind == "split":
            return False
        first, end = self._bounds[op][0]
        if op.kind == "select":
            return first >= 0
        return first >= 0 and (op.attrs.get("end") is None if end == 0 else end > 0)

    def _parts(self, op: Op, value: Value, level: Level) -> bool:
        """Protected tokens, or all but those, are taken from the reduced tokens by their distance to the ends."""
        axis, parts = op.attrs["axis"], self._bounds[op]
        if axis not in dict(self._tokens(value)) or self._counts_from_start(op):
            return False
        x = self.crossing.current(value)
        for out, (start, end) in zip(op.outputs, parts):
            attrs = {"axis": axis, "start": start, "end": end, "keepdim": op.kind != "select"}
            made = self.crossing.insert("slice_tokens", [x], attrs)[0]
            self.crossing.put(out, level if self._tokens(out) else self.crossing.ground, made)
        return True

    # ---- repairs -------------------------------------------------------------------------------------
    def _pool(self, op: Op, level: Level) -> bool:
        """A mean or sum over the tokens becomes one over the original tokens."""
        value = op.inputs[0]
        if op.kind != "reduce" or op.attrs.get("fn") not in MEANS or value is None or not is_float(value):
            return False
        axes = self._tokens(value)
        if len(axes) != 1 or tuple(op.attrs["axes"]) != (axes[0][0],):
            return False
        axis, ends = axes[0]
        batch = self.analysis.batch_axis(self.space, value)
        size = self.crossing.size_of(level, ends)
        if size is None or (self.space.batch and batch is None):
            return False
        attrs = {
            "axis": axis,
            "batch_axis": -1 if batch is None else batch,
            "keepdim": bool(op.attrs["keepdim"]),
            "mode": op.attrs["fn"],
        }
        x = self.crossing.get(value, level, op)
        pooled = self.crossing.insert("pool_tokens", [x, size], attrs)[0]
        self.crossing.put(op.output, self.crossing.ground, pooled)
        return True

    def _attend(self, op: Op, original: list[Value | None], level: Level) -> None:
        """An attention over reduced tokens: the sizes of the keys go into the logits."""
        q, k, v = op.inputs[:3]
        assert q is not None and k is not None
        self.keys[op] = k
        out_level = level if self._tokens(op.output) else self.crossing.ground
        size = level.keys or (level.size if self.proportional else None)
        if size is None or not self._tokens(original[1]):
            self.graph.refresh(op)
            self._check(op, out_level)
            self.crossing.put(op.output, out_level)
            return
        if op.attrs.get("softcap"):
            raise Refused(
                f"{op.target} (%{op.name}) caps its scores, so that sizes of tokens cannot go into them"
            )
        scale = op.attrs.get("scale")
        attrs = {"scale": float(scale) if scale else 0.0, "causal": bool(op.attrs.get("causal", False))}
        self.crossing.cursor = op
        made = self.crossing.insert("attention", self._with_null(op, [q, k, v, op.operand(3), size]), attrs)[
            0
        ]
        self.crossing.put(op.output, out_level, made)

    def _with_null(self, op: Op, operands: list[Value | None]) -> list[Value | None]:
        """The operands of an attention with one more key and value of zeros, which adds 1 to the denominator."""
        if not self.null_key:
            return operands
        if op.attrs.get("causal"):
            raise Refused(
                f"{op.target} (%{op.name}) is causal: its queries would not see a key behind the last"
            )
        q, k, v, mask, size = operands
        assert k is not None and v is not None and k.shape is not None

        def pad(x: Value, axis: int, value: float) -> Value:
            return self.crossing.insert("pad_tokens", [x], {"axis": axis, "value": value})[0]

        if mask is not None:
            if mask.shape is None or mask.shape[-1] != k.shape[-2]:
                raise Refused(f"%{mask.name} says nothing of single keys, one more of which softmax1 needs")
            mask = pad(mask, mask.rank - 1, 1.0 if mask.dtype == "bool" else 0.0)
        assert size is not None
        return [q, pad(k, k.rank - 2, 0.0), pad(v, v.rank - 2, 0.0), mask, pad(size, 1, 1.0)]

    def _stretch(self, op: Op, original: list[Value | None], level: Level) -> None:
        """Give a reshape or expand its new length, then recompute shapes and compare with what must come out."""
        if op.kind in ("reshape", "expand"):
            like, places = op.inputs[0], self._tokens(original[0])
            for axis, ends in self._tokens(op.output):
                own = next((a for a, e in places if e == ends), None)
                if like is None or own is None:
                    raise Refused(f"{op.target} (%{op.name}) widens %{op.output.name} over cut tokens")
                self.graph.set_length(op, axis, like, own)
        self.graph.refresh(op)
        self._check(op, level)

    def _check(self, op: Op, level: Level) -> None:
        for out in op.outputs:
            for axis, ends in self._tokens(out):
                want = self.crossing.length(level, ends)
                have = None if out.shape is None else out.shape[axis]
                size = self.analysis.axes.lengths.size
                if have is None or size(have) != size(want):
                    raise Refused(
                        f"{op.target} (%{op.name}) makes %{out.name} with {have} tokens where {want} are left"
                    )

    def _measure(self, op: Op) -> None:
        """Lengths that the graph reads as data keep meaning the original number of tokens."""
        value, axis = op.inputs[0], op.attrs["axis"]
        assert value is not None
        ends = dict(self._tokens(value)).get(axis)
        if ends is None:
            self.graph.set_operand(op, 0, self.crossing.current(value))
            return
        whole = self._whole.get((axis, ends))
        if whole is None:
            raise Refused(
                f"{op.target} (%{op.name}) reads the number of tokens of %{value.name}, which is cut"
            )
        self.graph.set_operand(op, 0, whole)

    def _outputs(self) -> None:
        """Outputs have a row for every original token."""
        self.crossing.cursor = self.graph.ops[-1]
        for index, value in enumerate(list(self.graph.outputs)):
            if self.short_outputs or self.crossing.level(value) is self.crossing.ground:
                new = self.crossing.current(value)
            else:
                new = self.crossing.restored(value)
            if new is not value:
                self.graph.replace_output(index, new)
