"""Weights out of safetensors files, and arrays as tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..passes.errors import ModelFileError
from .lm_source import require


def read_tensors(file: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All of a .safetensors file, as float32. Raises ModelFileError for one that is missing or something else."""
    path = Path(file)
    if path.suffix != ".safetensors":
        raise ModelFileError(f"{path}: only .safetensors files are read; pickled weights can run any code")
    if not path.is_file():
        raise ModelFileError(f"{path}: there is no such file")
    require("safetensors", "reading weights")
    from safetensors.torch import load_file

    try:
        return {name: tensor.float().numpy() for name, tensor in load_file(str(path)).items()}
    except Exception as error:  # safetensors' own error, or the system's
        raise ModelFileError(f"{path}: is no safetensors file ({' '.join(str(error).split())})") from error


def tensors_of(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arrays as tensors in host memory."""
    import torch

    from ..passes.ir.fx_nodes import to_tensor

    return {name: to_tensor(array, torch.device("cpu")) for name, array in arrays.items()}


def like(array: np.ndarray, given: Any) -> Any:
    """An array as a tensor on the device of `given`, where that is a tensor; else as it is."""
    if not hasattr(given, "detach"):
        return array
    import torch

    return torch.from_numpy(np.ascontiguousarray(array)).to(given.device)
