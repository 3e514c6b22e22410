"""merge_tokens alone: the residual stream of a ViT, r of its N tokens merged."""

from __future__ import annotations

from typing import Any

import torch
from one_op import Case, report

SHAPES = ((8, 197, 768, 16), (4, 257, 384, 16), (1, 197, 768, 16), (2, 1024, 1024, 128), (1, 4096, 320, 2048))


def run(quick: bool = False) -> dict[str, Any]:
    cases = []
    for b, n, c, r in SHAPES:
        maps = torch.ops.elision.match_tokens(torch.randn(b, n, 64), r=r, prefix=1)
        operands = [torch.randn(b, n, c), torch.rand(b, n) + 1, *maps]
        cases.append(Case(f"[{b}, {n}, {c}], r={r}", operands, {"axis": 1}))
    return report("merge_tokens", cases, quick)
