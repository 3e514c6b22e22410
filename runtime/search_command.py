"""The command `elision tune`: search the open options of a pipeline by measuring, under a bound on quality."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .shell import out, print_json, working


def tune(
    model: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="An ONNX file.")],
    data: Annotated[
        Path,
        typer.Option(
            "--data", metavar="DATA.npz|FOLDER", help="Example inputs; a folder has one .npz for each call."
        ),
    ],
    quality: Annotated[
        str, typer.Option("--quality", help="correlation, cosine, agreement or error.")
    ] = "correlation",
    at_least: Annotated[float | None, typer.Option("--at-least", help="The bound of the quality.")] = None,
    at_most: Annotated[float | None, typer.Option("--at-most", help="The bound of an error.")] = None,
    passes: Annotated[
        str, typer.Option("--passes", "-p", metavar="TEXT", help="Passes; what they leave open is searched.")
    ] = "token-merge",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT.onnx", help="The model to write.")
    ] = None,
    pipeline: Annotated[
        Path | None, typer.Option("--pipeline", metavar="FILE.txt", help="Write the chosen pipeline as text.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="Write a picture of the front (.png, .svg, .pdf)."),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(
            "--held-out", metavar="DATA.npz|FOLDER", help="What to judge on; default: the last third."
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, max=65536, help="Samples of a call.")] = None,
    minutes: Annotated[float, typer.Option(min=0.01, max=100000.0, help="How long to search.")] = 5.0,
    tries: Annotated[int | None, typer.Option(min=1, help="The most pipelines to try.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the proposals.")] = 0,
    threads: Annotated[int, typer.Option(min=0, max=4096, help="Threads; 0: ONNX Runtime chooses.")] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="Measure without our library of kernels.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Search schedules (r per layer, the layer of a cut, bits per layer) for the fastest that keeps a quality."""
    from .search import check_targets
    from .search import tune as run
    from .search_report import SUFFIXES, show

    check_targets(output, pipeline, plot)
    if plot is not None and plot.suffix.lower() not in SUFFIXES:
        raise typer.BadParameter(f"{plot}: a picture is {', '.join(SUFFIXES)}")
    with working("reading", silent=json) as tell:
        result = run(
            model,
            data,
            quality=quality,
            at_least=at_least,
            at_most=at_most,
            passes=passes,
            held_out=held_out,
            batch=batch,
            seconds=60 * minutes,
            tries=tries,
            seed=seed,
            library=not plain,
            threads=threads,
            build=output is not None,
            notify=tell,
        )
        tell("writing")
        if output is not None:
            result.save(output)
        if pipeline is not None:
            result.write_pipeline(pipeline)
        if plot is not None:
            result.plot(plot)
    written = [str(path) for path in (output, pipeline, plot) if path is not None]
    if json:
        print_json({**result.to_json(), "written": written})
        return
    console = out()
    show(console, result)
    for path in written:
        console.print(f"wrote {path}", markup=False)
