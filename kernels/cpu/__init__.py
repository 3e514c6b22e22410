"""The C++ kernels for the CPU: one library, plain C interface, used by torch (here, through ctypes) and by ONNX
Runtime (as a library of custom ops).

`csrc/` has a file for each kernel. The library is built with the package where there is a C++ compiler; without it
`available()` is False, `why_not()` says why, and everything runs on the references.
"""

from __future__ import annotations

from typing import Any

from ..kernel import Kernel
from .library import ISA, available, library_path, variant, variants, why_not


def kernels() -> dict[str, Kernel]:
    """The kernels by op name, registered as `torch.ops.elision_cpu.<op>`. Raises RuntimeError without the library."""
    from . import linear_ops, step_ops, torch_ops

    return {**torch_ops.KERNELS, **linear_ops.KERNELS, **step_ops.KERNELS}


def mutating_kernels() -> dict[str, Any]:
    """By op of step graphs: the torch overload that writes into its caches and returns what the rows get
    (`torch.ops.elision_cpu.<op>_`), and no caches. Raises RuntimeError without the library."""
    from . import step_ops

    return step_ops.MUTATING


def pack_weight(weight: Any, scales: Any = None, zeros: Any = None, **attrs: Any) -> Any:
    """A weight as torch.ops.elision_cpu.linear_packed and linear_topk_packed take it (`linear_ops.pack`)."""
    from . import linear_ops

    return linear_ops.pack(weight, scales, zeros, **attrs)


__all__ = [
    "ISA",
    "available",
    "kernels",
    "library_path",
    "mutating_kernels",
    "pack_weight",
    "variant",
    "variants",
    "why_not",
]
