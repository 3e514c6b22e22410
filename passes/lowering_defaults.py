"""What was measured where Elision is made: the lowering table that every installation begins with.

`elision tune-kernels` writes the same for another machine. Of each line: the form, and how many times faster it is
than the form it is measured against (for torch the op's own ATen, eager or compiled; for onnxruntime the first form of
the operation in `elision.runtime.tune_onnx`).

Machine: AMD EPYC, AVX-512, onnxruntime 1.32.0 on one thread with other work beside it, torch 2.14.1 on two with none;
medians of the ratios of interleaved runs. A GPU has no
measurement yet: there ATen stays until one is made.
"""

from __future__ import annotations

from typing import Any

from .lowering import Table

MEASURED: dict[str, Any] = {
    "onnxruntime": {
        # Over split heads it takes 1.5 to 2.3 times as long up to 256 tokens, 1.2 times at 1024; with a mask the same.
        "attention": {
            "float32 plain tokens=256 width=64": ["joined_attention", 1.0],
            "float32 sized tokens=256 width=64": ["joined_attention", 1.0],
            "float32 masked tokens=256 width=64": ["joined_attention", 1.0],
        },
        "add_norm": {
            "float32 rows=64 width=512": ["apart", 5.5],
            "float32 rows=512 width=512": ["apart", 6.8],
            "float32 rows=4096 width=512": ["apart", 11.5],
            "float32 rows=64 width=1024": ["apart", 6.7],
            "float32 rows=512 width=1024": ["apart", 12.5],
            "float32 rows=4096 width=1024": ["apart", 4.0],
        },
        "packed_linear": {
            "float32 rows=64 width=1024": ["packed", 1.0],
            "float32 rows=512 width=1024": ["apart", 1.04],
            "float32 rows=2048 width=1024": ["packed", 1.0],
            "float32 rows=64 width=2048": ["packed", 1.0],
            "float32 rows=512 width=2048": ["apart", 1.05],
            "float32 rows=2048 width=2048": ["apart", 1.07],
        },
    },
    "torch-cpu": {
        "match_tokens": {
            "float32 tokens=64 width=64": ["kernel", 1.79],
            "float32 tokens=256 width=64": ["kernel", 1.57],
            "float32 tokens=1024 width=64": ["kernel", 1.59],
        },
        "match_padded_tokens": {
            "float32 tokens=64 width=64": ["kernel", 1.88],
            "float32 tokens=256 width=64": ["kernel", 2.06],
            "float32 tokens=1024 width=64": ["kernel", 2.8],
        },
        "mean_heads": {
            "float32 tokens=64 width=64": ["reference", 1.0],
            "float32 tokens=256 width=64": ["reference", 1.0],
            "float32 tokens=1024 width=64": ["reference", 1.0],
        },
        "merge_tokens": {
            "float32 tokens=64 width=512": ["kernel", 1.24],
            "float32 tokens=256 width=512": ["kernel", 2.1],
            "float32 tokens=1024 width=1024": ["kernel", 4.25],
        },
        "restore_tokens": {
            "float32 tokens=32 width=512": ["reference", 1.0],
            "float32 tokens=128 width=512": ["reference", 1.0],
            "float32 tokens=512 width=1024": ["reference", 1.0],
        },
        "attention": {
            "float32 plain tokens=64 width=64": ["kernel", 1.18],
            "float32 plain tokens=256 width=64": ["kernel", 1.09],
            "float32 plain tokens=1024 width=64": ["kernel", 1.08],
            "float32 sized tokens=64 width=64": ["kernel", 1.07],
            "float32 sized tokens=256 width=64": ["kernel", 1.18],
            "float32 sized tokens=1024 width=64": ["kernel", 1.12],
        },
    },
}

DEFAULTS = Table.from_json(MEASURED, "the defaults shipped with Elision")
