"""What merging adds to one block of a ViT-B, batch 8, 197 tokens, r=16: the mean of the keys over the heads, matching,
and merging the residual stream. Aims: at most 1.5% of the block; 5x of ONNX Runtime's stock operators, 3x of stock
ATen."""

from __future__ import annotations

from typing import Any

import torch
from analysis_speed import Block
from elision.runtime.backend import register_decompositions
from elision.runtime.bench import timing
from one_op import WAYS, Case, interleave_hosts, ways


def run(quick: bool = False) -> dict[str, Any]:
    register_decompositions()
    x, k, size = torch.randn(8, 197, 768), torch.randn(8, 12, 197, 64), torch.ones(8, 197)
    metric = torch.ops.elision.mean_heads(k)
    maps = torch.ops.elision.match_tokens(metric, r=16, prefix=1)
    steps = {
        "mean_heads": Case("", [k], {}),
        "match_tokens": Case("", [metric], {"r": 16, "prefix": 1}),
        "merge_tokens": Case("", [x, size, *maps], {"axis": 1}),
    }
    block = torch.compile(Block(768, 12).eval())
    with torch.no_grad():
        sides: dict[str, Any] = {"block": lambda: block(x)}
        for op, case in steps.items():
            sides |= {f"{op}, {way}": call for way, call in ways(op, case, WAYS).items()}
        times = interleave_hosts(sides, 10 if quick else 60)
    medians = {name: timing(name, runs).median_ms for name, runs in times.items()}
    total = {way: sum(ms for name, ms in medians.items() if name.endswith(f", {way}")) for way in WAYS}
    share = total["C++ in torch"] / medians["block"]
    stock = total["ONNX Runtime"] / total["C++ in ONNX Runtime"]
    return {
        "what": "matching plus merging beside a ViT-B block (batch 8, 197 tokens), CPU",
        "aim": "at most 1.5%; 5x of stock ONNX Runtime, 3x of stock ATen",
        "figure": f"{share:.2%} of the block; {stock:.2f}x of stock ONNX Runtime, "
        f"{total['ATen'] / total['C++ in torch']:.2f}x of stock ATen, "
        f"{total['Inductor'] / total['C++ in torch']:.2f}x of Inductor",
        "ms": medians,
        "total_ms": total,
    }
