"""Sessions of one-node models with the library of kernels registered, and the files that workers read."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from elision.kernels import OPS, cpu
from torch import Tensor

from .. import onnx_call
from ..cases import CASES


def library() -> str:
    path = cpu.library_path()
    assert path is not None
    return str(path)


def open_session(
    model: onnx.ModelProto, *, custom: bool = True, threads: int = 1, optimized: Path | None = None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if custom:
        options.register_custom_ops_library(library())
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def feeds_of(op: str, operands: Sequence[Tensor | None]) -> dict[str, np.ndarray]:
    names = [n.removesuffix("?") for n in OPS[op].inputs]
    return {name: t.contiguous().numpy() for name, t in zip(names, operands) if t is not None}


def calls() -> list[tuple[str, str, list[Tensor | None], dict[str, Any]]]:
    """(label, op, operands, attributes) of every case of an op with a kernel, and more element types."""
    found: list[tuple[str, str, list[Tensor | None], dict[str, Any]]] = []
    for case in CASES:
        torch.manual_seed(zlib.crc32(str(case).encode()))
        operands = case.make()
        if not OPS[case.op].custom:
            continue
        found.append((str(case), case.op, operands, case.attrs))
        first = operands[0]
        assert first is not None
        if first.dtype == torch.float32 and case.label in ("plain", "sized", "bias", "bool mask and size"):
            for dtype in (torch.float16, torch.float64):
                other = [
                    t.to(dtype)
                    if t is not None and t is not size_of(case.op, operands) and t.is_floating_point()
                    else t
                    for t in operands
                ]
                found.append((f"{case} {dtype}", case.op, other, case.attrs))
        if case.op == "restore_tokens":
            for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
                found.append((f"{case} {dtype}", case.op, [(first > 0).to(dtype), *operands[1:]], case.attrs))
    return found


def size_of(op: str, operands: Sequence[Tensor | None]) -> Tensor | None:
    """The operand that counts tokens: float32 whatever the features are."""
    names = [n.removesuffix("?") for n in OPS[op].inputs]
    return operands[names.index("size")] if "size" in names and len(operands) > names.index("size") else None


def write_models(folder: Path) -> list[str]:
    """Models and feeds of all calls; their labels in the order of the files."""
    labels = []
    for i, (label, op, operands, attrs) in enumerate(calls()):
        onnx.save(onnx_call.model(op, operands, attrs), folder / f"{i:03d}.onnx")
        np.savez(folder / f"{i:03d}.npz", **feeds_of(op, operands))
        labels.append(label)
    return labels


def assert_same(one: np.ndarray, other: np.ndarray, label: str) -> None:
    assert one.dtype == other.dtype and one.shape == other.shape, label
    allowed = {np.dtype(np.float32): 1e-5, np.dtype(np.float16): 4e-3}.get(one.dtype, 0.0)
    np.testing.assert_allclose(one, other, rtol=allowed, atol=allowed, err_msg=label)
