"""One view of a graph for both hosts: values, operations under canonical names, and the editing primitives.

Two adapters fill it in: `fx.py` (torch.fx, at the level of torch.export) and `onnx.py` (onnx-ir). Analyses
and passes see only what is written here. `docs/ir.md` lists the canonical kinds and their attributes.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import numpy as np
import sympy

from ..errors import ElisionError

Dim = int | sympy.Expr
"""An axis length: an int where it is static, a sympy expression where it is symbolic."""

Shape = tuple[Dim, ...]

# Kinds and the attributes an adapter must give. Operands are always positional, in this order; an absent
# optional operand is None. Axes are non-negative.
KINDS: dict[str, str] = {
    "elementwise": "operands broadcast together, trailing axes aligned. fn: the operation's plain name "
    "(add, mul, gelu, where, cast, dropout, eq, ...)",
    "linear": "x[..., i], weight, bias?. transposed: True when weight is [o, i], False when [i, o]",
    "matmul": "a[..., m, k], b[..., k, n], batch axes broadcast",
    "norm": "x, weight?, bias?. axes: the axes that are averaged over; fn: layer_norm, rms_norm, group_norm, ...",
    "softmax": "x. axis; fn: softmax or log_softmax",
    "reduce": "x. axes, keepdim, fn: mean, sum, max, min, prod, any, all, argmax, argmin, norm, var, ...",
    "reshape": "x (view, flatten, squeeze, unsqueeze, ...): same elements in the same order",
    "transpose": "x. perm",
    "expand": "x: broadcast to the output's shape",
    "concat": "x0, x1, .... axis",
    "stack": "x0, x1, .... axis (a new one)",
    "split": "x -> one output per part. axis, sizes",
    "unbind": "x -> one output per index, the axis is gone. axis",
    "slice": "x. axis, start, end (None: to the end), step. One axis per op; starts and ends already >= 0 "
    "where the length is static",
    "select": "x. axis, index: one position, the axis is gone",
    "gather": "x, indices: numpy.take along axis (indices' axes replace it). axis",
    "embedding": "table[v, c], ids[...] -> [..., c]",
    "attention": "q[..., h, n, d], k[..., hk, m, d], v[..., hk, m, e], mask?. scale, causal, softcap (only where "
    "scores are capped: softcap * tanh(scores / softcap), before the mask); mask is bool (True: may attend) or "
    "additive and broadcasts to [..., h, n, m]; hk divides h",
    "conv": "x[b, c, *spatial], weight, bias? (also conv_transpose). spatial: the spatial axes of x and output",
    "spatial": "x: pooling, resize, pad, roll, pixel shuffle, cumsum, sort, fold: mixes positions along `axes`",
    "scatter": "x, ...: writes into a copy of x along `axes`",
    "size": "x -> an integer, the length of axis",
    "create": "no data operand: arange, zeros, full, eye; the length may be symbolic",
    "tie": "x: detach, contiguous, identity, clone, alias",
    "elision": "an op of our own dialect; target names it",
    "output": "never used by adapters",
    "unknown": "an op with no axis signature",
}


@dataclass(eq=False)
class Value:
    """One SSA value. `shape` is None only when the host does not know the rank. `dtype` is numpy's name
    ("float32", "bfloat16", "int64", "bool", ...)."""

    name: str
    shape: Shape | None
    dtype: str
    producer: Op | None = None
    index: int = 0
    origin: str = "op"  # op | input | parameter | constant
    raw: Any = None
    users: list[tuple[Op, int]] = field(default_factory=list)

    @property
    def rank(self) -> int:
        return -1 if self.shape is None else len(self.shape)

    def __repr__(self) -> str:
        dims = "?" if self.shape is None else ", ".join(str(d) for d in self.shape)
        return f"%{self.name}: {self.dtype}[{dims}]"


@dataclass(eq=False)
class Op:
    """One operation. `kind` is one of KINDS; `target` is the host's own name for messages and diffs."""

    kind: str
    target: str
    name: str
    inputs: list[Value | None]
    outputs: list[Value]
    attrs: dict[str, Any] = field(default_factory=dict)
    raw: Any = None
    shape_inputs: list[Value] = field(default_factory=list)  # values that only say a shape, never data

    @property
    def output(self) -> Value:
        return self.outputs[0]

    def operand(self, index: int) -> Value | None:
        return self.inputs[index] if index < len(self.inputs) else None

    def __repr__(self) -> str:
        ins = ", ".join("-" if v is None else f"%{v.name}" for v in self.inputs)
        return f"{self.output!r} = {self.target}({ins})"


class Graph(abc.ABC):
    """A mutable graph in one of the two hosts.

    `ops` is always in topological order. The editing primitives keep it so; after each one the view is in
    step with the host's graph, so that a pass may go on reading.
    """

    host: str = ""
    ops: list[Op]
    inputs: list[Value]  # real inputs only, not parameters
    outputs: list[Value]  # tensor outputs, in order

    # ---- reading -------------------------------------------------------------------------------------
    @abc.abstractmethod
    def constant_value(self, value: Value) -> np.ndarray | None:
        """The data of a parameter or constant (host memory), None when `value` is computed or an input."""

    @abc.abstractmethod
    def text(self) -> list[str]:
        """The graph as stable lines of text, one op a line, for snapshots and diffs."""

    @abc.abstractmethod
    def copy(self) -> Graph:
        """An independent copy: editing one leaves the other as it was (weights are shared). Values keep their
        names."""

    @abc.abstractmethod
    def verify(self) -> None:
        """Check structure, shapes and dtypes with the host's own tools; raise VerificationError."""

    # ---- editing -------------------------------------------------------------------------------------
    @abc.abstractmethod
    def insert(
        self,
        op: str,
        inputs: Sequence[Value | None],
        attrs: dict[str, Any] | None = None,
        *,
        after: Op | None,
    ) -> list[Value]:
        """Insert dialect op `op` right after `after` (None: before every op). Returns its outputs."""

    @abc.abstractmethod
    def insert_constant(self, array: np.ndarray, name: str) -> Value:
        """A new constant of the graph."""

    def insert_parameter(self, array: np.ndarray, name: str) -> Value:
        """A new parameter: what training may change. A host that does not train has it as a constant."""
        return self.insert_constant(array, name)

    @abc.abstractmethod
    def set_operand(self, op: Op, index: int, value: Value) -> None:
        """Let operand `index` of `op` be `value`."""

    @abc.abstractmethod
    def replace_output(self, index: int, value: Value) -> None:
        """Let graph output `index` be `value` (the output keeps its name and place)."""

    @abc.abstractmethod
    def set_length(self, op: Op, axis: int, like: Value, like_axis: int) -> None:
        """Rewrite the shape argument of a reshape, expand, create or slice so that output `axis` is as long
        as `like`'s `like_axis` (a constant where that is static). The op's own operands are not changed."""

    @abc.abstractmethod
    def refresh(self, op: Op) -> None:
        """Recompute shapes and dtypes of `op`'s outputs from its operands."""

    @abc.abstractmethod
    def add_output(self, value: Value, name: str) -> None:
        """Let `value` also be an output of the graph."""

    @abc.abstractmethod
    def remove_dead(self) -> int:
        """Remove ops that reach no output; returns how many."""

    # ---- inputs and outputs --------------------------------------------------------------------------
    def evaluate(self, values: Sequence[Value], feeds: Mapping[Value, np.ndarray]) -> list[np.ndarray]:
        """The data of `values` when the inputs, or values between, in `feeds` hold these arrays: only what is behind
        `values` and not behind those runs, and symbolic lengths follow the arrays. Every input that is left must be
        fed, one that only a length is taken from too. Bits are those of the host's own plain operators; bfloat16
        comes as ml_dtypes'. The graph is not changed. Raises ElisionError when it cannot run (one line: the host's
        reason)."""
        raise ElisionError(f"a graph of {self.host} cannot be evaluated in part")

    def add_input(self, name: str, dtype: str, shape: Sequence[Dim | str]) -> Value:
        """A new input behind the present ones, which a call of the graph gives last or by this name. A string in
        `shape` is a new symbolic length of that name, the same for the same string in all of this graph's calls; a
        sympy dim must be one the graph knows."""
        raise ElisionError(f"a graph of {self.host} cannot be given inputs")

    def insert_plain(
        self, kind: str, inputs: Sequence[Value], attrs: dict[str, Any], *, after: Op | None
    ) -> Value:
        """Insert one of the host's own operators right after `after` (None: before every op). kind and attrs:
        gather {axis} (indices int64 [n], within the axis), reshape {shape}, expand {shape}, transpose {perm},
        cast {dtype}, concat {axis}, matmul {}, add {}; a shape's dims may be symbolic. Returns its output."""
        raise ElisionError(f"a graph of {self.host} cannot be given plain ops")

    def repeat(self, op: Op, inputs: Sequence[Value | None], *, after: Op | None) -> list[Value]:
        """Insert `op` once more right after `after`, over other operands, everything else as it is: attributes, and
        lengths that it says in numbers. Returns its outputs. Raises VerificationError when it cannot take them."""
        raise ElisionError(f"a graph of {self.host} cannot repeat an op")

    def hoist(self, value: Value, after: Op | None) -> Op | None:
        """Move the ops that `value` is made of and that come later than `after` to right behind it, in their order.
        Returns the last of them, `after` where there are none."""
        raise ElisionError(f"a graph of {self.host} cannot move ops")

    def _move(self, late: Sequence[Op], after: Op | None) -> Op | None:
        """Keep `ops` in step with the host's graph, in which the ops `late` now stand right behind `after`."""
        moved = set(late)
        rest = [op for op in self.ops if op not in moved]
        place = 0 if after is None else rest.index(after) + 1
        self.ops[:] = [*rest[:place], *late, *rest[place:]]
        return late[-1] if late else after

    def set_signature(
        self, inputs: Sequence[tuple[str, Value]], outputs: Sequence[tuple[str, Value]]
    ) -> None:
        """Let the graph take exactly these inputs, positionally and in this order, and give these outputs as one
        flat list, all under the given names (a host that cannot spell a name keeps it in `input_names` and
        `output_names`). Dead ops go first. A length read off an input that goes is read off another input or
        value of the same length; raises Refused when an input that goes is still needed otherwise."""
        raise ElisionError(f"a graph of {self.host} cannot be given another signature")

    def fix_length(self, value: Value, axis: int, length: int) -> None:
        """Let the symbolic length of input `value`'s `axis` be the number `length`, everywhere in the graph.
        The view is built anew: ops and values that the caller holds are void."""
        raise ElisionError(f"a graph of {self.host} cannot have a length fixed")

    def same_length(self, value: Value, axis: int, like: Value, like_axis: int) -> None:
        """Let the symbolic length of input `value`'s `axis` be that of input `like`'s `like_axis`, everywhere in the
        graph. The view is built anew, as by `fix_length`."""
        raise ElisionError(f"a graph of {self.host} cannot have lengths made equal")

    # ---- shared --------------------------------------------------------------------------------------
    def replace_uses(self, old: Value, new: Value) -> None:
        """Let every use of `old`, graph outputs too, be a use of `new`. Shapes further down are not refreshed."""
        for op, index in list(old.users):
            self.set_operand(op, index, new)
        for index, value in enumerate(self.outputs):
            if value is old:
                self.replace_output(index, new)

    @property
    def input_names(self) -> list[str]:
        """The names of the inputs, in order, as `set_signature` was told them."""
        return [value.name for value in self.inputs]

    @property
    def output_names(self) -> list[str]:
        """The names of the outputs, in order, as `set_signature` was told them."""
        return [value.name for value in self.outputs]

    def values(self) -> Iterator[Value]:
        seen: set[int] = set()
        for op in self.ops:
            for value in [*op.inputs, *op.outputs]:
                if value is not None and id(value) not in seen:
                    seen.add(id(value))
                    yield value

    def ops_of(self, *kinds: str) -> list[Op]:
        return [op for op in self.ops if op.kind in kinds]

    def is_constant(self, value: Value) -> bool:
        return value.origin in ("parameter", "constant")

    def to_networkx(self) -> nx.MultiDiGraph:
        """Operations as nodes (graph inputs and constants too), values as edges."""
        graph: nx.MultiDiGraph = nx.MultiDiGraph()
        for op in self.ops:
            graph.add_node(op, kind=op.kind, label=op.target)
            for index, value in enumerate(op.inputs):
                if value is None:
                    continue
                source: Op | Value = value.producer or value
                if source is value:
                    graph.add_node(value, kind=value.origin, label=value.name)
                graph.add_edge(source, op, value=value, index=index)
        return graph


def static(dims: Iterable[Dim] | None) -> tuple[int, ...] | None:
    """The dims as ints, or None when one of them is symbolic or the shape is unknown."""
    if dims is None:
        return None
    dims = tuple(dims)
    return tuple(int(d) for d in dims) if all(isinstance(d, int) or d.is_Integer for d in dims) else None


def product(dims: Iterable[Dim]) -> Dim:
    total: Dim = 1
    for dim in dims:
        total = total * dim
    return total
