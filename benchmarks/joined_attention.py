"""joined_attention alone: what onnxruntime's MultiHeadAttention does, with the sizes of merged tokens and without."""

from __future__ import annotations

from typing import Any

import torch
from attention import SHAPES
from one_op import WAYS, Case, report


def run(quick: bool = False) -> dict[str, Any]:
    cases = []
    for b, h, n, d in SHAPES:
        q, k, v = (torch.randn(b, n, h * d) for _ in range(3))
        flops, attrs = 4.0 * b * h * n * n * d, {"heads": h, "kv_heads": h}
        cases.append(
            Case(f"[{b}, {n}, {h} x {d}] sized", [q, k, v, None, torch.rand(b, n) + 1], attrs, flops)
        )
        cases.append(Case(f"[{b}, {n}, {h} x {d}]", [q, k, v], attrs, flops))
    return report("joined_attention", cases, quick, WAYS[3:])
