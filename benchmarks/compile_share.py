"""How long the passes take, beside Inductor's own compilation of the same model. Aim: under 20%."""

from __future__ import annotations

import time
from typing import Any

import torch
from elision.runtime import backend

PASSES = "token-merge{r=16}"


def _compile(model: torch.nn.Module, x: torch.Tensor, **options: Any) -> float:
    torch._dynamo.reset()
    started = time.perf_counter()
    with torch.no_grad():
        torch.compile(model, **options)(x)
    return time.perf_counter() - started


def run(quick: bool = False) -> dict[str, Any]:
    import timm
    import torch._inductor.config as inductor

    name = "vit_small_patch16_224" if quick else "vit_base_patch16_224"
    model = timm.create_model(name, pretrained=False).eval()
    x = torch.randn(8, 3, 224, 224)
    rows = []
    with inductor.patch(force_disable_caches=True):
        _compile(torch.nn.Linear(8, 8), torch.randn(2, 8))  # compilers and headers are warm after this
        for _ in range(1 if quick else 3):
            alone = _compile(model, x)
            whole = _compile(model, x, backend="elision", options={"passes": PASSES})
            passes = backend.reports[-1]["seconds"]
            rows.append({"inductor_alone": alone, "with_passes": whole, "passes": passes})
    share = sorted(row["passes"] / row["inductor_alone"] for row in rows)[len(rows) // 2]
    return {
        "what": f"time of the passes, as a share of Inductor's compilation of {name}",
        "aim": "under 20%",
        "figure": f"{share:.1%}",
        "rows": rows,
    }
