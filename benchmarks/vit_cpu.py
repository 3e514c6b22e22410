"""ViT-B/16, batch 8, r=16, on the CPU: torch.compile with the pass against Inductor without us. Aim:
1.93x."""

from __future__ import annotations

from typing import Any

import torch
from elision.runtime import backend
from elision.runtime.bench import compare, interleave

PASSES = "token-merge{r=16}"


def run(quick: bool = False) -> dict[str, Any]:
    import timm

    name = "vit_small_patch16_224" if quick else "vit_base_patch16_224"
    model = timm.create_model(name, pretrained=False).eval()
    x = torch.randn(8, 3, 224, 224)
    theirs = torch.compile(model)
    ours = torch.compile(model, backend="elision", options={"passes": PASSES})
    with torch.no_grad():
        theirs(x)
        ours(x)
        report = backend.reports[-1]["report"]
        times = interleave(
            {"inductor": lambda: theirs(x), "elision": lambda: ours(x)}, rounds=7 if quick else 25
        )
    result = compare(times)
    before, after = report["cost_before"], report["cost_after"]
    return {
        "what": f"{name}, batch 8, {PASSES}, CPU, against Inductor",
        "aim": "at least 1.93x",
        "figure": f"{result.ratio:.3f}x",
        "comparison": result.to_json(),
        "floor_by_flops": before["flops"] / after["flops"],
        "floor_by_bytes": before["bytes"] / after["bytes"],
        "tokens_per_block": after["tokens_per_block"],
    }
