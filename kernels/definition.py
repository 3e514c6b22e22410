"""What an op of the dialect is: one record, from which registration, function bodies, tests and docs follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import torch

from .body import Body
from .lengths import Shape, numel

NAMESPACE = "elision"
OLDEST_OPSET = 18
"""The first ONNX operator set that the function bodies are written for."""

Attributes = dict[str, Any]
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


@dataclass(frozen=True)
class Attr:
    """An attribute: its type is that of the default; without a default (None) it is a required int."""

    name: str
    default: int | float | str | bool | None = None

    @property
    def kind(self) -> str:
        return "int" if self.default is None else type(self.default).__name__

    @property
    def schema(self) -> str:
        value = f"'{self.default}'" if isinstance(self.default, str) else str(self.default)
        return f"{self.kind} {self.name}" + ("" if self.default is None else f"={value}")


@dataclass(frozen=True)
class OpDef:
    """One op. Operands whose name ends in "?" are optional; attributes go by name only.

    reference: the op in plain ATen. torch decomposes it wherever it must see inside (autograd, Inductor, fake
    tensors, functorch), and keeps it whole in graphs of torch.export and of Dynamo.
    shapes, dtypes: output shapes and numpy dtype names, from those of the operands (None: absent). A length None is one
        that only the data say.
    bounds: the same shapes with the most that such a length can be, for ops that have one.
    body: writes the ONNX function; gets a `Body`, (rank, ONNX dtype) or None per operand, and the attributes.
    work: floating-point operations from operand shapes and attributes; traffic: elements read and written.
    custom: by operand, the element types that our library of custom ops takes. ONNX Runtime gives it every function of
    the op's name, so one for other types has another name.
    full_precision: runs outside autocast, which must not blur which tokens are alike.
    pinned: attributes that repeat lengths which the function body must know as numbers, from the operands' shapes.
    opaque_shapes: the reference's symbolic shapes are correct but roundabout; shape propagation takes `shapes`.
    mixes: how many of its first operand's last axes the op mixes, 1 for a product; all before are treated position by
    position. None: it mixes others.
    picks: the attribute with the axis of its result along which it takes rows of its first operand, those that the
        others name; all other axes but the batch's are treated entry by entry. "" where it does more.
    same_bits: what its kernels are for is that a row has the same bits among any number of rows, which the reference
    does not promise; they are taken wherever they can be, fast or not.
    chooses: its results are whole numbers or flags that jump where an operand changes by as little as rounding.
    source: where the op was described first.
    """

    name: str
    summary: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    reference: Callable[..., Any]
    shapes: Callable[[list[Any], Attributes], list[Shape]]
    dtypes: Callable[[list[Any], Attributes], list[str]]
    body: Callable[[Body, list[tuple[int, int] | None], Attributes], Sequence[str]]
    work: Callable[[list[Any], Attributes], Any]
    attrs: tuple[Attr, ...] = ()
    traffic: Callable[[list[Any], Attributes], Any] | None = None
    custom: dict[int, tuple[int, ...]] = field(default_factory=dict)
    full_precision: bool = True
    pinned: Callable[[list[Any], Attributes], Attributes] | None = None
    opaque_shapes: bool = False
    bounds: Callable[[list[Any], Attributes], list[Shape]] | None = None
    mixes: int | None = None
    picks: str = ""
    same_bits: bool = False
    chooses: bool = False
    source: str = ""
    _cache: dict[str, onnx.FunctionProto] = field(default_factory=dict, repr=False, compare=False, init=False)

    # ---- the schema ----------------------------------------------------------------------------------
    @property
    def schema(self) -> str:
        """The torch schema."""
        parts = [f"Tensor? {n[:-1]}=None" if n.endswith("?") else f"Tensor {n}" for n in self.inputs]
        if any(n.endswith("?") and not m.endswith("?") for n, m in zip(self.inputs, self.inputs[1:])):
            parts = [f"Tensor? {n[:-1]}" if n.endswith("?") else f"Tensor {n}" for n in self.inputs]
        if self.attrs:
            parts += ["*", *(a.schema for a in self.attrs)]
        outputs = ", ".join(f"Tensor {n}" for n in self.outputs)
        return f"{self.name}({', '.join(parts)}) -> {outputs if len(self.outputs) == 1 else f'({outputs})'}"

    def complete(self, attrs: Attributes) -> Attributes:
        """The attributes with the defaults filled in. Raises ValueError on an unknown or missing one."""
        known = {a.name: a for a in self.attrs}
        for name in attrs:
            if name not in known:
                raise ValueError(f"{self.name} has no attribute {name!r}, only {', '.join(known) or 'none'}")
        full: Attributes = {}
        for name, attr in known.items():
            if attr.default is None and name not in attrs:
                raise ValueError(f"{self.name} needs the attribute {name!r}")
            full[name] = attrs.get(name, attr.default)
        return full

    def pin(self, shapes: Sequence[Shape | None], attrs: Attributes) -> Attributes:
        """The attributes of a node for operands of these shapes, with what it repeats of them."""
        return attrs if self.pinned is None else {**attrs, **self.pinned(self._operands(shapes), attrs)}

    def spelled_out(self, *operands: Any, **attrs: Any) -> Any:
        """The reference, called as the torch op is: attributes that equal their default may be left out."""
        return self.reference(*operands, **self.complete(attrs))

    def _operands(self, given: Sequence[Any]) -> list[Any]:
        if len(given) > len(self.inputs):
            raise ValueError(f"{self.name} takes {len(self.inputs)} operands, not {len(given)}")
        return [*given, *[None] * (len(self.inputs) - len(given))]

    # ---- what follows from it ------------------------------------------------------------------------
    def output_shapes(self, shapes: Sequence[Shape | None], attrs: Attributes) -> list[Shape]:
        """Shapes of the outputs; lengths may be ints, SymInts or sympy expressions."""
        found = self.shapes(self._operands(shapes), self.complete(attrs))
        return [tuple(shape) for shape in found]

    def most(self, shapes: Sequence[Shape | None], attrs: Attributes) -> list[Shape]:
        """`output_shapes` with the bounds of lengths that only the data say, for an op that has `bounds`."""
        assert self.bounds is not None, self.name
        return [tuple(shape) for shape in self.bounds(self._operands(shapes), self.complete(attrs))]

    def output_dtypes(self, dtypes: Sequence[str | None], attrs: Attributes) -> list[str]:
        """numpy names of the outputs' element types."""
        return self.dtypes(self._operands(dtypes), self.complete(attrs))

    def flops(self, shapes: Sequence[Shape | None], attrs: Attributes) -> Any:
        """Floating-point operations, two to a multiply-add."""
        return self.work(self._operands(shapes), self.complete(attrs))

    def bytes(self, shapes: Sequence[Shape | None], attrs: Attributes, itemsize: int = 4) -> Any:
        """Bytes read and written at least once."""
        full, attrs = self._operands(shapes), self.complete(attrs)
        if self.traffic is not None:
            return self.traffic(full, attrs) * itemsize
        outputs = self.shapes(full, attrs)
        return sum(numel(shape) for shape in [*full, *outputs]) * itemsize

    def onnx_function(
        self, inputs: Sequence[tuple[int, int] | None], attrs: Attributes, opset: int = 20
    ) -> onnx.FunctionProto:
        """The op as an ONNX function of standard operators, for operands of these (rank, ONNX dtype).

        name is the op's name, with a suffix where an element type is none of `custom`; `overload` tells the
        variants apart. Every attribute is declared with its value as default; the body is written for just these
        values. Raises ValueError below opset 18."""
        if opset < OLDEST_OPSET:
            raise ValueError(f"{self.name} needs operator set {OLDEST_OPSET}, not {opset}")
        operands, attrs = self._operands(inputs), self.complete(attrs)
        others = [
            Body.short_type(o[1])
            for i, types in self.custom.items()
            if (o := operands[i]) is not None and o[1] not in types
        ]
        body = Body(opset, "_".join([self.name, *dict.fromkeys(others)]))
        types = ["_" if o is None else f"{o[0]}{body.short_type(o[1])}" for o in operands]
        key = ",".join([*types, *(f"{k}={_text(v)}" for k, v in attrs.items()), f"opset={opset}"])
        if key not in self._cache:
            names = [n.removesuffix("?") for n in self.inputs]
            results = self.body(body, operands, attrs)
            parts = [f"{k}={'*' if k in body.references else _text(v)}" for k, v in attrs.items()]
            overload = ",".join([*types, *parts, f"opset={opset}"])
            self._cache[key] = body.function(overload, names, self.outputs, results, attrs)
        return self._cache[key]

    def decompositions(self) -> dict[Any, Callable[..., Any]]:
        """The entry of torch's decomposition table."""
        return {getattr(getattr(torch.ops, NAMESPACE), self.name).default: self._call}

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = self.complete(kwargs)  # the dispatcher leaves out what equals the schema's default
        tensor = next(a for a in args if a is not None)
        if self.opaque_shapes and _only_shapes_matter(args):
            shapes = self.output_shapes([None if a is None else tuple(a.shape) for a in args], kwargs)
            dtypes = self.output_dtypes([None] * len(args), kwargs)
            return tuple(tensor.new_empty(s, dtype=getattr(torch, d)) for s, d in zip(shapes, dtypes))
        device = tensor.device.type
        if self.full_precision and torch.amp.is_autocast_available(device):  # noqa: SIM102
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return self.reference(*args, **kwargs)
        return self.reference(*args, **kwargs)

    def register(self) -> None:
        """Make the op known to torch.

        CompositeImplicitAutograd: the reference runs below it, so gradients, fake tensors with symbolic lengths,
        and Inductor's view into it need no second definition. Pre-dispatch traces keep the op whole."""
        _LIBRARY.define(self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(self.name, self._call, "CompositeImplicitAutograd")


def _only_shapes_matter(args: Sequence[Any]) -> bool:
    """Is this a walk over fake tensors of symbolic shape that records no operations?"""
    if not any(isinstance(length, torch.SymInt) for a in args if a is not None for length in a.shape):
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None


def _text(value: Any) -> str:
    return format(value, "g") if isinstance(value, float) else str(value)
