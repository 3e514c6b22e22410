"""Matching plus merging as a share of a ViT-B block, batch 8, 197 tokens, r=16. Aim: at most 5%."""

from __future__ import annotations

from typing import Any

import elision.kernels  # noqa: F401  (registers torch.ops.elision)
import torch
from analysis_speed import Block
from elision.runtime.backend import register_decompositions
from elision.runtime.bench import compare, interleave


class Merge(torch.nn.Module):
    """What the pass adds to one block: a metric from the keys, matching, merging of the stream."""

    def forward(self, x: torch.Tensor, k: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ops = torch.ops.elision
        metric = ops.mean_heads(k)
        slot, keep, source = ops.match_tokens(metric, r=16, prefix=1)
        return ops.merge_tokens(x, size, slot, keep, source, axis=1, batch_axis=0)


def run(quick: bool = False) -> dict[str, Any]:
    register_decompositions()
    x, k = torch.randn(8, 197, 768), torch.randn(8, 12, 197, 64)
    size = torch.ones(8, 197)
    block, merge = torch.compile(Block(768, 12).eval()), torch.compile(Merge())
    with torch.no_grad():
        block(x), merge(x, k, size)
        times = interleave(
            {"block": lambda: block(x), "match and merge": lambda: merge(x, k, size)},
            rounds=10 if quick else 50,
        )
    result = compare(times)
    share = result.second.median_ms / result.first.median_ms
    return {
        "what": "matching plus merging, as a share of a ViT-B block (batch 8, 197 tokens), Inductor, CPU",
        "aim": "at most 5%",
        "figure": f"{share:.1%}",
        "comparison": result.to_json(),
    }
