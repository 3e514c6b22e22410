"""Positions evaluated, not guessed: the plain graph itself computes its tables, at several lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .errors import ElisionError, Refused
from .incremental_pairs import PairRule, PairTable, Unfit
from .incremental_plan import Plan
from .incremental_scores import Attention
from .ir.graph import Dim, Graph, Value

LENGTHS = (1, 2, 7, 33)
"""Lengths that are compared with the capacity."""

LIMIT = 1_000_000_000
"""Bytes a mask's table may take."""


@dataclass
class Tables:
    """`rows`: for each value of positions its entries 0 .. capacity-1 along its token axis. `fixed`: values that are
    the same at every length. `rules`: what the masks of each attention say."""

    rows: dict[Value, np.ndarray] = field(default_factory=dict)
    fixed: dict[Value, np.ndarray] = field(default_factory=dict)
    rules: list[PairRule] = field(default_factory=list)


@dataclass(frozen=True)
class Text:
    """Inputs of a text without padding."""

    ids: Value
    mask: Value | None
    positions: Value | None

    def feeds(self, ids: np.ndarray) -> dict[Value, np.ndarray]:
        """The inputs for token ids [1, n]."""
        found = {self.ids: ids.astype(self.ids.dtype)}
        if self.mask is not None:
            found[self.mask] = np.ones(ids.shape, self.mask.dtype)
        if self.positions is not None:
            found[self.positions] = np.arange(ids.shape[1], dtype=self.positions.dtype)[None]
        return found


Reader = Callable[[Sequence[PairTable]], PairRule]
"""What the masks of an attention say, from their tables of rising lengths. Raises Unfit."""


def evaluate(graph: Graph, plan: Plan, text: Text, capacity: int, read: Reader) -> Tables:
    """Evaluate what `plan` needs. Raises Refused, naming the value, where it is no table of positions."""
    masks = [mask.value for attention in plan.attentions for mask in attention.masks]
    for value in masks:
        _check_size(plan, value, capacity)
    wanted = list(dict.fromkeys([*plan.tables, *plan.fixed, *masks]))
    lengths = [*(n for n in LENGTHS if n < capacity), capacity]
    at: dict[int, dict[Value, np.ndarray]] = {}
    for length in lengths:
        feeds = text.feeds(np.zeros((1, length), np.int64))
        try:
            at[length] = dict(zip(wanted, graph.evaluate(wanted, feeds) if wanted else []))
        except ElisionError as error:
            less = "; a smaller capacity may do" if length == capacity else ""
            raise Refused(f"its positions cannot be evaluated for {length} tokens{less}: {error}") from error
    tables = Tables()
    for value, axis in plan.tables.items():
        tables.rows[value] = _table(value, axis, {n: found[value] for n, found in at.items()})
        _check_reach(value, tables.rows[value], capacity)
    for value in plan.fixed:
        first = at[capacity][value]
        for length in lengths:
            if not _equal(at[length][value], first):
                raise Refused(f"%{value.name} depends on the number of tokens: {_user(value)} reads it")
        tables.fixed[value] = first
    known: dict[object, PairRule] = {}
    for attention in plan.attentions:
        # Layers share their masks: the same ones are read once.
        key = (tuple(attention.masks), attention.causal)
        if key not in known:
            known[key] = _rule(attention, at, read)
        tables.rules.append(known[key])
    return tables


def _table(value: Value, axis: int, at: dict[int, np.ndarray]) -> np.ndarray:
    whole = at[max(at)]
    for length, array in at.items():
        if array.shape[axis] != length:
            less = "; a smaller capacity may do" if array.shape[axis] < length == max(at) else ""
            raise Refused(
                f"%{value.name} has {array.shape[axis]} positions for {length} tokens: {_user(value)} reads it{less}"
            )
        start = np.take(whole, np.arange(length), axis)
        if not _equal(array, start):
            raise Refused(
                f"%{value.name} is not the same at the first {length} positions when more follow: {_user(value)} "
                "reads it"
            )
    return whole


def _check_reach(value: Value, rows: np.ndarray, capacity: int) -> None:
    """Refuse positions that a learned table, further down, does not have."""
    queue = [value]
    while queue:
        for op, index in queue.pop().users:
            if op.kind in ("embedding", "gather") and index == 1:
                table = op.inputs[0]
                length = (
                    None if table is None or table.shape is None else table.shape[op.attrs.get("axis", 0)]
                )
                if isinstance(length, int) and rows.max() >= length:
                    assert table is not None
                    raise Refused(
                        f"{op.target} (%{op.name}) looks up entry {rows.max()} of %{table.name}, which has {length}: a "
                        f"capacity of {capacity} is too large"
                    )
            elif op.kind in ("reshape", "transpose", "expand", "tie") or op.attrs.get("fn") == "cast":
                queue.append(op.output)


def _rule(attention: Attention, at: dict[int, dict[Value, np.ndarray]], read: Reader) -> PairRule:
    try:
        found = []
        for length, arrays in at.items():
            masks = [mask.applied(arrays[mask.value]) for mask in attention.masks]
            found.append(PairTable(masks, length, attention.causal))
        return read(found)
    except Unfit as why:
        names = ", ".join(f"%{mask.value.name}" for mask in attention.masks)
        subject = f"the mask {names} of " if names else ""
        op = attention.op
        reason = str(why) if names else f"it {why}"
        raise Refused(f"{subject}{op.target} (%{op.name}) cannot be cached: {reason}") from None


def _check_size(plan: Plan, value: Value, capacity: int) -> None:
    size = 4 if value.dtype != "bool" else 1
    for dim in value.shape or ():
        size *= _length(plan, dim, capacity)
    if size > LIMIT:
        raise Refused(
            f"at a capacity of {capacity} the mask %{value.name} would take {size / 1e9:.1f} GB to evaluate; choose a "
            "smaller capacity"
        )


def _length(plan: Plan, dim: Dim, capacity: int) -> int:
    return dim if isinstance(dim, int) else int(dim.subs(plan.bindings.length, capacity))


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape:
        return False
    if a.dtype.kind in "biu":
        return bool((a == b).all())
    a, b = a.astype(np.float64), b.astype(np.float64)
    return bool(np.allclose(a, b, rtol=1e-6, atol=1e-6, equal_nan=True))


def _user(value: Value) -> str:
    op = value.users[0][0] if value.users else value.producer
    return "the graph" if op is None else f"{op.target} (%{op.name})"
