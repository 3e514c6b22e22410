"""The front door to MLIR: optimise a model and write it as a .mlir file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..passes.errors import ElisionError
from ..passes.pipeline import Passes, parse
from .api import Notify, Result, is_onnx, optimize, quietly
from .files import check_target
from .inputs import feeds_for
from .mlir_lower import check_dialect, lower_onnx, lower_program, need_torch_mlir, write_module

UNPICKLED = (".pt2", ".pt", ".pth", ".ckpt", ".pkl")
"""Files that torch unpickles, which runs whatever their maker wrote into them."""


def export_mlir(
    target: Any,
    example_inputs: Any,
    path: str | os.PathLike[str],
    passes: Passes = "",
    dynamic_shapes: Any = None,
    *,
    dialect: str = "linalg-on-tensors",
    batch: int = 1,
    force: bool = False,
    verify: bool = True,
    notify: Notify | None = None,
) -> Result:
    """Run `passes` and `lower{target=mlir}` over a model and write it to `path` as MLIR text, whole or not at all.

    target: an nn.Module, GraphModule or ExportedProgram, or the path of an ONNX file, or an onnx.ModelProto.
    dialect: "linalg-on-tensors", "torch", "stablehlo" or "tosa". The file is complete, weights included. All lengths
    of an ONNX model become numbers: those of the example inputs, or `batch` where only first axes are symbolic. A
    dynamic axis of a torch model stays dynamic where the dialect can say so. Other arguments, and the result, as in
    `optimize`.

    Raises ElisionError: without torch-mlir, for an unknown dialect, and where torch-mlir cannot lower an operator,
    which is then named."""
    tell = notify or (lambda _step: None)
    check_dialect(dialect)
    need_torch_mlir()
    pipeline = [*parse(passes), *parse("lower{target=mlir}")]
    file = check_target(path)
    options: dict[str, Any] = {"force": force, "verify": verify, "notify": notify}
    if is_onnx(target):
        source, target = target, fixed(target, example_inputs, batch)
        # Named here, so that the file is in this form even where no other pass changes it.
        first = [] if any(single.name == "normalise" for single in pipeline) else parse("normalise")
        result = optimize(target, [*first, *pipeline], example_inputs, **options)
        result.source = str(source) if isinstance(source, str | os.PathLike) else type(source).__name__
        tell("lowering to MLIR")
        module = lower_onnx(_proto(result), dialect)
    else:
        result = optimize(target, pipeline, example_inputs, dynamic_shapes=dynamic_shapes, **options)
        tell("lowering to MLIR")
        module = lower_program(_program(result), dialect)
    tell("writing the file")
    write_module(module, file)
    return result


def _program(result: Result) -> Any:
    if result.example is None:
        raise ElisionError("writing MLIR takes the example_inputs")
    graph: Any = result.graph
    with quietly("the result cannot be exported"):
        return graph.to_export(*result.example)


# ---- ONNX ----------------------------------------------------------------------------------------------
def _proto(result: Result) -> Any:
    from ..passes.onnx import io

    return io.to_proto(result.graph.model, "standard")  # type: ignore[attr-defined]


def fixed(target: Any, example_inputs: Any, batch: int) -> Any:
    """An onnx_ir.Model of `target` in which the lengths of all inputs are numbers. Raises ElisionError."""
    from .api import open_onnx

    if isinstance(target, str | os.PathLike) and Path(target).suffix in UNPICKLED:
        raise ElisionError(
            f"{target}: torch unpickles such a file, which can run anything; load it yourself where you trust it, "
            "and give elision.export_mlir the module or ExportedProgram"
        )
    graph = open_onnx(target)
    given = None if example_inputs is None else feeds_for(graph, example_inputs)
    lengths: dict[str, int] = {}
    for value in graph.inputs:
        if value.shape is None:
            raise ElisionError(f"input {value.name!r} has no shape; MLIR takes lengths")
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, int) or dim.is_Integer:
                continue
            if given is not None:
                lengths[str(dim)] = given[value.name].shape[axis]
            elif axis == 0:
                lengths[str(dim)] = batch
            elif str(dim) not in lengths:
                raise ElisionError(
                    f"input {value.name!r} has the symbolic length {dim} on axis {axis}: "
                    "give example inputs, whose lengths are then written"
                )
    model = graph.model.clone()
    _write_lengths(model, lengths)
    return model


def _write_lengths(model: Any, lengths: dict[str, int]) -> None:
    """Numbers for symbols at inputs and outputs; what stood in between is inferred anew."""
    import onnx_ir as ir

    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.shape is not None:
            dims = [d if isinstance(d, int) else lengths.get(str(d.value), d) for d in value.shape]
            value.shape = ir.Shape(dims)
    for node in model.graph.all_nodes():
        for out in node.outputs:
            if not out.is_graph_output():
                out.shape = None
