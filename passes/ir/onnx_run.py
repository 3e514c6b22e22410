"""Running a piece of a graph in ONNX Runtime: the one place below the runtime that starts a session.

What is folded or evaluated has then the bits that the run itself would have given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import sympy

from ..errors import ElisionError
from .onnx_names import unique_in
from .onnx_shapes import ShapeEnv, dim


def run_model(model: ir.Model, feeds: Mapping[str, np.ndarray], optimise: bool = False) -> list[np.ndarray]:
    """All outputs of a small model, on one thread; bfloat16 as ml_dtypes has it. `model` may be changed.

    Raises ElisionError, with ONNX Runtime's own first line, when it cannot run it."""
    import onnxruntime

    outputs = list(model.graph.outputs)
    narrow = [i for i, value in enumerate(outputs) if value.dtype == ir.DataType.BFLOAT16]
    for i in narrow:  # its binding hands out no bfloat16; the cast there and back keeps every bit
        node = ir.node("Cast", [outputs[i]], {"to": ir.DataType.FLOAT})
        node.outputs[0].name = unique_in({v.name for v in model.graph.outputs}, f"{outputs[i].name}_wide")
        node.outputs[0].dtype = ir.DataType.FLOAT
        model.graph.append(node)
        model.graph.outputs[i] = node.outputs[0]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        results = [np.asarray(r) for r in session.run(None, dict(feeds))]
    except Exception as error:  # whatever ONNX Runtime objects to is one fact about these nodes
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise ElisionError(first[:160]) from error
    for i in narrow:
        results[i] = results[i].astype(ir.DataType.BFLOAT16.numpy())
    return results


def run_part(
    env: ShapeEnv, wanted: Sequence[ir.Value], feeds: Mapping[ir.Value, np.ndarray]
) -> list[np.ndarray]:
    """The data of computed values, given that of the inputs behind them; the model is not changed.

    Lengths that a Shape reads follow from those of the feeds: what only has that length does not run. Raises
    ElisionError when an input that the values depend on is not fed, or when they cannot run."""
    model, known = env.model, {**feeds, **lengths_read(env, feeds)}
    unique = [value for value in dict.fromkeys(wanted) if value not in known]
    given = boundary(unique, known)
    missing = next((value for value in given if value not in known), None)
    if missing is not None:
        raise ElisionError(f"%{unique[0].name} depends on the input %{missing.name}, which is not fed")
    if unique:
        known |= zip(unique, run_extract(model, given, unique, known))
    return [known[value] for value in wanted]


def run_extract(
    model: ir.Model,
    given: Sequence[ir.Value],
    wanted: Sequence[ir.Value],
    known: Mapping[ir.Value, np.ndarray],
) -> list[np.ndarray]:
    """`wanted` from `given`, in a model that holds no more than what is between them."""
    graph = ir.convenience.extract(model.graph, given, wanted)
    for inner, outer in zip(graph.inputs, given):
        inner.shape, inner.dtype = ir.Shape(known[outer].shape), ir.DataType.from_numpy(known[outer].dtype)
    for name, held in list(graph.initializers.items()):
        if not held.uses() and not held.is_graph_output():
            del graph.initializers[name]
        elif isinstance(held.const_value, ir.ExternalTensor):
            held.const_value = inside(held.const_value)
    for node in graph:
        for out in node.outputs:
            out.shape = None  # symbols of the file, which the lengths of this run may contradict
    part = ir.Model(graph, ir_version=min(model.ir_version or 10, 10))
    part.opset_imports.update(model.opset_imports)
    called = {node.op_identifier() for node in graph.all_nodes()}
    for key, function in model.functions.items():
        if key in called:
            part.functions[key] = function
    named = {v.name or "": known[v] for v in given}
    # ONNX Runtime's own Attention does not take every mask that the operator allows: spelled out it runs.
    attentions = any(node.op_type == "Attention" and node.domain == "" for node in part.graph)
    spare = part.clone() if attentions else None  # functions too, which the model shares with the part
    try:
        return run_model(part, named)
    except ElisionError:
        if spare is None:
            raise
    from ..onnx.lower import lower

    lower(spare)
    return run_model(spare, named)


def lengths_read(env: ShapeEnv, feeds: Mapping[ir.Value, np.ndarray]) -> dict[ir.Value, np.ndarray]:
    """What the Shape nodes give whose lengths the feeds decide."""
    lengths: dict[sympy.Basic, int] = {}
    for value, array in feeds.items():
        for axis, length in zip(env.shape(value) or (), array.shape):
            if isinstance(axis, sympy.Symbol):
                lengths[axis] = length
    found: dict[ir.Value, np.ndarray] = {}
    for node in env.model.graph:
        shape = env.shape(node.inputs[0]) if node.op_type == "Shape" and node.domain == "" else None
        if shape is None or node.inputs[0] in feeds:
            continue
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(shape))
        dims = [d if isinstance(d, int) else dim(d.xreplace(lengths)) for d in shape[start:end]]
        if all(isinstance(d, int) for d in dims):
            found[node.outputs[0]] = np.array(dims, np.int64)
    return found


def inside(tensor: ir.ExternalTensor) -> ir.LazyTensor:
    """The tensor to be written into a message. Its file stays mapped: arrays that analyses keep may lie there."""
    return ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy(), dtype=tensor.dtype),
        dtype=tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
    )


def boundary(wanted: Sequence[ir.Value], known: Mapping[ir.Value, np.ndarray]) -> list[ir.Value]:
    """Where a walk back from `wanted` ends: known values, and inputs (no weights)."""
    queue, seen = list(wanted), set(wanted)
    ends: dict[ir.Value, None] = {}
    while queue:
        value = queue.pop()
        node = value.producer()
        if value in known or value.is_graph_input():
            ends[value] = None
            continue
        for operand in [] if node is None else [*node.inputs, *captured(node)]:
            if operand is not None and operand not in seen:
                seen.add(operand)
                queue.append(operand)
    return list(ends)


def captured(node: ir.Node) -> list[ir.Value]:
    """Values of the outer graph that the bodies of an If, Loop or Scan read."""
    found: dict[ir.Value, None] = {}
    for attr in node.attributes.values():
        if not isinstance(attr, ir.Attr) or attr.type not in (
            ir.AttributeType.GRAPH,
            ir.AttributeType.GRAPHS,
        ):
            continue
        for body in attr.as_graphs() if attr.type == ir.AttributeType.GRAPHS else [attr.as_graph()]:
            for inner in body.all_nodes():
                found.update((v, None) for v in inner.inputs if v is not None and v.graph is node.graph)
            found.update((v, None) for v in body.outputs if v.graph is node.graph)
    return list(found)
