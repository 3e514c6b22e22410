"""When each value of a causal graph is known: before any token, from positions, from a source, or row by row.

Binding-time analysis in the sense of partial evaluation: CONSTANT needs weights only; POSITION only lengths, the
mask of a text without padding, and positions; SEQUENCE the other inputs (an encoder's); ROW the decoder's token
ids. What depends on POSITION and on SEQUENCE has rows as well.
"""

from __future__ import annotations

from typing import Any

import sympy

from .analysis.flow import SHAPE_ONLY
from .errors import Refused
from .ir.graph import Dim, Graph, Op, Value

CONSTANT, POSITION, SEQUENCE, ROW = 0, 1, 2, 4


class Bindings:
    """The binding time of every value, as a set of the bits above. `length` is the decoder's number of tokens.

    `ids` [1, length] is what rows come from; `mask` and `positions`, where there are any, are inputs that hold
    ones and 0, 1, 2, ...; every other input is a source."""

    def __init__(self, graph: Graph, ids: Value, mask: Value | None, positions: Value | None) -> None:
        self.graph = graph
        self.length = _token_length(ids)
        self._bits: dict[Value, int] = {}
        self._symbols: dict[Any, int] = {}
        own = [v for v in (ids, mask, positions) if v is not None]
        for value in own:
            self._bits[value] = POSITION
            for dim in value.shape or ():
                self._note(dim, POSITION)
        self._bits[ids] = ROW
        for value in graph.inputs:
            if value in own:
                continue
            for dim in value.shape or ():
                if self._dims([dim]) & POSITION:
                    raise Refused(
                        f"the input %{value.name} runs along the tokens of %{ids.name} and is neither their mask nor "
                        "their positions"
                    )
                self._note(dim, SEQUENCE)
            self._bits[value] = SEQUENCE
        for op in graph.ops:
            found = self._op(op)
            for out in op.outputs:
                for dim in out.shape or ():
                    self._note(dim, found)  # a length that only its data say, where it is new
                self._bits[out] = found | self._dims(out.shape)

    def of(self, value: Value) -> int:
        return self._bits.get(value, CONSTANT)

    def has_rows(self, value: Value) -> bool:
        """Whether `value` must be computed for every new row."""
        bits = self.of(value)
        return bool(bits & ROW) or bits & (POSITION | SEQUENCE) == POSITION | SEQUENCE

    def token_axes(self, value: Value) -> list[int]:
        """The axes whose length depends on the number of tokens."""
        return [axis for axis, dim in enumerate(value.shape or ()) if self._dims([dim]) & POSITION]

    def is_source_length(self, dim: Dim) -> bool:
        """Whether `dim` is a length that a source has by itself, no arithmetic on one."""
        return isinstance(dim, sympy.Symbol) and self._dims([dim]) == SEQUENCE

    def _op(self, op: Op) -> int:
        bits = CONSTANT
        for value in op.shape_inputs:
            bits |= self.shape_input(value)
        for attribute in op.attrs.values():
            bits |= self.attribute(attribute)
        if op.kind == "size":
            axes, x = op.attrs.get("axes"), op.inputs[0]
            measured = [op.attrs["axis"]] if axes is None else list(axes)
            if x is None or x.shape is None:
                return ROW
            return bits | self._dims([x.shape[a] for a in measured])
        if op.kind == "create" or op.attrs.get("fn") in SHAPE_ONLY:
            return bits
        for value in op.inputs:
            bits |= CONSTANT if value is None else self.of(value)
        return bits

    def shape_input(self, value: Value) -> int:
        """The bits of a value that says a shape: by its data where that is a length or a list of lengths, else by its
        own shape."""
        states = value.rank <= 1 and value.dtype.startswith("int")
        return self.of(value) if states else self._dims(value.shape)

    def attribute(self, attribute: Any) -> int:
        if isinstance(attribute, Value):
            return self.of(attribute)
        if isinstance(attribute, list | tuple):
            bits = CONSTANT
            for item in attribute:
                bits |= self.attribute(item)
            return bits
        return self._dims([attribute]) if isinstance(attribute, sympy.Expr) else CONSTANT

    def _note(self, dim: Dim, bit: int) -> None:
        if not isinstance(dim, int):
            for symbol in dim.free_symbols:
                self._symbols.setdefault(symbol, bit)

    def _dims(self, dims: Any) -> int:
        bits = CONSTANT
        for dim in dims or ():
            if not isinstance(dim, int):
                for symbol in dim.free_symbols:
                    bits |= self._symbols.get(symbol, ROW)  # a length that only data say
        return bits


def _token_length(ids: Value) -> Dim:
    if ids.shape is None or ids.rank != 2 or not ids.dtype.startswith("int"):
        raise Refused(f"the token ids %{ids.name} are {ids!r}, not integers [batch, length]")
    length = ids.shape[1]
    if isinstance(length, int):
        raise Refused(
            f"the token ids %{ids.name} have the static length {length}: a graph of new rows needs a dynamic one"
        )
    if not isinstance(length, sympy.Symbol):
        raise Refused(f"the token ids %{ids.name} have the computed length {length}")
    return length
