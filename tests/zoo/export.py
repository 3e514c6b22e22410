"""The zoo in its two hosts: exported programs with a dynamic batch, and ONNX files made of them."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from .model import Built, ZooModel


@cache
def exported(entry: ZooModel, dtype: torch.dtype = torch.float32) -> torch.export.ExportedProgram:
    """`entry` at the level of torch.export, batch dynamic."""
    return export(entry.build(2, dtype), entry.dynamic_shapes())


def export(call: Built, dynamic_shapes: Any = None) -> torch.export.ExportedProgram:
    # A bias that asks for gradients sends attention down a path that the ONNX exporter cannot decompose.
    call.module.requires_grad_(False)
    with quiet():
        return torch.export.export(call.module, call.args, dynamic_shapes=dynamic_shapes, strict=False)


def onnx_file(entry: ZooModel, folder: Path) -> Path:
    """The ONNX file of `entry` in `folder`, exported the first time it is asked for."""
    file = folder / f"{entry.name}.onnx"
    if file.exists():
        return file
    call = entry.build(2)
    for part in call.module.modules():
        if entry.unfused_onnx and hasattr(part, "fused_attn"):
            part.fused_attn = False  # type: ignore[assignment]
    program = export(call, entry.dynamic_shapes())
    _drop_idle_squeezes(program)
    return saved(program, list(entry.inputs(2)), file)


def saved(program: torch.export.ExportedProgram, names: list[str], file: Path) -> Path:
    """The ONNX file of a program, whole or not at all: several workers may export the same model."""
    with quiet():
        made = torch.onnx.export(program, dynamo=True, input_names=names, verbose=False, optimize=True)
        assert made is not None
        temporary = file.with_suffix(f".{os.getpid()}.onnx")
        made.save(temporary)
    temporary.replace(file)
    return file


def onnx_outputs(model: Path | Any, call: Built) -> list[np.ndarray]:
    """What onnxruntime makes of `call` with a file or a ModelProto, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    feeds = {given.name: value.numpy() for given, value in zip(session.get_inputs(), call.args, strict=True)}
    return [np.asarray(value) for value in session.run(None, feeds)]


def _drop_idle_squeezes(program: torch.export.ExportedProgram) -> None:
    """squeeze(dim) of a longer axis does nothing in torch but is an error in ONNX (diffusers' PixArt)."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.squeeze.dim:
            source = node.args[0]
            if source.meta["val"].shape[node.args[1]] != 1:
                node.replace_all_uses_with(source)
                graph.erase_node(node)
                _rename_output(program, node.name, source.name)
    program.graph_module.recompile()


def _rename_output(program: torch.export.ExportedProgram, old: str, new: str) -> None:
    for spec in program.graph_signature.output_specs:
        if getattr(spec.arg, "name", None) == old:
            spec.arg.name = new  # type: ignore[union-attr]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporters talk a lot, on every channel there is."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
