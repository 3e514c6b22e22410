"""What turning a graph into another one asks of the ONNX view: parts evaluated, inputs added, the signature set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import sympy

from ..errors import ElisionError, Refused
from .graph import Dim, Op, Value
from .onnx_names import unique_in
from .onnx_run import run_part
from .onnx_shapes import ShapeEnv, constant_tensor, symbol

if TYPE_CHECKING:
    from .onnx import OnnxGraph


def evaluate(
    graph: OnnxGraph, values: Sequence[Value], feeds: Mapping[Value, np.ndarray]
) -> list[np.ndarray]:
    """See `Graph.evaluate`."""
    known: dict[ir.Value, np.ndarray] = {value.raw: np.asarray(array) for value, array in feeds.items()}
    for value in values:
        tensor = constant_tensor(value.raw)
        if tensor is not None:
            known[value.raw] = tensor.numpy()
    open_values = [value.raw for value in values if value.raw not in known]
    bare = next((raw for raw in open_values if raw.producer() is None), None)
    if bare is not None:
        raise ElisionError(f"%{bare.name} depends on the input %{bare.name}, which is not fed")
    if open_values:
        inputs = {value.raw: np.asarray(array) for value, array in feeds.items()}
        known.update(zip(open_values, run_part(graph.env, open_values, inputs)))
    return [known[value.raw] for value in values]


# ---- inputs ------------------------------------------------------------------------------------------
def add_input(graph: OnnxGraph, name: str, dtype: str, shape: Sequence[Dim | str]) -> ir.Value:
    """See `Graph.add_input`; under another name for now where a value has this one."""
    dims = [own_symbol(graph, d) if isinstance(d, str) else d for d in shape]
    raw = ir.Value(
        name=graph.unique_name(name),
        shape=ir.Shape([d if isinstance(d, int) else str(d) for d in dims]),
        type=ir.TensorType(onnx_dtype(dtype)),
    )
    graph.model.graph.inputs.append(raw)
    graph.env.shapes[raw] = tuple(dims)
    return raw


def own_symbol(graph: OnnxGraph, name: str) -> sympy.Expr:
    """The symbol that `name` stands for in this graph's added inputs, different from every one of the file's."""
    if name not in graph.lengths:
        taken = {str(s) for dims in graph.env.shapes.values() for d in dims or () for s in free_symbols(d)}
        graph.lengths[name] = symbol(unique_in(taken, name))
    return graph.lengths[name]


def free_symbols(length: Dim) -> set[sympy.Basic]:
    return set() if isinstance(length, int) else length.free_symbols


def onnx_dtype(name: str) -> ir.DataType:
    """The ONNX type of a numpy name."""
    return ir.DataType[{"float32": "FLOAT", "float64": "DOUBLE"}.get(name, name.upper())]


# ---- plain operators ---------------------------------------------------------------------------------
def insert_plain(
    graph: OnnxGraph, kind: str, inputs: Sequence[Value], attrs: Mapping[str, Any], after: Op | None
) -> Value:
    """See `Graph.insert_plain`."""
    raws = [value.raw for value in inputs]
    if kind == "gather":
        return graph.insert_node("Gather", raws, {"axis": attrs["axis"]}, after=after)[0]
    if kind == "transpose":
        return graph.insert_node("Transpose", raws, {"perm": list(attrs["perm"])}, after=after)[0]
    if kind == "cast":
        return graph.insert_node("Cast", raws, {"to": onnx_dtype(attrs["dtype"])}, after=after)[0]
    if kind == "concat":
        return graph.insert_node("Concat", raws, {"axis": attrs["axis"]}, after=after)[0]
    if kind in ("matmul", "add"):
        return graph.insert_node({"matmul": "MatMul", "add": "Add"}[kind], raws, after=after)[0]
    if kind not in ("reshape", "expand"):
        raise ValueError(f"insert_plain knows no {kind}")
    x, dims = inputs[0], list(attrs["shape"])
    parts: list[int | ir.Value | None] = [d if isinstance(d, int) else None for d in dims]
    if kind == "reshape":
        for i, d in enumerate(dims):
            if parts[i] is None and x.shape is not None and i < len(x.shape) and x.shape[i] == d:
                parts[i] = 0
        if parts.count(None) == 1:
            parts[parts.index(None)] = -1
    elif x.shape is not None:
        for i, d in enumerate(dims):
            at = i - len(dims) + len(x.shape)
            if at >= 0 and x.shape[at] == d:
                parts[i] = 1
    made: list[int | ir.Value] = []
    for part, d in zip(parts, dims):
        if part is None:
            value, axis = source_of(graph, d, (), after)
            found = graph.insert_node("Shape", [value], {"start": axis, "end": axis + 1}, after=after)[0]
            after = found.producer
            made.append(found.raw)
        else:
            made.append(part)
    target, after = vector(graph, made, after)
    return graph.insert_node("Reshape" if kind == "reshape" else "Expand", [raws[0], target], after=after)[0]


def vector(graph: OnnxGraph, parts: Sequence[int | ir.Value], after: Op | None) -> tuple[ir.Value, Op | None]:
    """The int64 vector of numbers and one-element values, and the op it stands behind."""
    if all(isinstance(part, int) for part in parts):
        return graph.insert_constant(np.asarray(parts, np.int64), "shape").raw, after
    pieces = [
        graph.insert_constant(np.asarray([part], np.int64), "length").raw if isinstance(part, int) else part
        for part in parts
    ]
    whole = graph.insert_node("Concat", pieces, {"axis": 0}, after=after)[0]
    return whole.raw, whole.producer


def source_of(
    graph: OnnxGraph, length: Dim, without: Sequence[ir.Value], after: Op | None
) -> tuple[ir.Value, int]:
    """A value, known at `after`, and its axis of this symbolic length; inputs first. Raises Refused without one."""
    for raw in known_at(graph, after):
        shape = graph.env.shape(raw)
        if shape is not None and length in shape and raw not in without:
            return raw, shape.index(length)
    raise Refused(f"no input or value has the length {length}")


def known_at(graph: OnnxGraph, after: Op | None) -> Iterator[ir.Value]:
    yield from graph.model.graph.inputs
    for op in [] if after is None else graph.ops:
        yield from (value.raw for value in op.outputs)
        if op is after:
            return


# ---- the signature -----------------------------------------------------------------------------------
def set_signature(
    graph: OnnxGraph, inputs: Sequence[tuple[str, Value]], outputs: Sequence[tuple[str, Value]]
) -> None:
    """See `Graph.set_signature`."""
    model = graph.model.graph
    kept = [value.raw for _, value in inputs]
    stray = next((v for _, v in inputs if v.origin != "input"), None)
    if stray is not None:
        raise Refused(f"%{stray.name} is computed or constant, not an input")
    made: list[ir.Value] = []
    for name, value in outputs:
        raw: ir.Value = value.raw
        if raw.producer() is None or constant_tensor(raw) is not None or raw in made:
            after = value.producer or (graph.ops[-1] if graph.ops else None)
            raw = graph.insert_node("Identity", [raw], after=after, names=[f"{name}_given"])[0].raw
        made.append(raw)
    model.outputs.clear()
    model.outputs.extend(made)
    graph.outputs = [graph.value_of(raw) for raw in made]
    graph.remove_dead()
    for raw in list(model.inputs):
        if raw not in kept and raw.name not in model.initializers:
            drop_input(graph, raw, kept)
    model.inputs.clear()
    model.inputs.extend(kept)
    graph.inputs = [graph.value_of(raw) for raw in kept]
    graph.remove_dead()
    for raw in [*kept, *made]:  # out of each other's way first: names may be exchanged
        graph.rename(raw, graph.unique_name(f"{raw.name}_before"))
    for (name, _), raw in [*zip(inputs, kept), *zip(outputs, made)]:
        holder = next((v for v in graph.raw_values() if v.name == name and v is not raw), None)
        if holder is not None:
            graph.rename(holder, graph.unique_name(f"{name}_inner"))
        graph.rename(raw, name)


def drop_input(graph: OnnxGraph, raw: ir.Value, kept: Sequence[ir.Value]) -> None:
    """Let nothing read input `raw` any more: who wants a length of it reads that of another value."""
    shape = graph.env.shape(raw) or ()
    for use in list(raw.uses()):
        node = use.node
        if node.op_type != "Shape" or node.domain != "" or node.graph is not graph.model.graph:
            raise Refused(f"{node.op_type} '{node.name}' still reads the input '{raw.name}'")
        start = node.attributes.get_int("start", 0)
        end = node.attributes.get_int("end", len(shape))
        wanted = list(shape[start:end] if end >= 0 else shape[start : len(shape) + end])
        op = graph.op_of(node)
        position = graph.ops.index(op)
        after = graph.ops[position - 1] if position else None
        others = [v for v in graph.model.graph.inputs if v not in kept]
        parts: list[int | ir.Value] = []
        for length in wanted:
            if isinstance(length, int):
                parts.append(length)
                continue
            source, axis = source_of(graph, length, others, after)
            found = graph.insert_node("Shape", [source], {"start": axis, "end": axis + 1}, after=after)[0]
            after = found.producer
            parts.append(found.raw)
        whole, _ = vector(graph, parts, after)
        graph.replace_uses(op.output, graph.value_of(whole))
    graph.remove_dead()


# ---- lengths -----------------------------------------------------------------------------------------
def let_length(graph: OnnxGraph, raw: ir.Value, axis: int, length: Dim) -> None:
    """See `Graph.fix_length` and `same_length`; the caller builds its view anew. Raises Refused where the length is
    another number."""
    shape = graph.env.shape(raw)
    if shape is None:
        raise Refused(f"the rank of the input '{raw.name}' is not known")
    old = shape[axis]
    if old == length:
        return
    if isinstance(old, int):
        raise Refused(f"axis {axis} of the input '{raw.name}' has length {old}, not {length}")
    for value in graph.raw_values():
        if value.shape is None or constant_tensor(value) is not None:
            continue
        dims = graph.env.shape(value)
        if dims is not None and any(old in (d, *free_symbols(d)) for d in dims):
            changed = [d if isinstance(d, int) else sympy.sympify(d).subs(old, length) for d in dims]
            value.shape = ir.Shape(
                [int(d) if isinstance(d, int) or d.is_Integer else str(d) for d in changed]
            )
    graph.env = ShapeEnv(graph.model).run()
