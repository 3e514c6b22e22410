"""ViT-B/16, batch 8, r=16, on the CPU: torch.compile with the pass against Inductor without us, and against token
merging as a patch of timm's blocks under torch.compile. Aim: 1.98x, and ahead of the patch."""

from __future__ import annotations

from typing import Any

import torch
from eager_tome import patch
from elision.runtime import backend
from elision.runtime.bench import compare, interleave

PASSES = "token-merge{r=16}"


def run(quick: bool = False) -> dict[str, Any]:
    import timm

    name = "vit_small_patch16_224" if quick else "vit_base_patch16_224"
    model = timm.create_model(name, pretrained=False).eval()
    patched = timm.create_model(name, pretrained=False).eval()
    patched.load_state_dict(model.state_dict())
    x = torch.randn(8, 3, 224, 224)
    theirs, tome = torch.compile(model), torch.compile(patch(patched, 16))
    ours = torch.compile(model, backend="elision", options={"passes": PASSES})
    with torch.no_grad():
        theirs(x)
        merged = tome(x)
        apart = float((ours(x) - merged).abs().max() / merged.abs().max())
        report = backend.reports[-1]["report"]
        times = interleave(
            {"inductor": lambda: theirs(x), "patch": lambda: tome(x), "elision": lambda: ours(x)},
            rounds=7 if quick else 40,
            seconds=240,
        )
    result = compare({side: times[side] for side in ("inductor", "elision")})
    ahead = compare({side: times[side] for side in ("patch", "elision")})
    before, after = report["cost_before"], report["cost_after"]
    return {
        "what": f"{name}, batch 8, {PASSES}, CPU, against Inductor",
        "aim": "at least 1.98x, ahead of the patch",
        "figure": f"{result.ratio:.3f}x, {ahead.ratio:.3f}x of the patch under torch.compile",
        "comparison": result.to_json(),
        "against_the_patch": ahead.to_json(),
        "apart_from_the_patch": apart,
        "floor_by_flops": before["flops"] / after["flops"],
        "floor_by_bytes": before["bytes"] / after["bytes"],
        "tokens_per_block": after["tokens_per_block"],
    }
