"""The Python front door: optimise a model, keep the result, export to ONNX."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from ..passes.base import Pass, PassContext
from ..passes.errors import ElisionError
from ..passes.ir.graph import Graph
from ..passes.pipeline import Passes, parse
from .files import check_target, write_atomically
from .inputs import feeds_for, first_line, made_up_feeds, set_apart, split_inputs
from .runners import FxRunner, OnnxRunner, Remembered, Runner
from .table import table_for
from .tensors import read_tensors, tensors_of

if TYPE_CHECKING:
    from .parts import PartsResult

NOISY = ("torch.onnx", "torch.export", "torch._subclasses.fake_tensor", "onnxscript", "onnx_ir")
"""Loggers that tell at length what we tell in one line."""

MAP_OUTPUT = "elision_token_map"
"""The extra output that `token_map=True` adds: the slot [B, N] int32 of every input token."""

Notify = Callable[[str], None]
"""Told the name of each step before it starts, for progress displays."""


@dataclass
class Result:
    """An optimised model.

    `graph` is the final graph view, `report` the pass manager's report (what each pass did, cost, drift). A
    torch result has `.module` (trainable, shares the original parameters), an ONNX result has `.model`."""

    graph: Graph
    report: Any
    example: tuple[tuple[Any, ...], dict[str, Any]] | None = field(default=None, repr=False)
    source: str = ""
    untouched: bool = False  # no pass changed the model: it is given back, the same bit for bit
    table: Any = field(default=None, repr=False)  # the lowering table that the passes had
    _module: Any = field(default=None, repr=False)

    @property
    def module(self) -> Any:
        """The optimised torch module, with the call signature of the original."""
        if self.graph.host != "fx":
            raise AttributeError("an ONNX result has .model, not .module")
        if self._module is None:
            self._module = self.graph.to_module()  # type: ignore[attr-defined]
        return self._module

    @property
    def model(self) -> Any:
        """The optimised onnx.ModelProto. Raises ModelFileError above 2 GB: use save() there."""
        if self.graph.host != "onnx":
            raise AttributeError("a torch result has .module, not .model")
        from ..passes.onnx import io

        return io.to_proto(self.graph.model, self._form, self.table)  # type: ignore[attr-defined]

    @property
    def _form(self) -> str:
        return "standard" if self.untouched else "onnxruntime"

    def without_token_map(self) -> Result:
        """The same ONNX result without the extra output of `token_map=True`: one run serves a report and a
        file."""
        if self.graph.host != "onnx":
            raise ElisionError("only an ONNX result can drop its token map; optimise again without it")
        graph: Any = self.graph.copy()
        kept = [value for value in graph.model.graph.outputs if value.name != MAP_OUTPUT]
        graph.model.graph.outputs[:] = kept
        graph.outputs = [value for value in graph.outputs if value.name != MAP_OUTPUT]
        graph.remove_dead()
        return replace(self, graph=graph)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result, whole or not at all: an .onnx file, or a .pt2 file of torch.export.

        Raises ElisionError when the folder is missing or not writable, or the suffix says something else."""
        file = Path(path)
        if self.graph.host == "onnx":
            from ..passes.onnx import io

            if file.suffix == ".pt2":
                raise ElisionError(f"{file}: an ONNX result is saved as .onnx")
            io.save_model(self.graph.model, file, self._form, self.table)  # type: ignore[attr-defined]
            return file
        if file.suffix != ".pt2":
            raise ElisionError(
                f"{file}: a torch result is saved as .pt2 (elision.export_onnx writes ONNX files)"
            )
        if self.example is None:
            raise ElisionError("saving a torch result takes the example_inputs it was made with")
        import torch

        check_target(file)
        with quietly("the result cannot be exported"):
            program = self.graph.to_export(*self.example)  # type: ignore[attr-defined]
        return write_atomically(file, lambda temporary: torch.export.save(program, temporary))


@overload
def optimize(
    target: Mapping[str, Any],
    passes: Passes = "",
    example_inputs: Any = None,
    *,
    force: bool = False,
    verify: bool = True,
    dynamic_shapes: Any = None,
    notify: Notify | None = None,
) -> PartsResult: ...


@overload
def optimize(
    target: Any,
    passes: Passes = "",
    example_inputs: Any = None,
    *,
    force: bool = False,
    verify: bool = True,
    dynamic_shapes: Any = None,
    token_map: bool = False,
    samples: Sequence[Any] | None = None,
    notify: Notify | None = None,
) -> Result: ...


def optimize(
    target: Any,
    passes: Passes = "",
    example_inputs: Any = None,
    *,
    force: bool = False,
    verify: bool = True,
    dynamic_shapes: Any = None,
    token_map: bool = False,
    samples: Sequence[Any] | None = None,
    notify: Notify | None = None,
) -> Result | PartsResult:
    """Run `passes` over a model and return the result; the model itself stays as it was.

    target: an nn.Module, GraphModule or ExportedProgram, the path of an ONNX file, or an onnx.ModelProto; or
        a dict of these, for a model that comes in parts (see `optimize_parts`).
    passes: a pipeline text ("token-merge{r=16}"), a pass, or a list of passes.
    example_inputs: a tuple or list (positions), a dict (names), or one tensor. Modules need them; ONNX
        models use them for the numeric check and make some up where their inputs' shapes allow. A dict may also hold
        examples for inputs that passes add (the segments of segment-merge).
    force: apply passes even where they expect no saving. verify: check structure, shapes and numerics after
        every pass. dynamic_shapes: as in torch.export. token_map: also put out the composed token map.
    samples: real inputs that quantize calibrates on, each as example_inputs. notify: told of each step before it
        starts.

    Raises ElisionError: Refused when a pass finds the graph unsafe, NothingMatched when it finds nothing to
    do, PipelineError, ModelFileError, VerificationError for the rest. An error from a pass carries
    `reproducer`, plain data that `elision.runtime.reproduce.write` makes a file of.
    """
    if isinstance(target, Mapping):
        from .parts import optimize_parts

        if token_map or samples:
            raise ElisionError("a model in parts is optimised without token_map and samples")
        both = {"dynamic_shapes": dynamic_shapes, "notify": notify}
        return optimize_parts(target, passes, example_inputs, force=force, verify=verify, **both)
    tell = notify or (lambda _step: None)
    given = parse(passes)
    example_inputs, added = set_apart(example_inputs, given)
    tell("reading the model")
    if is_onnx(target):
        graph, feeds, source = open_onnx(target), None, _source(target)
        if example_inputs is not None:
            feeds = feeds_for(graph, example_inputs)
        elif verify:
            feeds = made_up_feeds(graph)
        runner = _tolerant(graph, feeds, given=example_inputs is not None) if verify else None
        context_inputs = list(feeds.values()) if feeds else None
        example = None
    else:
        graph, example = open_torch(target, example_inputs, dynamic_shapes)
        source = type(target).__name__
        runner = FxRunner(*example) if verify and example is not None else None
        context_inputs = _flat_tensors(example) if example is not None else None
    context = PassContext(
        force=force,
        target="onnxruntime" if graph.host == "onnx" else "torch",
        example_inputs=context_inputs,
        want_map=token_map,
        table=table_for(graph.host),
        samples=[_in_order(graph, sample) for sample in samples] if samples else None,
        read_arrays=read_tensors,
        added=added,
    )
    pipeline = framed(given, graph.host)
    report = run_passes(graph, pipeline, context, runner, verify, tell)
    untouched = taken_back(report, graph, given)
    example = with_added(example, report)
    module = _own_module(target) if untouched and graph.host == "fx" else None
    return Result(report.graph, report, example, source, untouched, context.table, module)


def run_passes(
    graph: Graph,
    pipeline: list[Pass],
    context: PassContext,
    runner: Runner | None,
    verify: bool,
    tell: Notify,
) -> Any:
    """The pass manager, with its progress told as text."""
    from ..passes.manager import run_pipeline

    def progress(index: int, count: int, single: Pass) -> None:
        tell(f"pass {index + 1} of {count}: {single.name}")

    return run_pipeline(graph, pipeline, context=context, runner=runner, verify=verify, progress=progress)


def export_onnx(
    module: Any,
    example_inputs: Any,
    path: str | os.PathLike[str],
    passes: Passes = "",
    dynamic_shapes: Any = None,
    *,
    force: bool = False,
    verify: bool = True,
    token_map: bool = False,
    notify: Notify | None = None,
) -> Result:
    """Export a torch module with torch.onnx.export(dynamo=True), run `passes` on the ONNX graph, write
    `path`.

    Plain onnxruntime runs the file; it needs no library of ours. Arguments as in `optimize`. Nothing is
    written when anything fails. Raises ElisionError."""
    import torch

    tell = notify or (lambda _step: None)
    pipeline = parse(passes)
    file = check_target(path)
    args, kwargs = split_inputs(example_inputs)
    tell("exporting to ONNX")
    with quietly("the module cannot be exported with these example inputs"), _without_gradients(module):
        program = torch.onnx.export(
            module, args, kwargs=kwargs or None, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False
        )
    if program is None:
        raise ElisionError("torch.onnx.export gave no model")
    from ..passes.ir.onnx import OnnxGraph

    graph = OnnxGraph(program.model)
    feeds = _export_feeds(graph, args, kwargs) if verify else None
    runner = OnnxRunner(feeds) if feeds else None
    inputs = list(feeds.values()) if feeds else None
    context = PassContext(
        force, "onnxruntime", inputs, token_map, table_for("onnx"), read_arrays=read_tensors
    )
    report = run_passes(graph, framed(pipeline, "onnx"), context, runner, verify, tell)
    untouched = taken_back(report, graph, pipeline)
    result = Result(report.graph, report, None, type(module).__name__, untouched, context.table)
    tell("writing the file")
    result.save(file)
    return result


def with_added(example: Any, report: Any) -> Any:
    """The example arguments of a torch graph with those that passes let it take besides, by name."""
    added = {name: array for one in report.passes if one.changed for name, array in one.added.items()}
    if example is None or not added:
        return example
    args, kwargs = example
    return args, {**kwargs, **tensors_of(added)}


def _export_feeds(graph: Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The example inputs under the names the exporter gave them; its inputs are the tensors, in order."""
    tensors = _flat_tensors((args, kwargs))
    return feeds_for(graph, tensors) if len(tensors) == len(graph.inputs) else None


# ---- reading targets -----------------------------------------------------------------------------------
def is_onnx(target: Any) -> bool:
    """A path, a ModelProto or an onnx_ir.Model; decided without importing what the target is not."""
    if isinstance(target, str | os.PathLike):
        return True
    module = type(target).__module__.split(".")[0]
    return type(target).__name__ in ("ModelProto", "Model") and module in ("onnx", "onnx_ir")


def _source(target: Any) -> str:
    return str(target) if isinstance(target, str | os.PathLike) else type(target).__name__


def open_onnx(target: Any) -> Any:
    """The graph view of a path, ModelProto or onnx_ir.Model (which is copied). Raises ModelFileError."""
    from ..passes.ir.onnx import OnnxGraph
    from ..passes.onnx import io

    if isinstance(target, str | os.PathLike):
        model = io.load_model(target)
    elif type(target).__name__ == "ModelProto":
        model = io.from_proto(target)
    else:
        model = target.clone()
    try:
        return OnnxGraph(model)
    except ElisionError:
        raise
    except Exception as error:
        raise ElisionError(f"{_source(target)}: the model cannot be read ({first_line(error)})") from error


def open_torch(
    target: Any, example_inputs: Any, dynamic_shapes: Any = None
) -> tuple[Any, tuple[tuple[Any, ...], dict[str, Any]] | None]:
    """The graph view of a module or exported program, and its example arguments. Raises ElisionError."""
    import torch

    from ..passes.ir.fx import FxGraph

    example = None if example_inputs is None else split_inputs(example_inputs)
    if isinstance(target, torch.export.ExportedProgram):
        example = example or target.example_inputs
        with quietly("the exported program cannot be read"):
            return FxGraph.from_export(target), example
    if not isinstance(target, torch.nn.Module):
        kind = type(target).__name__
        raise ElisionError(
            f"cannot optimise a {kind}: give an nn.Module, GraphModule, ExportedProgram, path or ModelProto"
        )
    if isinstance(target, torch.fx.GraphModule) and _has_values(target):
        with quietly("the graph cannot be read"):
            return FxGraph.from_module(target), example
    if example is None:
        raise ElisionError("example_inputs are needed to trace a torch module")
    module = getattr(target, "_orig_mod", target)  # a torch.compile wrapper: the module inside
    with quietly("the module cannot be traced with these example inputs"):
        return FxGraph.trace(module, example[0], example[1] or None, dynamic_shapes), example


def _own_module(target: Any) -> Any:
    """What runs as `target` itself does."""
    import torch

    return target.module() if isinstance(target, torch.export.ExportedProgram) else target


def _has_values(module: Any) -> bool:
    """Whether a GraphModule was traced at the ATen level, with fake values on its nodes."""
    nodes = list(module.graph.nodes)
    return all("val" in n.meta for n in nodes if n.op == "placeholder") and not any(
        n.op in ("call_module", "call_method") for n in nodes
    )


def framed(pipeline: list[Pass], host: str) -> list[Pass]:
    """With `lower` at the end, and for ONNX `normalise` in front: other people's files are brought to one form.

    A pipeline that says either itself is left to do so where it wants; an empty one leaves a torch graph alone."""
    if host == "fx" and not pipeline:
        return []
    named = {single.name for single in pipeline}
    first = [] if "normalise" in named or host == "fx" else parse("normalise")
    last = [] if "lower" in named else parse("lower")
    return [*first, *pipeline, *last]


def taken_back(report: Any, original: Graph, pipeline: list[Pass]) -> bool:
    """Give the original back when nothing that was asked for changed it: framing alone must not move a bit."""
    asked = {single.name for single in pipeline}
    if any(single.changed for single in report.passes if single.name in asked):
        return False
    for single in report.passes:
        if single.changed:
            single.notes.append("taken back: no pass of the pipeline changed the model")
    report.graph = original
    return True


def _in_order(graph: Graph, sample: Any) -> list[Any]:
    """A sample as one array or tensor for each of the graph's inputs."""
    if graph.host == "fx":
        return _flat_tensors(split_inputs(sample))
    feeds = feeds_for(graph, sample)
    return [feeds[value.name] for value in graph.inputs]


def _flat_tensors(example: Any) -> list[Any]:
    import torch
    from torch.utils import _pytree as pytree

    return [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, torch.Tensor)]


def _tolerant(graph: Graph, feeds: Any, *, given: bool) -> Runner | None:
    """A runner, or None where made-up inputs do not run: inputs that the user gave must."""
    if feeds is None:
        return None
    plain = OnnxRunner(feeds)
    try:
        first = plain(graph)
    except ElisionError:
        if given:
            raise
        logging.getLogger("elision").info("made-up inputs do not run; give example inputs to check numerics")
        return None

    # The pass manager begins with the same graph; a large model is not run twice for that.
    return Remembered(plain, graph, first)


@contextlib.contextmanager
def _without_gradients(module: Any) -> Iterator[None]:
    """A mask that asks for gradients sends attention down a path that the exporter cannot take apart."""
    import torch

    asked = [p for p in module.parameters() if p.requires_grad] if isinstance(module, torch.nn.Module) else []
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def quietly(what: str) -> Iterator[None]:
    """Exporters warn and log a lot; what stops them is told in one line."""
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ElisionError:
        raise
    except Exception as error:
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ElisionError(f"{what}: {first_line(cause)}") from error
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
