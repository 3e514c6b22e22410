"""restore_tokens alone: back from N' merged tokens to all N, for a dense end."""

from __future__ import annotations

from typing import Any

import torch
from one_op import Case, report

SHAPES = ((4, 257, 384, 128), (8, 197, 768, 98), (1, 4096, 320, 2048))


def run(quick: bool = False) -> dict[str, Any]:
    cases = []
    for b, n, c, r in SHAPES:
        slot = torch.ops.elision.match_tokens(torch.randn(b, n, 64), r=r, prefix=1)[0]
        y = torch.randn(b, n - min(r, (n - 1) // 2), c)
        cases.append(Case(f"[{b}, {y.shape[1]}, {c}] to {n}", [y, slot], {"axis": 1}))
    return report("restore_tokens", cases, quick)
