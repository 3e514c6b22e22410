"""Reading a call of an fx graph: its arguments by schema name, its lengths as dims, its name as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import sympy
import torch
from torch import fx

from .graph import Dim, Shape

Path = tuple[str | int, int | None]
"""Where an operand stands in a call: the argument's schema name (its position for plain Python functions),
and the index inside it when the argument is a list of tensors."""

_CONSTANT_CHAIN = frozenset(
    {
        "aten::t",
        "aten::transpose",
        "aten::permute",
        "aten::to",
        "aten::_to_copy",
        "aten::detach",
        "aten::alias",
    }
)


@dataclass
class Spec:
    """What a row says about a call."""

    kind: str
    operands: list[Path]
    attrs: dict[str, Any] = field(default_factory=dict)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def as_dim(size: Any) -> Dim:
    """An axis length as an int or a sympy expression."""
    if isinstance(size, torch.SymInt):
        expr: Any = size.node.expr
        return int(expr) if expr.is_Integer else expr
    return int(size)


def as_shape(value: torch.Tensor) -> Shape:
    return tuple(as_dim(s) for s in value.shape)


def as_plain(arg: Any) -> Any:
    """A non-tensor argument for `attrs`: symbolic numbers become sympy expressions, dtypes numpy's names."""
    if isinstance(arg, fx.Node):
        value = arg.meta.get("val")
        if isinstance(value, torch.SymInt | torch.SymFloat):
            return value.node.expr
        return value if isinstance(value, int | float | bool) else None
    if isinstance(arg, torch.dtype):
        return dtype_name(arg)
    if isinstance(arg, list | tuple):
        return tuple(as_plain(a) for a in arg)
    if isinstance(arg, torch.device | torch.layout | torch.memory_format):
        return str(arg)
    return arg


def target_name(target: Any) -> str:
    """`aten::linear` for an ATen overload, `torch.sym_max` or `operator.mul` for a Python function."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order::{target.name()}"
    module = {"_operator": "operator", "builtins": "builtins"}.get(
        getattr(target, "__module__", "") or "", getattr(target, "__module__", "") or ""
    )
    return f"{module}.{getattr(target, '__name__', str(target))}"


def target_text(target: Any) -> str:
    """The short name for texts and messages: `aten.linear`, `elision.merge_tokens`, `operator.mul`."""
    return target_name(target).replace("::", ".")


@dataclass(frozen=True)
class Argument:
    name: str
    position: int
    default: Any
    kwarg_only: bool
    tensor: str  # "": not a tensor; "one": Tensor or Tensor?; "list": Tensor[] or Tensor?[]


@cache
def signature(target: Any) -> tuple[Argument, ...]:
    """The schema's arguments; empty for plain Python functions."""
    if not isinstance(target, torch._ops.OpOverload):
        return ()
    found = []
    for position, arg in enumerate(target._schema.arguments):
        kind = str(arg.type)
        tensor = (
            "list" if kind in ("List[Tensor]", "List[Optional[Tensor]]", "Optional[List[Tensor]]") else ""
        )
        if kind in ("Tensor", "Optional[Tensor]"):
            tensor = "one"
        default = arg.default_value if arg.has_default_value() else None
        found.append(Argument(arg.name, position, default, arg.kwarg_only, tensor))
    return tuple(found)


class Call:
    """An fx node, its arguments by schema name."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.signature = signature(node.target)
        self.named: dict[str | int, Any] = {}
        self.given: set[str | int] = set()
        if not self.signature:
            self.named = {**dict(enumerate(node.args)), **node.kwargs}
            self.given = set(self.named)
        for arg in self.signature:
            if arg.position < len(node.args):
                self.named[arg.name] = node.args[arg.position]
            elif arg.name in node.kwargs:
                self.named[arg.name] = node.kwargs[arg.name]
            else:
                self.named[arg.name] = arg.default
                continue
            self.given.add(arg.name)

    def __getitem__(self, name: str | int) -> Any:
        return self.named.get(name)

    def has(self, name: str) -> bool:
        return name in self.named

    def plain(self, name: str | int) -> Any:
        return as_plain(self.named.get(name))

    def shape(self, name: str | int) -> Shape:
        node = self.named[name]
        return as_shape(node.meta["val"])

    def rank(self, name: str | int) -> int:
        return len(self.named[name].meta["val"].shape)

    def axis(self, dim: Any, rank: int) -> int:
        axis = int(as_plain(dim))
        return axis + rank if axis < 0 else axis

    def axes(self, dims: Any, rank: int) -> tuple[int, ...]:
        """Non-negative axes; all of them for None and for an empty list."""
        if dims is None or (isinstance(dims, list | tuple) and not dims):
            return tuple(range(rank))
        if not isinstance(dims, list | tuple):
            dims = [dims]
        return tuple(sorted(self.axis(d, rank) for d in dims))

    @property
    def out_shape(self) -> Shape:
        value = self.node.meta["val"]
        return as_shape(value[0] if isinstance(value, list | tuple) else value)

    @property
    def out_shapes(self) -> list[Shape]:
        return [as_shape(v) for v in self.node.meta["val"]]

    def tensors(self) -> list[Path]:
        """Every tensor argument of the schema, the absent optional ones too."""
        found: list[Path] = []
        for arg in self.signature:
            value = self.named[arg.name]
            if arg.tensor == "list" and value is not None:
                found += [(arg.name, i) for i in range(len(value))]
            elif arg.tensor:
                found.append((arg.name, None))
        return found

    def numbers(self, skip: Sequence[str] = ()) -> dict[str, Any]:
        """The non-tensor arguments that were given, by schema name."""
        found = {}
        for arg in self.signature:
            value = self.named[arg.name]
            if arg.name in skip or arg.name not in self.given or value is None or arg.tensor == "list":
                continue
            if arg.tensor and isinstance(value, fx.Node):
                continue
            found[arg.name] = as_plain(value)
        return found

    def constant(self, name: str) -> bool:
        """Whether the argument is a parameter or constant, perhaps transposed or cast."""
        node = self.named[name]
        while isinstance(node, fx.Node) and node.op == "call_function":
            if target_name(node.target) not in _CONSTANT_CHAIN:
                return False
            node = node.args[0]
        return isinstance(node, fx.Node) and (
            node.op == "get_attr" or node.meta.get("elision_origin") in ("parameter", "constant")
        )


def is_symbolic_number(value: Any) -> bool:
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool)


def simplify(expr: Dim) -> Dim:
    if isinstance(expr, int):
        return expr
    expr = sympy.sympify(expr)
    return int(expr) if expr.is_Integer else expr


Row = Callable[[Call], Spec | None]
ROWS: dict[str, Row] = {}


def row(*names: str) -> Callable[[Row], Row]:
    def register(function: Row) -> Row:
        for name in names:
            ROWS[name if "::" in name or "." in name else f"aten::{name}"] = function
        return function

    return register


def at(*names: str | int) -> list[Path]:
    return [(name, None) for name in names]


def integer_index(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32, torch.int16)
