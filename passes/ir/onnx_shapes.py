"""Symbolic shapes for an onnx-ir graph: one sympy expression per axis, and the small integer tensors that say shapes.

ONNX's own inference loses an axis as soon as it passes through a Shape-Gather-Concat chain. Here the values of
such chains are carried along as sympy expressions, so that a model with a free batch or sequence axis still
has a full shape on every value. `ShapeEnv.update(node)` works on one node, so an editor can call it again
after a change. The per-operator rules stand in `onnx_shape_rules.py`, the value rules in `onnx_data_rules.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import sympy
from onnx_ir._symbolic_shapes import parse_symbolic_expression

from .graph import Dim, Shape

SMALL = 1024
"""Constants of at most this many elements may take part in shape arithmetic."""

LONGEST = 2**63 - 1
"""What a length in a file can say at most."""

MALFORMED = (IndexError, TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError, OverflowError)
"""What a rule may raise on a node whose operands or attributes are not what its operator says."""


def dim(value: Any) -> Dim:
    """A Python int where `value` is one, a sympy expression otherwise."""
    if isinstance(value, (int, np.integer)):
        return int(value)
    if value.is_Integer:
        return int(value)
    return value


def symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, positive=True)


def parse_dim(text: str) -> sympy.Expr | int:
    """The expression that a `dim_param` spells; a plain symbol of that name where it is not simple arithmetic."""
    if re.fullmatch(r"[A-Za-z_][\w.]*", text):
        return symbol(text)
    if len(text) <= 200 and "**" not in text and "^" not in text:
        try:
            return dim(parse_symbolic_expression(text))
        except (ValueError, TypeError, RecursionError, ZeroDivisionError, AttributeError):
            return symbol(text)
    return symbol(text)


def _possible(shapes: Sequence[Iterable[Dim] | None] | None) -> list[Shape | None] | None:
    """The shapes, as tuples. Raises ValueError for a length that none can be: data of another type were read as one."""
    found = None if shapes is None else [None if s is None else tuple(dim(d) for d in s) for s in shapes]
    for shape in found or ():
        for length in shape or ():
            if isinstance(length, int) and not 0 <= length <= LONGEST:
                raise ValueError(f"a length of {length}")
    return found


def broadcast_dim(a: Dim, b: Dim) -> Dim:
    """The length two axes broadcast to. Two different symbols are taken to be equal at run time: the simpler wins."""
    if a == b or b == 1:
        return a
    if a == 1:
        return b
    if isinstance(a, int):
        return a
    if isinstance(b, int):
        return b
    return a if (sympy.count_ops(a), str(a)) <= (sympy.count_ops(b), str(b)) else b


def broadcast(*shapes: Shape | None) -> Shape | None:
    """NumPy broadcasting of shapes that may be symbolic; None when one rank is unknown."""
    known = [s for s in shapes if s is not None]
    if len(known) != len(shapes):
        return None
    rank = max((len(s) for s in known), default=0)
    out: list[Dim] = []
    for axis in range(rank):
        length: Dim = 1
        for shape in known:
            position = axis - rank + len(shape)
            if position >= 0:
                length = broadcast_dim(length, shape[position])
        out.append(length)
    return tuple(out)


def quotient(total: Dim, part: Dim) -> Dim:
    """total / part where it is known to divide exactly (the -1 of a Reshape)."""
    if isinstance(total, int) and isinstance(part, int):
        if part <= 0 or total % part:
            raise ValueError(f"{total} elements do not divide into {part}")
        return total // part
    ratio = sympy.sympify(total) / part
    if ratio.is_integer or ratio.is_Integer:
        return dim(ratio)
    ratio = sympy.cancel(ratio)
    return dim(ratio if ratio.is_integer else sympy.floor(ratio))


def floor_div(a: Dim, b: Dim) -> Dim:
    """a // b for lengths."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    return dim(sympy.floor(sympy.sympify(a) / b))


def numpy_dtype(dtype: ir.DataType | None) -> str:
    """NumPy's name of an ONNX type ("float32", "bfloat16", ...); "unknown" when the type is not known."""
    if dtype is None or dtype == ir.DataType.UNDEFINED:
        return "unknown"
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node, None for computed values, inputs and absent operands."""
    if value is None:
        return None
    if value.const_value is not None:
        # An initializer that is an input too may be overridden by the caller: it is no constant.
        return None if value.is_graph_input() else value.const_value
    node = value.producer()
    if node is not None and node.op_type == "Constant" and node.domain == "":
        return ir.convenience.get_const_tensor(value)
    return None


def tensor_shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The lengths of a tensor, which are always ints."""
    return tuple(d for d in tensor.shape if isinstance(d, int))


class ShapeEnv:
    """Shapes of all values of one graph, and the contents of its small integer values."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.shapes: dict[ir.Value, Shape | None] = {}
        self.data: dict[ir.Value, np.ndarray] = {}
        self.notes: list[str] = []
        self.trust_declared = True  # False once the graph was edited: what its file said is then old
        self._constants: dict[ir.Value, np.ndarray] = {}
        self._declared: dict[ir.Value, Shape | None] = {}

    def run(self) -> ShapeEnv:
        """Infer every value of the main graph, in order."""
        graph = self.model.graph
        for value in graph.inputs:
            self.shapes[value] = self.declared(value)
        for node in graph:
            self.update(node)
        return self

    # ---- reading -------------------------------------------------------------------------------------
    def declared(self, value: ir.Value) -> Shape | None:
        """What the file itself says of a value's shape; nameless axes get a symbol of their own."""
        if value in self._declared:
            return self._declared[value]
        shape: Shape | None = None
        if value.shape is not None:
            shape = tuple(
                d if isinstance(d, int) else parse_dim(d.value) if d.value else symbol(f"{clean(value)}_d{i}")
                for i, d in enumerate(value.shape)
            )
        self._declared[value] = shape
        return shape

    def shape(self, value: ir.Value | None) -> Shape | None:
        if value is None:
            return None
        if value in self.shapes:
            return self.shapes[value]
        tensor = constant_tensor(value)
        shape = tensor_shape(tensor) if tensor is not None else self.declared(value)
        self.shapes[value] = shape
        return shape

    def need(self, value: ir.Value | None) -> Shape:
        """Like `shape`, for rules that cannot go on without one."""
        shape = self.shape(value)
        if shape is None:
            raise ValueError("an operand of unknown rank")
        return shape

    def constant(self, value: ir.Value | None) -> np.ndarray | None:
        """The array of a small constant."""
        if value is None:
            return None
        if value in self._constants:
            return self._constants[value]
        tensor = constant_tensor(value)
        if tensor is None or tensor.size > SMALL:
            return None
        array = tensor.numpy()
        self._constants[value] = array
        return array

    def contents(self, value: ir.Value | None) -> np.ndarray | None:
        """What is known of a small value's elements: an object array of int, sympy expression or None (unknown)."""
        if value is None:
            return None
        if value in self.data:
            return self.data[value]
        array = self.constant(value)
        if array is None or array.ndim > 1:
            return None
        if array.dtype.kind in "iu":
            return array.astype(object)
        if array.dtype.kind == "b":
            return array.astype(np.int64).astype(object)
        if array.dtype.kind == "f" and np.isfinite(array).all():
            flat = [sympy.Rational(float(x)) for x in array.ravel()]
            out = np.empty(array.shape, object)
            out.ravel()[:] = [int(x) if x.is_Integer else x for x in flat]
            return out
        return None

    def ints(self, value: ir.Value | None) -> list[Any] | None:
        """`contents` as a flat list."""
        array = self.contents(value)
        return None if array is None else list(array.ravel())

    def known_ints(self, value: ir.Value | None) -> list[int] | None:
        """`contents` as a flat list, None unless every element is a plain int."""
        flat = self.ints(value)
        return None if flat is None or not all(isinstance(x, int) for x in flat) else flat

    # ---- writing -------------------------------------------------------------------------------------
    def update(self, node: ir.Node) -> None:
        """Infer the outputs of one node from its operands."""
        from .onnx_data_rules import contents_of
        from .onnx_dtypes import dtypes_of
        from .onnx_shape_rules import shapes_of

        try:
            shapes = _possible(shapes_of(self, node))
        except MALFORMED as error:
            self.notes.append(f"{node.op_type} {node.name or ''}: no shape ({error})")
            shapes = None
        if shapes is None:
            shapes = [self.declared(out) for out in node.outputs]
        for index, out in enumerate(node.outputs):
            shape = shapes[index] if index < len(shapes) else None
            self.set_shape(out, shape)
        for out, dtype in zip(node.outputs, dtypes_of(node)):
            if dtype is not None and out.dtype != dtype:
                out.dtype = dtype
        for out in node.outputs:
            self.data.pop(out, None)
        try:
            array = contents_of(self, node)
        except MALFORMED:
            array = None
        if array is not None and array.size <= SMALL:
            self.data[node.outputs[0]] = array

    def set_shape(self, value: ir.Value, shape: Iterable[Dim] | None) -> None:
        """Record a shape here and in the model's own value info."""
        dims = None if shape is None else tuple(dim(d) for d in shape)
        self.shapes[value] = dims
        if dims is None:
            return
        declared = ir.Shape([d if isinstance(d, int) else str(d) for d in dims])
        if value.shape != declared and not value.is_graph_input():
            value.shape = declared

    def forget(self, value: ir.Value) -> None:
        for table in (self.shapes, self.data, self._constants, self._declared):
            table.pop(value, None)

    def fresh(self, value: ir.Value, axis: int) -> sympy.Symbol:
        """The symbol of an axis whose length only the run knows; the same one every time it is asked for."""
        declared = value.shape
        if self.trust_declared and declared is not None and axis < len(declared):
            entry = declared[axis]
            if not isinstance(entry, int) and entry.value and re.fullmatch(r"[A-Za-z_]\w*", entry.value):
                return symbol(entry.value)
        return symbol(f"{clean(value)}_d{axis}")


def clean(value: ir.Value) -> str:
    """A value's name as an identifier."""
    return re.sub(r"\W", "_", value.name or "value")


def infer_with_onnx(env: ShapeEnv, node: ir.Node) -> list[Shape | None] | None:
    """onnx's own rule for one node, for operators that our table does not list."""
    version = env.model.opset_imports.get(node.domain)
    if version is None or not onnx.defs.has(node.op_type, version, node.domain):
        return None
    try:
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        proto = ir.serde.serialize_node(node)
        types: dict[str, onnx.TypeProto] = {}
        arrays: dict[str, onnx.TensorProto] = {}
        for value in node.inputs:
            if value is None or not value.name:
                continue
            shape = env.shape(value)
            if value.dtype is None or shape is None:
                return None
            types[value.name] = onnx.helper.make_tensor_type_proto(
                int(value.dtype), [d if isinstance(d, int) else str(d) for d in shape]
            )
            array = env.constant(value)
            if array is not None:
                arrays[value.name] = onnx.numpy_helper.from_array(array, value.name)
        results = onnx.shape_inference.infer_node_outputs(schema, proto, types, arrays)
    except (RuntimeError, ValueError, TypeError, onnx.shape_inference.InferenceError):
        return None
    out: list[Shape | None] = []
    for value in node.outputs:
        result = results.get(value.name or "")
        if result is None or not result.HasField("tensor_type"):
            out.append(None)
            continue
        if value.dtype is None and result.tensor_type.elem_type:
            value.dtype = ir.DataType(result.tensor_type.elem_type)
        if not result.tensor_type.HasField("shape"):
            out.append(None)
            continue
        out.append(
            tuple(
                d.dim_value
                if d.HasField("dim_value")
                else parse_dim(d.dim_param)
                if d.dim_param
                else env.fresh(value, i)
                for i, d in enumerate(result.tensor_type.shape.dim)
            )
        )
    return out
