"""The command line: explain, optimize, diff, bench, generate, bench-verify, passes, reproduce, doctor, export-mlir,
tune, tune-kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .bench_verify_command import bench_verify
from .generate_command import generate
from .search_command import tune
from .shell import BAD_INPUT, Shell, counting, keep_reproducer, out, print_json, read_arrays, working

app = typer.Typer(
    name="elision",
    cls=Shell,
    help="Makes transformers you already have cheaper by computing fewer tokens.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[Path, typer.Argument(metavar="FILE.onnx", help="An ONNX file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Inputs = Annotated[
    Path | None,
    typer.Option("--inputs", metavar="FILE.npz", help="Example inputs, one array per input name."),
]
Force = Annotated[bool, typer.Option("--force", help="Apply passes even where they expect no saving.")]
Pipeline = Annotated[str, typer.Option("--passes", "-p", metavar="TEXT", help='"name{key=value},name2".')]


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"elision {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Makes transformers you already have cheaper by computing fewer tokens."""


@app.command()
def explain(model: Model, json: Json = False) -> None:
    """Say what a model is made of: token spaces, attentions, where tokens are born and end, what can be
    merged."""
    from ..passes.analysis import explain as explain_graph
    from .api import open_onnx
    from .commands import normalised

    with working("reading", silent=json) as tell:
        graph = normalised(open_onnx(model), tell)
        tell("analysing")
        explanation = explain_graph(graph)
    if json:
        print_json(explanation.to_json())
        return
    console = out()
    for line in explanation.lines():
        console.print(line, markup=False)


@app.command()
def optimize(
    model: Annotated[Path | None, typer.Argument(metavar="[FILE.onnx]", help="An ONNX file.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="OUT.onnx", help="The file to write; of parts, the folder for them."
        ),
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option("--part", metavar="NAME=FILE.onnx", help="One part of a model in parts; repeat it."),
    ] = None,
    passes: Pipeline = "",
    inputs: Inputs = None,
    force: Force = False,
    verify: Annotated[bool, typer.Option(help="Check structure, shapes and numerics after a pass.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Run everything, write nothing.")] = False,
    token_map: Annotated[
        bool, typer.Option("--token-map", help="Also put out which tokens became one (elision_token_map).")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE.html", help="Write a report that stands by itself."),
    ] = None,
    reproducer: Annotated[
        Path | None,
        typer.Option("--reproducer", metavar="FILE.json", help="Where a failing pass leaves its reproducer."),
    ] = None,
    json: Json = False,
) -> None:
    """Run passes over a model and write the result, whole or not at all."""
    from ..passes.errors import ElisionError
    from .api import optimize as run
    from .commands import result_json, show_report
    from .files import check_target, write_text

    if part:
        from .parts_command import optimize_files

        if model is not None or token_map or report is not None or reproducer is not None:
            raise ElisionError("with --part there is no other file, no --token-map, --report or --reproducer")
        optimize_files(part, None if dry_run else output, passes, inputs, force, verify, dry_run, json)
        return
    if model is None:
        raise ElisionError("say which file, or which parts (--part NAME=FILE.onnx)")
    if output is None and not dry_run:
        raise ElisionError(
            "say where to write the result (-o OUT.onnx), or that nothing is written (--dry-run)"
        )
    for target in (output, report) if not dry_run else ():
        if target is not None:
            check_target(target)
    example = read_arrays(inputs)
    with working("reading", silent=json) as tell:
        try:
            result = run(
                model,
                passes,
                example,
                force=force,
                verify=verify,
                token_map=token_map or report is not None,
                notify=tell,
            )
        except ElisionError as error:
            folder = output.parent if output is not None else Path()
            keep_reproducer(error, model, folder, reproducer)
            raise
        if report is not None and not dry_run:
            from .report import render

            tell("writing the report")
            write_text(report, render(result, example))
        if output is not None and not dry_run:
            tell("writing the file")
            if report is not None and not token_map:
                result = result.without_token_map()
            result.save(output)
    if json:
        print_json(result_json(result, None if dry_run else output))
    else:
        show_report(out(), result, None if dry_run else output)


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="A.onnx")],
    second: Annotated[Path, typer.Argument(metavar="B.onnx")],
    raw: Annotated[bool, typer.Option("--raw", help="As the files stand, not brought to one form.")] = False,
    context: Annotated[int, typer.Option("--context", "-c", min=0, max=1000, help="Lines around.")] = 1,
    json: Json = False,
) -> None:
    """Print what is different between two models, operation by operation."""
    from ..passes import cost
    from ..passes.diff import counts, diff_graphs, diff_texts
    from .api import open_onnx
    from .commands import normalised, show_diff

    with working("reading", silent=json) as tell:
        graphs = [open_onnx(path) for path in (first, second)]
        if not raw:
            graphs = [normalised(graph, tell) for graph in graphs]
        tell("comparing")
        texts = [graph.text() for graph in graphs]
        changes = counts(diff_texts(*texts))
        text = diff_graphs(*texts, context=context)
    if json:
        costs = [cost.estimate(graph).to_json() for graph in graphs]
        print_json({"changes": changes, "diff": text.splitlines(), "costs": costs})
        return
    show_diff(out(), text, changes)


@app.command()
def bench(
    first: Model,
    second: Annotated[
        Path | None, typer.Argument(metavar="[OTHER.onnx]", help="What to compare with.")
    ] = None,
    passes: Pipeline = "",
    against: Annotated[
        str, typer.Option("--against", metavar="TEXT", help="With one file: a pipeline for the first side.")
    ] = "",
    inputs: Inputs = None,
    batch: Annotated[
        int | None, typer.Option(min=1, max=65536, help="Length of a symbolic first axis.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, max=100000, help="Runs of each side.")] = 20,
    seconds: Annotated[float, typer.Option(min=0.0, help="Stop after about this long.")] = 60.0,
    threads: Annotated[int, typer.Option(min=0, max=4096, help="Threads; 0: ONNX Runtime chooses.")] = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Compare two files, or one file under two pipelines: interleaved runs, medians, spread, ratio."""
    from .bench import compare_models
    from .commands import bench_sides, show_comparison

    example = read_arrays(inputs)
    with working("reading", silent=json) as tell:
        sides, feeds = bench_sides(first, second, passes, against, example, batch, force, tell)
    with counting("running both in turn", silent=json) as progress:
        result = compare_models(
            *sides, feeds, rounds=rounds, seconds=seconds, threads=threads, progress=progress
        )
    if json:
        print_json(result.to_json())
    else:
        show_comparison(out(), result)


@app.command("passes")
def list_passes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this one.")] = None,
    json: Json = False,
) -> None:
    """List the passes and their options."""
    from .commands import describe_passes, show_passes

    found = describe_passes(name)
    if json:
        print_json(found)
    else:
        show_passes(out(), found)


@app.command()
def reproduce(
    file: Annotated[Path, typer.Argument(metavar="FILE.json", help="What a failing pass wrote.")],
    json: Json = False,
) -> None:
    """Run a failing pass again from its reproducer: exit code 0 when it fails as it did, 1 when not."""
    from .reproduce import replay

    with working("running the pass again", silent=json):
        outcome = replay(file)
    if json:
        print_json(outcome.to_json())
    else:
        for line in outcome.lines():
            print(line)
    if not outcome.same:
        raise typer.Exit(1)


@app.command()
def doctor(json: Json = False) -> None:
    """Say what is installed, and which kernels and targets can be used."""
    from .commands import show_findings
    from .doctor import examine, healthy

    with working("looking around", silent=json):
        findings = examine()
    if json:
        print_json([finding.to_json() for finding in findings])
    else:
        show_findings(out(), findings)
    if not healthy(findings):
        raise typer.Exit(BAD_INPUT)


@app.command("export-mlir")
def write_mlir(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.mlir", help="The file to write.")],
    passes: Pipeline = "",
    dialect: Annotated[
        str, typer.Option(help="linalg-on-tensors, torch, stablehlo or tosa.")
    ] = "linalg-on-tensors",
    inputs: Inputs = None,
    batch: Annotated[int, typer.Option(min=1, max=65536, help="Length of a symbolic first axis.")] = 1,
    force: Force = False,
    verify: Annotated[bool, typer.Option(help="Check structure, shapes and numerics after a pass.")] = True,
    json: Json = False,
) -> None:
    """Run passes over a model and write it as MLIR, through torch-mlir (pip install 'elision[mlir]')."""
    from .commands import result_json, show_report
    from .mlir import export_mlir

    example = read_arrays(inputs)
    options: dict[str, Any] = {"dialect": dialect, "batch": batch, "force": force, "verify": verify}
    with working("reading", silent=json) as tell:
        result = export_mlir(model, example, output, passes, **options, notify=tell)
    if json:
        print_json(result_json(result, output) | {"dialect": dialect, "bytes": output.stat().st_size})
    else:
        show_report(out(), result, output)


@app.command("tune-kernels")
def tune_kernels(
    target: Annotated[
        str | None,
        typer.Option(
            "--target", metavar="NAME", help="onnxruntime, torch-cpu or torch-cuda; default: all here."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few sizes only.")] = False,
    json: Json = False,
) -> None:
    """Measure which form of every operation this machine runs fastest; passes then use what was found."""
    from .commands import show_measured
    from .tune import tune as measure

    with counting("measuring", silent=json) as progress:
        results = measure(target, quick=quick, progress=progress)
    if json:
        print_json([result.to_json() for result in results])
    else:
        show_measured(out(), results)


app.command()(generate)
app.command("bench-verify")(bench_verify)
app.command()(tune)


def main(arguments: list[str] | None = None) -> Any:
    """The entry point of the command `elision`."""
    app(arguments)
