"""Triton kernels of the ops, for NVIDIA and AMD GPUs: `torch.ops.elision_triton.<name>` after `load()`.

Importing this package imports no Triton and registers nothing. Every kernel gives the same bits in every run: nothing
is added up with atomics, and what is summed in which order does not depend on the configuration that wins a tuning.
"""

from __future__ import annotations

import importlib
import importlib.util

from ..kernel import TORCH_CUDA, Kernel
from . import limits

KERNELS: dict[str, Kernel] = {
    name: Kernel(name, TORCH_CUDA, refuses) for name, refuses in limits.REFUSES.items()
}
"""The ops that have a Triton kernel, and what each kernel cannot take."""


def load() -> dict[str, Kernel]:
    """Register the kernels with torch, once, and return them. Raises ModuleNotFoundError where Triton is missing."""
    if importlib.util.find_spec("triton") is None:
        raise ModuleNotFoundError(
            "the GPU kernels need Triton, which comes with torch for CUDA and ROCm: pip install triton",
            name="triton",
        )
    for name in KERNELS:
        importlib.import_module(f"{__name__}.{name}")
    return KERNELS


__all__ = ["KERNELS", "load"]
