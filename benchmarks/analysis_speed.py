"""The analyses on long graphs: a transformer of about 4,000 operations, and half and a quarter of it. Aim:
2 s, linear."""

from __future__ import annotations

from typing import Any

import torch
from elision.passes.analysis import analyse
from elision.passes.ir.fx import FxGraph
from harness import best_of


class Block(torch.nn.Module):
    """A plain pre-norm block, attention written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, count, width = x.shape
        heads = self.qkv(self.norm1(x)).reshape(batch, count, 3, self.heads, width // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, count, width))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))


def run(quick: bool = False) -> dict[str, Any]:
    rows = []
    for blocks in (60, 120, 240):
        model = torch.nn.Sequential(*(Block(16, 2) for _ in range(blocks))).eval()
        graph = FxGraph.trace(model, (torch.randn(1, 10, 16),))
        seconds = best_of(lambda graph=graph: analyse(graph), 1 if quick else 3)
        rows.append({"operations": len(graph.ops), "seconds": seconds})
    largest = rows[-1]
    return {
        "what": "all analyses of one graph",
        "aim": "under 2 s for 4,000 operations, linear growth",
        "figure": f"{largest['seconds']:.2f} s for {largest['operations']} operations",
        "rows": rows,
    }
