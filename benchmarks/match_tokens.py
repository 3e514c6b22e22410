"""match_tokens alone: which r of N tokens merge, from keys of the width of a head."""

from __future__ import annotations

from typing import Any

import torch
from one_op import Case, report

SHAPES = ((8, 197, 64, 16), (4, 257, 64, 16), (1, 197, 64, 16), (2, 1024, 64, 128), (1, 4096, 64, 2048))


def run(quick: bool = False) -> dict[str, Any]:
    cases = [
        Case(f"[{b}, {n}, {d}], r={r}", [torch.randn(b, n, d)], {"r": r, "prefix": 1}, b * n * n * d / 2)
        for b, n, d, r in SHAPES
    ]
    return report("match_tokens", cases, quick)
