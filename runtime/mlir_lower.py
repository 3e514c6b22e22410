"""What torch-mlir does for us: programs and ONNX models into its dialect, from there to others, and into files.

torch-mlir is the optional package of `pip install elision[mlir]`, asked for on first use.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from ..kernels.mlir import STABLE_SORT
from ..passes.errors import ElisionError
from ..passes.options import nearest
from .api import quietly
from .files import write_atomically
from .inputs import first_line

ENTRY = "main"
"""The function in the file. It takes the model's inputs in order; weights are constants of the module."""

PIPELINES = {
    "linalg-on-tensors": "torch-backend-to-linalg-on-tensors-backend-pipeline",
    "torch": "",
    "stablehlo": "torch-backend-to-stablehlo-backend-pipeline",
    "tosa": "torch-backend-to-tosa-backend-pipeline",
}
"""What can be written, and torch-mlir's pipeline from its own dialect to there."""

SIMPLIFY_TORCH = "func.func(torch-match-quantized-custom-ops),torchdynamo-export-to-torch-backend-pipeline"
SIMPLIFY_ONNX = "torch-onnx-to-torch-backend-pipeline"


def check_dialect(dialect: str) -> None:
    if dialect not in PIPELINES:
        raise ElisionError(f"unknown dialect {dialect!r}{nearest(dialect, PIPELINES)}")


def need_torch_mlir() -> None:
    """Raises ElisionError where torch-mlir cannot be imported."""
    try:
        import torch_mlir.ir  # noqa: F401
    except ImportError as error:
        raise ElisionError(f"writing MLIR takes torch-mlir: pip install 'elision[mlir]' ({error})") from error


def lower_program(program: Any, dialect: str) -> Any:
    """An ExportedProgram as a torch_mlir.ir.Module in `dialect`. Raises ElisionError that names what stopped it."""
    from torch_mlir.extras.fx_decomp_util import get_decomposition_table
    from torch_mlir.extras.fx_importer import FxImporter

    importer = FxImporter(context=_context())
    with quietly("torch-mlir cannot read the graph"):
        plain = program.run_decompositions({**get_decomposition_table(), **STABLE_SORT})
        importer.import_frozen_program(plain, func_name=ENTRY)
    return _lowered(importer.module, SIMPLIFY_TORCH, dialect)


def lower_onnx(proto: Any, dialect: str) -> Any:
    """A ModelProto with numbers for all lengths as a torch_mlir.ir.Module in `dialect`. Raises ElisionError."""
    import onnx
    from torch_mlir.extras import onnx_importer

    with quietly("torch-mlir cannot read the model"):
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        proto.graph.name = ENTRY
        info = onnx_importer.ModelInfo(proto)
        module = info.create_module(context=_context())
        onnx_importer.NodeImporter.define_function(info.main_graph, module.operation).import_all()
    return _lowered(module, SIMPLIFY_ONNX, dialect)


def write_module(module: Any, file: Path) -> None:
    """The module as text, complete: its constants stand in `dialect_resources`, two characters a byte."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            module.operation.print(file=stream, binary=True, enable_debug_info=False)

    write_atomically(file, write)


def _context() -> Any:
    from torch_mlir.dialects import torch as torch_dialect

    context = _bindings("ir").Context()
    torch_dialect.register_dialect(context)
    return context


def _bindings(name: str) -> Any:
    """A module of torch-mlir that is written in C++, without types."""
    return importlib.import_module(f"torch_mlir.{name}")


def _lowered(module: Any, simplify: str, dialect: str) -> Any:
    _run_pipeline(module, simplify, "torch")
    if PIPELINES[dialect]:
        _run_pipeline(module, PIPELINES[dialect], dialect)
    return module


def _run_pipeline(module: Any, pipeline: str, dialect: str) -> None:
    """Run torch-mlir's passes. They may report an error and go on; that too is an ElisionError."""
    ir, manager = _bindings("ir"), _bindings("passmanager").PassManager
    errors: list[str] = []

    def listen(diagnostic: Any) -> bool:
        if diagnostic.severity == ir.DiagnosticSeverity.ERROR:
            errors.append(diagnostic.message)
        return True

    context = module.context
    context.emit_error_diagnostics = True  # to the listener, not into the exception
    handler = context.attach_diagnostic_handler(listen)
    try:
        with context:
            manager.parse(f"builtin.module({pipeline})").run(module.operation)
            if not errors:
                module.operation.verify()
    except ir.MLIRError as error:
        errors.append(str(error))
    finally:
        handler.detach()
    if errors:
        raise ElisionError(f"torch-mlir cannot lower the graph to {dialect}: {_told(errors[0], module)}")


HARMLESS = ("constant.", "prim.")
"""Operators that stay only because another one that reads them does."""


def _told(text: str, module: Any) -> str:
    """The operator that an error of torch-mlir is about, or its first line."""
    named = re.search(r"name = \"(?:torch\.)?([^\"]+)\"", text) or re.search(r"'torch\.([\w.]+)'", text)
    if named is None:
        return first_line(Exception(text))
    name = named[1]
    if name.startswith(HARMLESS):
        left = re.findall(r"= \"torch\.([\w.]+)\"", _brief(module))
        name = next((other for other in left if not other.startswith(HARMLESS)), name)
    return f"it does not take {name} as it is used here"


def _brief(module: Any) -> str:
    """Every operation in generic form, without the data of constants."""
    return module.operation.get_asm(
        print_generic_op_form=True, large_elements_limit=8, large_resource_limit=8
    )
