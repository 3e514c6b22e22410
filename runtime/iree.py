"""MLIR on the CPU: compiled by IREE, run by IREE's runtime. Optional, with `pip install elision[mlir]`."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..passes.errors import ElisionError
from ..passes.pipeline import Passes
from .inputs import first_line, to_array
from .mlir import export_mlir
from .mlir_lower import ENTRY

HOST = "host"


class IreeModule:
    """A compiled model. Call it with the model's inputs: tensors give tensors, anything else numpy arrays.

    `vmfb` is the compiled module, as `iree-run-module` reads it from a file. Raises ElisionError when the inputs do
    not fit."""

    def __init__(self, vmfb: bytes, device: str = "local-task") -> None:
        """device: "local-task" (all cores) or "local-sync" (the calling thread)."""
        _, runtime = _packages()
        self.vmfb = vmfb
        try:
            context = runtime.SystemContext(config=runtime.Config(device))
            module = runtime.VmModule.copy_buffer(context.instance, vmfb)
            context.add_vm_module(module)
            self._main = context.modules[module.name][ENTRY]
        except (RuntimeError, ValueError, KeyError) as error:
            raise ElisionError(f"IREE cannot load the module: {first_line(error)}") from error
        self._context = context

    def __call__(self, *inputs: Any) -> Any:
        """One result, or a tuple of them."""
        import torch

        tensors = any(isinstance(item, torch.Tensor) for item in inputs)
        arrays = [np.asarray(to_array(item, str(i)), order="C") for i, item in enumerate(inputs)]
        try:
            found = self._main(*arrays)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ElisionError(f"IREE does not run the module: {_told(error)}") from error
        results = [np.array(item) for item in (found if isinstance(found, list | tuple) else [found])]
        made = tuple(_tensor(item) if tensors else item for item in results)
        return made[0] if len(made) == 1 else made


def _tensor(array: np.ndarray) -> Any:
    import torch

    if array.dtype.name == "bfloat16":  # numpy knows it through ml_dtypes, torch does not take it from there
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def compile_iree(
    target: Any,
    example_inputs: Any = None,
    passes: Passes = "",
    *,
    cpu: str = HOST,
    flags: Sequence[str] = (),
    device: str = "local-task",
    **options: Any,
) -> IreeModule:
    """Compile for llvm-cpu: a .mlir file that `export_mlir` wrote, or whatever `export_mlir` takes.

    cpu: what LLVM calls the processor, "host" for this one. flags: more of them for iree-compile. options: further
    arguments of `export_mlir`. Raises ElisionError."""
    compiler, _ = _packages()
    if isinstance(target, str | os.PathLike) and Path(target).suffix != ".onnx":
        if example_inputs is not None or passes or options:
            raise ElisionError(f"{target}: an MLIR file is compiled as it stands, without inputs and passes")
        file = Path(target)
        if not file.is_file():
            raise ElisionError(f"{file}: no such file")
        return IreeModule(_compile(compiler, file, cpu, flags), device)
    with tempfile.TemporaryDirectory(prefix="elision-") as folder:
        file = Path(folder) / "model.mlir"
        export_mlir(target, example_inputs, file, passes, **options)
        return IreeModule(_compile(compiler, file, cpu, flags), device)


def run_iree(target: Any, *inputs: Any, **options: Any) -> Any:
    """`compile_iree` and one call. A .mlir file, or a model, which is then compiled for these inputs."""
    if isinstance(target, str | os.PathLike):
        return compile_iree(target, **options)(*inputs)
    return compile_iree(target, inputs, **options)(*inputs)


def _compile(compiler: Any, file: Path, cpu: str, flags: Sequence[str]) -> bytes:
    arguments = [f"--iree-llvmcpu-target-cpu={cpu}", *flags]
    try:
        return compiler.compile_file(str(file), target_backends=["llvm-cpu"], extra_args=arguments)
    except compiler.CompilerToolError as error:
        lines = [line for line in str(error).splitlines() if "error:" in line]
        told = lines[0].partition("error:")[2].strip() if lines else first_line(error)
        raise ElisionError(f"IREE cannot compile {file.name}: {told[:200]}") from error


def _told(error: BaseException) -> str:
    """What IREE's runtime has to say, without the place in its sources and the calls it was in."""
    text = first_line(error, limit=1000)
    return re.sub(r"^.*?[A-Z_]{4,}; ", "", text).partition("; while ")[0][:200]


def _packages() -> tuple[Any, Any]:
    """iree.compiler.tools and iree.runtime. Raises ElisionError where they cannot be imported."""
    try:
        import iree.compiler.tools as compiler
        import iree.runtime as runtime
    except ImportError as error:
        raise ElisionError(
            f"IREE takes iree-base-compiler and iree-base-runtime: pip install 'elision[mlir]' ({error})"
        ) from error
    return compiler, runtime
