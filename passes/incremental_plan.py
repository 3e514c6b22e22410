"""What turning a causal graph into one of new rows takes: found first, edited after.

One walk over the operations that have rows. Every operand they read is a row too, or a weight, or comes from a
source (it is cut there and computed once), or from positions: then it is read from a table, or is the same at
every length. Attentions among the rows are put aside, everything else must treat rows one by one.
"""

from __future__ import annotations

import sympy

from .errors import Refused
from .incremental_binding import CONSTANT, POSITION, ROW, SEQUENCE, Bindings
from .incremental_rows import token_axis
from .incremental_scores import Attention, attentions
from .ir.graph import Dim, Graph, Op, Value

# Steps that only give each position's entry another place: a table is cut before them.
_PLACES = frozenset({"reshape", "transpose", "expand", "tie", "embedding", "gather"})
# Kinds whose attributes say lengths that their results show as well.
_SHAPED = frozenset({"reshape", "expand", "split", "size"})
# What a creation may fill rows with, and its attributes that are lengths.
_FILLS = frozenset({"zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"})
_SIZES = frozenset({"size", "shape"})


class LastRows(Exception):
    """A slice that keeps the last rows only: all rows are wanted, so it goes and the graph is read again."""

    def __init__(self, op: Op) -> None:
        super().__init__(op.name)
        self.op = op


class Plan:
    """`attentions` among the rows in graph order; `tables`: values of positions and their token axis; `fixed`:
    values of lengths that must not depend on them; `cuts`: values of the source, in the order they are read;
    `axes`: the token axis of every value that has rows.

    Raises Refused where a row could depend on other rows, LastRows at a slice of the last rows."""

    def __init__(self, graph: Graph, bindings: Bindings, ids: Value) -> None:
        self.graph = graph
        self.bindings = bindings
        self.attentions: list[Attention] = []
        self.tables: dict[Value, int] = {}
        self.fixed: list[Value] = []
        self.cuts: list[Value] = []
        self.axes: dict[Value, int] = {ids: 1}
        inside = attentions(graph, bindings)
        for op in graph.ops:
            if not any(map(bindings.has_rows, op.outputs)):
                continue
            attention = inside.get(op)
            if attention is not None and self._among_rows(attention):
                if op is attention.op:
                    self._attend(attention)
            else:
                self._visit(op)
        self._cut_lengths()
        for value in graph.outputs:
            if bindings.of(value) & POSITION and not bindings.has_rows(value):
                raise Refused(f"the output %{value.name} depends on positions only")
            if bindings.has_rows(value) and value not in self.axes:
                raise Refused(f"the output %{value.name} has no row for every token")

    @property
    def prelude(self) -> list[Value]:
        """`cuts`, where anything is computed from a source; none where all are tables that ids read rows of: they stay
        inputs as they are."""
        return [] if all(map(_is_table, self.cuts)) else self.cuts

    # ---- attentions ----------------------------------------------------------------------------------
    def _among_rows(self, attention: Attention) -> bool:
        return self.bindings.has_rows(attention.q) and any(
            self.bindings.has_rows(v) for v in (attention.k, attention.v)
        )

    def _attend(self, attention: Attention) -> None:
        op = attention.op
        for what, value, axis in (
            ("queries", attention.q, attention.q.rank - 2),
            ("keys", attention.k, attention.k.rank - (1 if attention.turned else 2)),
            ("values", attention.v, attention.v.rank - 2),
        ):
            if self.axes.get(value) != axis:
                raise Refused(
                    f"the {what} %{value.name} of {op.target} (%{op.name}) are not one for every token"
                )
        for mask in attention.masks:
            bits = self.bindings.of(mask.value)
            if bits not in (CONSTANT, POSITION):
                what = "a source" if bits == SEQUENCE else "the token ids"
                raise Refused(f"the mask %{mask.value.name} of {op.target} (%{op.name}) depends on {what}")
        self.attentions.append(attention)
        self.axes[op.output] = op.output.rank - 2

    # ---- everything else -----------------------------------------------------------------------------
    def _visit(self, op: Op) -> None:
        if any(self.bindings.shape_input(v) & ROW for v in op.shape_inputs):
            raise Refused(f"{op.target} (%{op.name}) has a shape that the token ids say")
        if all(out.rank == 0 and out.dtype.startswith("int") for out in op.outputs) and not op.inputs:
            return
        if self._is_length(op):
            return
        axes = [self._operand(op, value) for value in op.inputs]
        if op.kind == "slice" and axes[0] == op.attrs["axis"] and self._keeps_last(op):
            raise LastRows(op)
        axis = self._filled(op) if op.kind == "create" else token_axis(op, axes)
        self._check_attributes(op)
        for out in op.outputs:
            own = self.bindings.token_axes(out)
            if axis is None or not set(own) <= {axis}:
                raise Refused(
                    f"{op.target} (%{op.name}) gives %{out.name} {[str(d) for d in out.shape or ()]}, not one row for "
                    "every token"
                )
            self.axes[out] = axis

    def _filled(self, op: Op) -> int | None:
        """The token axis of a creation: every row the same number."""
        own = self.bindings.token_axes(op.output)
        if op.attrs.get("fn") not in _FILLS or op.output.shape is None:
            raise Refused(
                f"{op.target} (%{op.name}) makes rows that depend on the number of tokens and on a source"
            )
        return own[0] if len(own) == 1 and op.output.shape[own[0]] == self.bindings.length else None

    def _check_attributes(self, op: Op) -> None:
        if op.kind in _SHAPED:
            return
        for name, attribute in op.attrs.items():
            if op.kind == "create" and name in _SIZES:
                continue
            if self.bindings.attribute(attribute) & (POSITION | ROW):
                raise Refused(f"{name} of {op.target} (%{op.name}) depends on the number of tokens")

    def _cut_lengths(self) -> None:
        """Lengths of a source that rows have and that no cut tells, where the tokens of the source became fewer before
        they are cut: the smallest value of that length becomes a cut."""
        told = {dim for cut in self.cuts for dim in cut.shape or ()}
        wanted = {
            dim for value in self.axes for dim in value.shape or () if self.bindings.is_source_length(dim)
        }
        for dim in sorted(wanted - told, key=str):
            values = [
                out
                for op in self.graph.ops
                for out in op.outputs
                if self.bindings.of(out) == SEQUENCE and out.shape is not None and dim in out.shape
            ]
            if values:
                self.cuts.append(min(values, key=lambda value: value.rank))

    def _is_length(self, op: Op) -> bool:
        """Arithmetic on lengths, of tokens and of a source."""
        return all(
            v is None or (v.rank == 0 and not v.dtype.startswith("float") and not self.bindings.of(v) & ~3)
            for v in [*op.inputs, *op.outputs]
        )

    def _operand(self, op: Op, value: Value | None) -> int | None:
        """The token axis of an operand; what is no row is entered as a table, a constant or a cut."""
        if value is None or self.bindings.of(value) == CONSTANT:
            return None
        if value in self.axes:
            return self.axes[value]
        if self.bindings.has_rows(value):
            raise Refused(f"{op.target} (%{op.name}) reads %{value.name}, which has no row for every token")
        if self.bindings.of(value) == SEQUENCE:
            if value not in self.cuts:
                self.cuts.append(value)
            return None
        return self._position(op, value)

    def _position(self, op: Op, value: Value) -> int | None:
        if not self._own_axes(value):
            if value not in self.fixed:
                self.fixed.append(value)
            return None
        if len(self._own_axes(value)) > 1:
            raise Refused(
                f"{op.target} (%{op.name}) reads %{value.name}, which has a number for every two positions, outside "
                "an attention"
            )
        path = self._path(value)
        while True:
            root = path[-1].inputs[_source(path[-1])] if path else value
            assert root is not None
            try:
                return self._placed(root, path)
            except Refused:
                if not path:
                    raise
                path = []

    def _path(self, value: Value) -> list[Op]:
        """The steps from `value` back to where its table is smallest, last step first."""
        path: list[Op] = []
        best = 0
        while value.producer is not None and value not in self.axes:
            op = value.producer
            if op.kind not in _PLACES and op.attrs.get("fn") != "cast":
                break
            source = op.inputs[_source(op)]
            others = [v for i, v in enumerate(op.inputs) if i != _source(op) and v is not None]
            if source is None or len(self._own_axes(source)) != 1 or any(map(self.bindings.of, others)):
                break
            path.append(op)
            value = source
            if op.kind != "tie" and op.attrs.get("fn") != "cast":
                best = len(path)
        return path[:best]

    def _placed(self, root: Value, path: list[Op]) -> int:
        found: dict[Value, int] = {}
        if root in self.axes:
            axis = self.axes[root]
        else:
            axis = found[root] = self._own_axes(root)[0]
            if root.shape is None or not self.one_each(root.shape[axis]):
                raise Refused(
                    f"%{root.name} has {root.shape and root.shape[axis]} positions, not one for each token"
                )
        for op in reversed(path):
            axes = [axis if i == _source(op) else None for i in range(len(op.inputs))]
            placed = token_axis(op, axes)
            assert placed is not None
            axis = found[op.output] = placed
        if root not in self.axes:
            self.tables[root] = found[root]
        self.axes |= found
        return axis

    def one_each(self, dim: Dim) -> bool:
        """Whether a table of so many positions has one for each token, or for as many as there can be: a slice of a
        learned table is Min(its length, tokens) long. That the capacity is no more is found when it is evaluated."""
        length = self.bindings.length
        return dim == length or (isinstance(dim, sympy.Min) and length in dim.args)

    def _own_axes(self, value: Value) -> list[int]:
        return self.bindings.token_axes(value)

    def _keeps_last(self, op: Op) -> bool:
        start = op.attrs["start"]
        if op.attrs.get("end") is not None or op.attrs.get("step", 1) != 1:
            return False
        if isinstance(start, int):
            return start < 0
        count = self.bindings.length - start
        return bool(getattr(count, "is_Integer", isinstance(count, int)) and count > 0)


def _is_table(value: Value) -> bool:
    return value.producer is None and all(op.target == "elision.overlay_rows" for op, _ in value.users)


def _source(op: Op) -> int:
    """The operand whose entries an op of `_PLACES` moves."""
    return 1 if op.kind in ("embedding", "gather") else 0


def drop_last_rows(graph: Graph, bindings: Bindings, op: Op) -> None:
    """Take a slice of the last rows out: what it gave is all rows from now on.

    Raises Refused where its result meets rows that were not sliced, or a shape further down is written out."""
    source = op.inputs[0]
    assert source is not None
    short = {op.output}
    later: list[Op] = []
    for user in graph.ops[graph.ops.index(op) + 1 :]:
        if not any(v in short for v in user.inputs):
            continue
        for value in user.inputs:
            if value is not None and value not in short and bindings.has_rows(value):
                raise Refused(
                    f"{user.target} (%{user.name}) reads %{value.name} together with rows that {op.target} "
                    f"(%{op.name}) has picked"
                )
        later.append(user)
        short |= set(user.outputs)
    graph.replace_uses(op.output, source)
    for user in later:
        graph.refresh(user)
    graph.remove_dead()
