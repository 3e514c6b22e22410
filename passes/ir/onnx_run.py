"""Running a piece of a graph in ONNX Runtime: the one place below the runtime that starts a session.

What is folded or evaluated has then the bits that the run itself would have given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ..errors import ElisionError
from .onnx_names import unique_in


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
    model: ir.Model, wanted: Sequence[ir.Value], feeds: Mapping[ir.Value, np.ndarray]
) -> list[np.ndarray]:
    """The data of computed values, given that of the inputs behind them; `model` is not changed.

    Raises ElisionError when an input that they depend on is not fed, or when they cannot run."""
    unique = list(dict.fromkeys(wanted))
    fed = needed_inputs(model.graph, unique)
    missing = next((value for value in fed if value not in feeds), None)
    if missing is not None:
        raise ElisionError(f"%{unique[0].name} depends on the input %{missing.name}, which is not fed")
    graph = ir.convenience.extract(model.graph, fed, unique)
    for inner, outer in zip(graph.inputs, fed):
        inner.shape = ir.Shape(feeds[outer].shape)
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
    results = run_model(part, {v.name or "": feeds[v] for v in fed})
    found = dict(zip(unique, results))
    return [found[value] for value in wanted]


def inside(tensor: ir.ExternalTensor) -> ir.LazyTensor:
    """The tensor to be written into a message. Its file stays mapped: arrays that analyses keep may lie there."""
    return ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy(), dtype=tensor.dtype),
        dtype=tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
    )


def needed_inputs(graph: ir.Graph, wanted: Sequence[ir.Value]) -> list[ir.Value]:
    """The graph's inputs (not its weights) that `wanted` depend on, in order."""
    queue, seen = list(wanted), set(wanted)
    while queue:
        node = queue.pop().producer()
        for value in [] if node is None else [*node.inputs, *captured(node)]:
            if value is not None and value not in seen:
                seen.add(value)
                queue.append(value)
    return [value for value in graph.inputs if value in seen]


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
