"""Comparing two graphs that choose.

Which tokens stay, or meet, is a jump: where two scores are as good as equal, the last bit of a product decides, and all
that is computed of the tokens then differs. Such graphs compute the same function up to rounding if what a choice is
made by is the same up to rounding, what is chosen by it is the same to the bit, and everything else is the same up to
rounding once both have chosen alike. These three are checked one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from . import drift as drifts
from .base import numpy_dtype
from .errors import ElisionError
from .ir.graph import Graph, Op, Value

Run = Callable[[Graph], list[np.ndarray]]
Arrays = dict[tuple[int, int], np.ndarray]
"""By the number of a choice and of its operand or result."""


@dataclass
class Agreement:
    """`outputs` of the second graph under the first one's choices; `notes`: which of its own were others."""

    outputs: list[np.ndarray]
    notes: list[str] = field(default_factory=list)


def under_equal_choices(
    before: Graph, after: Graph, runs: tuple[Run, Run], allowed: float
) -> Agreement | None:
    """What `after` puts out when it chooses as `before` does. None where they have no choices that belong together,
    where what they are made by differs by more than `allowed` of its largest magnitude, or where equal operands let
    them choose otherwise. `runs`: how each of the two is run."""
    try:
        return _agreement(before, after, runs, allowed)
    except ElisionError:
        return None  # one of them does not run so: that the outputs differ is what there is to say


def _agreement(before: Graph, after: Graph, runs: tuple[Run, Run], allowed: float) -> Agreement | None:
    ops = choices(before)
    if not ops or [_facts(op) for op in ops] != [_facts(op) for op in choices(after)]:
        return None
    asked = _Asked(before.copy())
    asked.tell()
    _, given, chosen = asked.run(runs[0])
    # The other graph, whose choices go nowhere: the first one's stand in their place.
    pinned = _Asked(after.copy())
    pinned.pin(chosen)
    pinned.tell()
    outputs, found, own = pinned.run(runs[1])
    if set(given) != set(found):
        return None
    for key, old in given.items():
        new = found[key]
        if old.shape != new.shape or not drifts.within(old, drifts.measure("", old, new), allowed):
            return None
    # By the other graph's operands, what would the first have chosen?
    judge = _Asked(before.copy())
    judge.pin(chosen)
    judge.feed(found)
    judge.tell()
    wanted = judge.run(runs[0])[2]
    if any(not np.array_equal(array, own[key], equal_nan=True) for key, array in wanted.items()):
        return None
    return Agreement(outputs[: len(after.outputs)], _notes(ops, chosen, own))


def choices(graph: Graph) -> list[Op]:
    """The ops of the dialect whose result jumps, in order."""
    return [op for op in graph.ops_of("elision") if _chooses(op)]


def _chooses(op: Op) -> bool:
    from ..kernels import OPS

    found = OPS.get(_name(op))
    return found is not None and found.chooses


def _name(op: Op) -> str:
    """The name in the dialect, also of a kernel, or of a function that has a number because there are several."""
    name = op.target.split(".")[-1].split("::")[-1]
    base, _, number = name.rpartition("_")
    return base if base and number.isdecimal() else name


def _facts(op: Op) -> tuple[object, ...]:
    return (_name(op), len(op.outputs), [v is None for v in op.inputs])


class _Asked:
    """A graph that is rewritten to tell what its choices are made by and what they are."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.ops = choices(graph)
        self.results = {value for op in self.ops for value in op.outputs}
        self.operands = {
            (i, j): value
            for i, op in enumerate(self.ops)
            for j, value in enumerate(op.inputs)
            if value is not None and value.origin == "op" and value not in self.results
        }
        self.first = len(graph.outputs)

    def pin(self, chosen: Arrays) -> None:
        """Let everything read these choices."""
        for (i, j), array in chosen.items():
            out = self.ops[i].outputs[j]
            self.graph.replace_uses(out, self._constant(array, out))

    def feed(self, operands: Arrays) -> None:
        """Let the choices be made by these operands."""
        for (i, j), array in operands.items():
            self.graph.set_operand(self.ops[i], j, self._constant(array, self.operands[i, j]))

    def tell(self) -> None:
        """Put operands and choices out, too."""
        told = [*self.operands.values(), *(v for op in self.ops for v in op.outputs)]
        for number, value in enumerate(told):
            self.graph.add_output(value, f"elision_choice_{number}")

    def run(self, run: Run) -> tuple[list[np.ndarray], Arrays, Arrays]:
        """Outputs as they were, operands, choices."""
        arrays = [np.asarray(array) for array in run(self.graph)]
        outputs, told = arrays[: self.first], iter(arrays[self.first :])
        operands = {key: next(told) for key in self.operands}
        results = {(i, j): next(told) for i, op in enumerate(self.ops) for j in range(len(op.outputs))}
        return outputs, operands, results

    def _constant(self, array: np.ndarray, like: Value) -> Value:
        return self.graph.insert_constant(array.astype(numpy_dtype(like.dtype)), "elision_choice")


def _notes(ops: Sequence[Op], chosen: Arrays, own: Arrays) -> list[str]:
    found = []
    for i, op in enumerate(ops):
        pairs = [(chosen[key], own[key]) for key in chosen if key[0] == i]
        places = max(int(np.sum(a != b)) for a, b in pairs)
        if places:
            found.append(
                f"%{op.name} chooses otherwise in {places} places, where what it chooses by is equal up to rounding; "
                "outputs were compared under equal choices"
            )
    return found
