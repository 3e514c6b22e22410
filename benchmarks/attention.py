"""attention alone, with the sizes of merged tokens and without; q, k and v lie as a projection leaves them."""

from __future__ import annotations

from typing import Any

import torch
from one_op import Case, report

SHAPES = ((8, 12, 197, 64), (4, 6, 257, 64), (1, 12, 197, 64), (1, 8, 1024, 64))


def run(quick: bool = False) -> dict[str, Any]:
    cases = []
    for b, h, n, d in SHAPES:
        q, k, v = (torch.randn(b, n, h, d).transpose(1, 2) for _ in range(3))
        flops = 4.0 * b * h * n * n * d
        cases.append(Case(f"[{b}, {h}, {n}, {d}] sized", [q, k, v, None, torch.rand(b, n) + 1], {}, flops))
        cases.append(Case(f"[{b}, {h}, {n}, {d}]", [q, k, v], {}, flops))
    return report("attention", cases, quick)
