"""Lookups of token ids in a constant table of embeddings, and rows given at run time for ids beyond it.

The table stays as it is kept, in floats or in a few bits: it is looked up as before, and its rows give way to the
others where the ids say so (`overlay_rows`). A head that shares the table keeps its rows, and scores their number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .analysis.flow import is_float, reads_shapes
from .errors import Refused
from .ir.graph import Graph, Op, Value
from .keep_rows import is_fixed
from .writer import Writer

MOVES = frozenset(
    {"reshape", "transpose", "expand", "tie", "slice", "select", "concat", "stack", "split", "unbind"}
)
"""What only says where an id is."""

_ALSO_MOVE = ("where", "masked_fill")
_COMPARISONS = ("eq", "ne")


@dataclass(frozen=True, eq=False)
class Lookup:
    """One lookup of `ids` [...] in a table of `count` rows of `width` numbers. place: of the ids among the operands."""

    op: Op
    place: int
    count: int
    width: int

    @property
    def ids(self) -> Value:
        found = self.op.inputs[self.place]
        assert found is not None
        return found

    @property
    def table(self) -> Value:
        """The constant whose first axis are the rows: floats, or the bits of a quantized table."""
        found = self.op.inputs[1 - self.place]
        assert found is not None
        return found


def find_lookups(graph: Graph, ids: Value) -> list[Lookup]:
    """The lookups of these ids, where nothing else in the graph cares which they are.

    Comparisons with other ids (padding, end of a text) are no hindrance: a new id is none of those. Raises Refused
    where an op reads the ids otherwise, where a table is computed, or where there is none."""
    found: list[Lookup] = []
    compared: list[tuple[Op, Value]] = []
    for op, index, value in _uses(graph, ids):
        if op.kind == "elision" and "own_ids" in op.target:
            raise Refused(f"%{ids.name} has new ids already, from {op.attrs['first']} on")
        lookup = _lookup(graph, op, index)
        if lookup is not None:
            found.append(lookup)
        elif op.kind == "elementwise" and op.attrs.get("fn") in _COMPARISONS:
            compared.append((op, value))
        else:
            raise Refused(
                f"{op.target} (%{op.name}) reads the ids of %{ids.name} for something other than their embeddings, and "
                "knows no new ones"
            )
    if not found:
        raise Refused(f"%{ids.name} is looked up in no table")
    least = min(lookup.count for lookup in found)
    for op, value in compared:
        number = op.attrs.get("other", 0)
        if number >= least:
            raise Refused(
                f"{op.target} (%{op.name}) compares %{value.name} with {number}, which may be a new id"
            )
        for other in op.inputs:
            data = None if other is None or other is value else graph.constant_value(other)
            if (
                other is not None
                and other is not value
                and (data is None or (data.size and data.max() >= least))
            ):
                raise Refused(f"{op.target} (%{op.name}) compares %{value.name} with what may be a new id")
    return found


def overlay(graph: Graph, lookup: Lookup, rows: Value, first: int) -> Value:
    """Let ids from `first` on read `rows` [M, C], or [B, M, C] with ids [B, ...]; every use of the lookup reads both.

    `first` is at most the table's number of rows. Returns the new embeddings [..., C], of the lookup's dtype."""
    ids, old = lookup.ids, lookup.op.output
    if rows.shape is None or rows.shape[-1] != lookup.width:
        raise Refused(
            f"{rows!r} has no rows of {lookup.width} numbers as {lookup.op.target} (%{lookup.op.name}) gives"
        )
    look_up_own(graph, lookup, first)
    users, outputs = list(old.users), [i for i, v in enumerate(graph.outputs) if v is old]
    write = Writer.behind(graph, [old, rows])
    new = write("overlay_rows", [old, ids, rows], first=first)[0]
    for op, index in users:
        graph.set_operand(op, index, new)
    for index in outputs:
        graph.replace_output(index, new)
    return new


def look_up_own(graph: Graph, lookup: Lookup, first: int) -> None:
    """Let ids from `first` on look up the table's row 0, which is there: something else stands in its place."""
    write = Writer.behind(graph, [lookup.ids])
    graph.set_operand(lookup.op, lookup.place, write("own_ids", [lookup.ids], first=first)[0])


def overlaid(graph: Graph) -> list[tuple[Op, Lookup]]:
    """The ops `overlay_rows` of a graph that such rows were given before, each with the lookup it is laid over."""
    found = []
    for op in graph.ops_of("elision"):
        if op.target.split(".")[-1].split("::")[-1].startswith("overlay_rows"):
            own = op.inputs[0]
            source = None if own is None else own.producer
            for index in range(0 if source is None else len(source.inputs)):
                assert source is not None
                lookup = _lookup(graph, source, index)
                if lookup is not None:
                    found.append((op, lookup))
    return found


def own_rows(graph: Graph, lookup: Lookup, ids: np.ndarray) -> np.ndarray:
    """The rows float32 [K, C] of the table's own ids int64 [K]."""
    data = graph.constant_value(lookup.table)
    if data is not None and lookup.op.kind != "elision" and lookup.table.origin != "op":
        return np.asarray(data[ids], dtype=np.float32)
    source = input_behind(graph, lookup.ids)
    if source is None:
        raise Refused(f"%{lookup.ids.name} comes from no input")
    given = np.asarray(ids, np.int64).astype(source.dtype).reshape([1] * (source.rank - 1) + [-1])
    found = graph.evaluate([lookup.op.output], {source: given})[0]
    return np.asarray(found, dtype=np.float32).reshape(len(ids), lookup.width)


def input_behind(graph: Graph, ids: Value) -> Value | None:
    """The input that ids come from."""
    waiting: list[Value | None] = [ids]
    seen: set[Value] = set()
    while waiting:
        value = waiting.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        if value in graph.inputs:
            return value
        if value.producer is not None:
            waiting += value.producer.inputs
    return None


# ---- inside ----------------------------------------------------------------------------------------------
def _uses(graph: Graph, ids: Value) -> Iterator[tuple[Op, int, Value]]:
    """Every use of the ids, and of what holds the same ids at other places, that is not such a move."""
    waiting, seen = [ids], {ids}
    while waiting:
        value = waiting.pop()
        for op, index in value.users:
            if reads_shapes(op):
                continue
            if _moves(op):
                waiting += [out for out in op.outputs if out not in seen]
                seen.update(op.outputs)
            else:
                yield op, index, value


def _moves(op: Op) -> bool:
    fn = op.attrs.get("fn")
    if op.kind == "elementwise" and fn == "cast":
        return op.output.dtype in ("int64", "int32")
    return op.kind in MOVES or (op.kind == "elementwise" and fn in _ALSO_MOVE)


def _lookup(graph: Graph, op: Op, index: int) -> Lookup | None:
    """`op` as a lookup of its operand `index` in a constant table; None for any other op. Raises Refused for one whose
    table is no constant."""
    quantized = op.kind == "elision" and op.target.split(".")[-1].split("::")[-1].startswith("embedding")
    place = 0 if quantized else 1
    if index != place or not (
        quantized or op.kind == "embedding" or (op.kind == "gather" and is_float(op.output))
    ):
        return None
    table = op.inputs[1 - place]
    rank = 3 if quantized else 2
    if table is None or table.shape is None or len(table.shape) != rank or op.attrs.get("axis", 0) != 0:
        return None
    count, width = table.shape[0], op.output.shape[-1] if op.output.shape else None
    if not is_fixed(graph, table) or not isinstance(count, int) or not isinstance(width, int):
        raise Refused(
            f"{op.target} (%{op.name}) looks tokens up in %{table.name}, which is no constant table"
        )
    return Lookup(op, place, count, width)
