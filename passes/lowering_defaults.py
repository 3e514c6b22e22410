"""What was measured where Elision is made: the lowering table that every installation begins with.

`elision tune-kernels` writes the same for another machine. Of each line: the form, and how many times faster it is
than the form it is measured against (for torch the op's own ATen; for onnxruntime the first form of the operation in
`elision.runtime.tune`).
"""

from __future__ import annotations

from typing import Any

from .lowering import Table

MEASURED: dict[str, Any] = {
    "onnxruntime": {
        "attention": {
            "float32 plain tokens=256 width=64": ["joined_attention", 1.2],
        },
        "add_norm": {"float32 rows=1024 width=512": ["apart", 1.4]},
        "packed_linear": {"float32 rows=1024 width=1024": ["apart", 1.02]},
    },
    "torch-cpu": {
        "attention": {"float32 sized tokens=256 width=64": ["reference", 1.0]},
    },
}

DEFAULTS = Table.from_json(MEASURED, "the defaults shipped with Elision")
