"""Carrying a number for each token along the way that its features take.

What a policy says about the tokens of an image must be known where the image's features stand among the text. Between
the two, features are sliced, unbound, shuffled into channels, pooled, joined with separators and scattered into the
embeddings. Every op that moves features is repeated on the numbers; an op that computes each token by itself leaves
them as they are. What belongs to no token of the image, text and separators, gets -1. No op is told by its model.

A carried number is *narrow*, with one channel, as long as no op moves the channels, else *wide*, the same in all
channels of a token (the mean, where tokens were shuffled into channels)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .analysis.flow import is_float
from .analysis.signatures import by_position
from .analysis.spaces import Analysis, Ends, TokenSpace
from .cut_maps import WHOLE
from .errors import Refused
from .ir.graph import Dim, Op, Value, product
from .writer import Writer

OUTSIDE = -1.0
"""The number of what is no token of the image."""

MOVES = frozenset(
    {"reshape", "transpose", "expand", "concat", "stack", "split", "unbind", "slice", "select", "gather"}
    | {"scatter", "spatial"}
)


@dataclass(frozen=True, eq=False)
class Carried:
    """`value` float32, of the shape of the features it goes with, but with a last axis of 1 where narrow. `line` is
    the same for numbers between which nothing moved."""

    value: Value
    wide: bool
    line: object


class Carrier:
    """Carries numbers of the tokens of `space` into other values, inserting what it takes with `write`.

    `space` is a token space, or an input [..., C] whose rows are features that another graph has made. `numbers(ends,
    write)` makes those of an interval of the space, [T, N], or of the rows of the input. `ranked`, where several tokens
    become one by their channels, gets the numbers of the new rows, [..., 1], and gives others for them."""

    def __init__(
        self,
        write: Writer,
        analysis: Analysis,
        space: TokenSpace | Value,
        numbers: Callable[[Ends, Writer], Value],
        ranked: Callable[[Value, Writer], Value] | None = None,
    ) -> None:
        self.write = write
        self.analysis = analysis
        self.space = space
        self.first = space if isinstance(space, Value) else space.blocks[0].attention.output
        self.numbers = numbers
        self.ranked = ranked
        self.shuffled: list[Value] = []  # the numbers right behind each op that made one token of several
        # When placed: (features, numbers, with others among them).
        self.placed: list[tuple[Value, Carried, bool]] = []
        self.begun: list[Ends] = []  # the intervals of the space that numbers were made for
        self.outside = False  # rows that are no token of the space came among them
        self._found: dict[Value, Carried | None] = {}
        self._starts: dict[tuple[Ends, int], Carried] = {}

    def at(self, value: Value) -> Value:
        """The numbers of the rows of `value` [..., C], as [...]: OUTSIDE where a row is none of the space's tokens.
        Raises Refused where they cannot be carried there."""
        found = self._carry(value)
        assert value.shape is not None
        if found is None:
            raise Refused(f"%{value.name} holds nothing of {self._tokens}")
        return self.write.shaped("reshape", self._narrow(found).value, list(value.shape[:-1]))

    @property
    def _tokens(self) -> str:
        if isinstance(self.space, Value):
            return f"the tokens of %{self.space.name}"
        return f"the {self.space.length} tokens"

    # ---- one value -----------------------------------------------------------------------------------
    def _carry(self, value: Value) -> Carried | None:
        """None: nothing of the space's tokens is in `value`."""
        if value not in self._found:
            self._found[value] = self._carried(value)
        return self._found[value]

    def _carried(self, value: Value) -> Carried | None:
        analysis, op = self.analysis, value.producer
        if value is self.space:
            return self._begun((WHOLE, value.rank), value)
        if op is None or not is_float(value) or value.shape is None:
            return None
        if not analysis.flow.depends(value, self.first):
            return None
        start = self._start(value)
        if start is not None:
            return start
        by_rows = self._masked(op, value)
        if by_rows is not None:
            return by_rows
        if op.kind in MOVES or (op.kind == "elementwise" and op.attrs.get("fn") == "where"):
            return self._moved(op, value)
        if self._row_by_row(op):
            return self._passed(op)
        raise Refused(
            f"{op.target} (%{op.name}) makes %{value.name} of several of {self._tokens}: which of them "
            "a row is cannot be followed"
        )

    def _start(self, value: Value) -> Carried | None:
        """The numbers of a value that still has the space's own axis: [T, N, C], or [N, C] without a batch."""
        if isinstance(self.space, Value):
            return None
        places = self.analysis.token_axes(self.space, value)
        if len(places) != 1 or not self.analysis.is_content(self.space, value):
            return None
        axis, ends = places[0]
        batch = self.analysis.batch_axis(self.space, value)
        if (value.rank, axis) not in ((3, 1), (2, 0)) or (self.space.batch and batch != 0) or batch == axis:
            return None
        return self._begun((ends, value.rank), value)

    def _begun(self, key: tuple[Ends, int], value: Value) -> Carried:
        if key not in self._starts:
            assert value.shape is not None
            made = self.numbers(key[0], self.write)
            self.begun.append(key[0])
            made = self.write.shaped("reshape", made, [*value.shape[:-1], 1])
            self._starts[key] = Carried(made, False, object())
        return self._starts[key]

    def _row_by_row(self, op: Op) -> bool:
        """True when every row of the result, along all axes but the last, is made of the same row."""
        out = op.output
        if op.kind in ("elementwise", "tie", "linear") or by_position(op):
            return True
        if op.kind == "matmul":
            right = op.inputs[1]
            return right is not None and right.rank == 2 and not self.analysis.flow.comes_from(right)
        if op.kind == "norm" or (op.kind == "reduce" and op.attrs.get("keepdim")):
            return tuple(op.attrs.get("axes", ())) == (out.rank - 1,)
        return op.kind == "softmax" and op.attrs["axis"] == out.rank - 1

    def _passed(self, op: Op) -> Carried:
        """Rows are computed one by one: their numbers stay."""
        found: list[Carried] = []
        for operand in op.inputs:
            if operand is None:
                continue
            carried = self._carry(operand)
            if carried is not None:
                found.append(carried)
            elif self.analysis.flow.comes_from(operand):
                raise Refused(
                    f"{op.target} (%{op.name}) computes with %{operand.name}, another input, where "
                    f"{self._tokens} in %{op.output.name} are on their way"
                )
        if not found or any(one.line is not found[0].line for one in found):
            raise Refused(f"{op.target} (%{op.name}) mixes tokens that came by different ways")
        best = max(found, key=lambda one: one.wide)
        if best.wide and (
            op.kind not in ("elementwise", "tie") or self._width(op.output) != self._width(best.value)
        ):
            best = self._narrow(best)
            self.shuffled.append(best.value)
            if self.ranked is not None:
                best = Carried(self.ranked(best.value, self.write), False, best.line)
        shape = op.output.shape
        assert shape is not None and best.value.shape is not None
        if tuple(best.value.shape[:-1]) != tuple(shape[:-1]):
            wider = self.write.shaped("expand", best.value, [*shape[:-1], best.value.shape[-1]])
            return Carried(wider, best.wide, best.line)
        return best

    def _width(self, value: Value) -> Dim:
        assert value.shape is not None
        return value.shape[-1]

    # ---- ops that move -------------------------------------------------------------------------------
    def _moved(self, op: Op, value: Value) -> Carried:
        content = [index for index, v in enumerate(op.inputs) if v is not None and is_float(v)]
        found = {index: self._carry(self._operand(op, index)) for index in content}
        if all(one is None for one in found.values()):
            raise Refused(f"{op.target} (%{op.name}) places tokens by computed numbers")
        if self._places(op, found):
            self.placed += [(self._operand(op, i), one, self.outside) for i, one in found.items() if one]
        elif any(one is None for one in found.values()):
            self.outside = True
        wide = not self._keeps_channels(op) or any(one is not None and one.wide for one in found.values())
        inputs = list(op.inputs)
        for index in content:
            operand, one = self._operand(op, index), found[index]
            if one is None:
                inputs[index] = self._outside(operand, wide)
            else:
                inputs[index] = self._widened(one, operand).value if wide else one.value
        if op.kind in ("reshape", "expand"):
            shape = list(value.shape or ())
            if not wide:
                shape[-1] = 1
            x = inputs[0]
            assert x is not None
            made = [self.write.shaped(op.kind, x, shape)]
        else:
            made = self.write.repeat(op, inputs)
        line = object()
        for out, new in zip(op.outputs, made):
            self._found[out] = Carried(new, wide, line if len(made) == 1 else object())
        carried = self._found[value]
        assert carried is not None
        return carried

    def _masked(self, op: Op, value: Value) -> Carried | None:
        """A masked scatter of whole rows is followed on one number a row: on numbers as wide as the features it would
        cost as much as the scatter itself. None where `op` is none, or the numbers are wide already."""
        found = row_scatter(op)
        if found is None or value.rank != 3 or self._carry(self._operand(op, 0)) is not None:
            return None
        where, features = found
        numbers = self._carry(features)
        if (
            numbers is None
            or numbers.wide
            or where.rank != 3
            or where.shape != (*(value.shape or ())[:-1], 1)
        ):
            return None
        self.placed.append((features, numbers, self.outside))
        shape = list(value.shape or ())[:-1]
        line = self.write.shaped("reshape", numbers.value, [product(numbers.value.shape or ())])
        mask = self.write.shaped("reshape", where, shape)
        made = self.write("place_rows", [mask, line], outside=OUTSIDE)[0]
        return Carried(self.write.shaped("reshape", made, [*shape, 1]), False, object())

    def _places(self, op: Op, found: dict[int, Carried | None]) -> bool:
        """True when the op puts the tokens where an input says, or among the features of another."""
        comes_from = self.analysis.flow.comes_from
        by_input = any(v is not None and not is_float(v) and comes_from(v) for v in op.inputs)
        others = any(one is None and comes_from(self._operand(op, index)) for index, one in found.items())
        return by_input or others

    def _keeps_channels(self, op: Op) -> bool:
        """True when the op leaves the last axis of its operand the last one, whole."""
        x, out = self._operand(op, 0), op.output
        last = x.rank - 1
        if op.kind in ("slice", "select", "split", "unbind", "concat", "gather"):
            return op.attrs["axis"] != last
        if op.kind == "stack":
            return op.attrs["axis"] <= last
        if op.kind == "transpose":
            return op.attrs["perm"][-1] == last
        if op.kind in ("expand", "reshape"):
            return x.rank > 0 and out.rank > 0 and self._width(x) == self._width(out)
        return False

    def _operand(self, op: Op, index: int) -> Value:
        value = op.inputs[index]
        assert value is not None
        return value

    def _outside(self, like: Value, wide: bool) -> Value:
        shape = list(like.shape or ())
        if not wide:
            shape[-1] = 1
        return self.write.filled(np.full((1,) * len(shape), OUTSIDE, np.float32), "outside", shape)

    def _widened(self, carried: Carried, like: Value) -> Carried:
        if carried.wide:
            return carried
        wide = self.write.shaped("expand", carried.value, list(like.shape or ()))
        return Carried(wide, True, carried.line)

    def _narrow(self, carried: Carried) -> Carried:
        if not carried.wide:
            return carried
        return Carried(self.write("mean_channels", [carried.value])[0], False, carried.line)


def row_scatter(op: Op) -> tuple[Value, Value] | None:
    """(mask [B, N, 1], features [..., C]) of a masked scatter that puts the features' rows at the true places; None for
    any other op. The exporters write it as one op, or as a scatter by the places where the widened mask is true."""
    if op.kind != "scatter" or len(op.inputs) != 3:
        return None
    _, second, third = op.inputs
    if second is None or third is None:
        return None
    mask, rows = second, third
    if second.dtype != "bool":
        mask = _tells(second)
        if mask is None or op.attrs.get("reduction", "none") not in ("none", None):
            return None
        if rows.producer is not None and rows.producer.kind == "slice":
            rows = _unsliced(rows.producer)
        if rows is None or rows.rank != 1:
            return None
    elif not op.target.endswith(("masked_scatter", "masked_scatter.default")):
        return None
    narrow = mask.producer
    if narrow is None or narrow.kind != "expand" or narrow.inputs[0] is None:
        return None
    while rows.rank == 1 and rows.producer is not None and rows.producer.kind in ("reshape", "tie"):
        before = rows.producer.inputs[0]
        if before is None:
            return None
        rows = before
    width = op.output.shape[-1] if op.output.shape else None
    if rows.shape is None or rows.rank < 2 or rows.shape[-1] != width:
        return None
    return narrow.inputs[0], rows


def _tells(indices: Value) -> Value | None:
    """The mask whose true places `indices` [K, rank] are."""
    turned = indices.producer
    if turned is None or turned.kind != "transpose" or turned.inputs[0] is None:
        return None
    found = turned.inputs[0].producer
    if found is None or found.target.split(".")[-1].split("::")[-1] != "NonZero":
        return None
    return found.inputs[0]


def _unsliced(op: Op) -> Value | None:
    """What a slice takes the first of."""
    whole = op.attrs.get("start") in (0, None) and op.attrs.get("step", 1) == 1 and op.attrs["axis"] == 0
    return op.inputs[0] if whole else None
