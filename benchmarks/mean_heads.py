"""mean_heads alone: the keys of a ViT's attention, averaged over the heads."""

from __future__ import annotations

from typing import Any

import torch
from one_op import Case, report

SHAPES = ((8, 12, 197, 64), (4, 6, 257, 64), (1, 12, 197, 64), (2, 16, 1024, 80))


def run(quick: bool = False) -> dict[str, Any]:
    return report("mean_heads", [Case(str(list(s)), [torch.randn(s)], {}) for s in SHAPES], quick)
