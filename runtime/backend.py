"""The torch.compile backend: passes on Dynamo's graph, then Inductor.

    torch.compile(model, backend="elision", options={"passes": "token-merge{r=16}"})

Our options: `passes`, `force` (apply where no saving is expected), `verify` (check structure after every
pass, default true). Every other option, and `mode`, is Inductor's. With no passes the call is Inductor's
own.

Graph breaks cut a model into fragments, and a fragment may hold nothing for a pass. The rule: a model in
one graph must match, otherwise NothingMatched. Where there are several graphs, one in which nothing matches
is compiled as it is, with one warning per torch.compile call; if the whole model has gone by and nothing
matched anywhere, it is NothingMatched again. Refused always stops the compilation.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import sys
import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch._dynamo.exc import ShortenTraceback
from torch._inductor.custom_graph_pass import CustomGraphPass

from ..passes.base import Pass, PassContext
from ..passes.errors import ElisionError, NothingMatched, PipelineError, Refused
from ..passes.options import nearest
from ..passes.pipeline import format as format_pipeline
from ..passes.pipeline import key as pipeline_key
from ..passes.pipeline import parse
from .api import framed, taken_back
from .fragments import Fragment, fragment_of
from .table import table_for

log = logging.getLogger("elision")

OUR_OPTIONS = ("passes", "force", "verify")

reports: deque[dict[str, Any]] = deque(maxlen=32)
"""What the last compilations did: {"passes", "seconds", "report"}; reports are JSON-ready and hold no
tensors."""


def elision_backend(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    passes: Any = None,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    name: str | None = None,
) -> Any:
    """Compile one Dynamo graph. Raises ElisionError (Refused, NothingMatched, PipelineError) through
    Dynamo."""
    try:
        ours, theirs = split_options(options, passes)
        pipeline = parse(ours["passes"]) if ours["passes"] is not None else []
        inductor = _inductor(mode, theirs, name)
        if not pipeline:
            return inductor(gm, example_inputs)
        lowered = run_passes(gm, example_inputs, pipeline, ours, fragment_of(gm))
    except ElisionError as error:
        raise through_dynamo(error, sys._getframe()) from error.__cause__
    if lowered is None:
        return inductor(gm, example_inputs)
    register_decompositions()
    inductor.config.update(cache_key(pipeline, ours, theirs))
    return inductor(lowered, example_inputs)


# ---- options -------------------------------------------------------------------------------------------
def split_options(options: Mapping[str, Any] | None, passes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(ours with defaults, Inductor's). Raises PipelineError for a name that neither knows."""
    given = dict(options or {})
    ours = {
        "passes": given.pop("passes", passes),
        "force": given.pop("force", False),
        "verify": given.pop("verify", True),
    }
    for flag in ("force", "verify"):
        if not isinstance(ours[flag], bool):
            raise PipelineError(f"option {flag!r} must be true or false, not {ours[flag]!r}")
    from torch._inductor import config

    known = config._config  # type: ignore[attr-defined]
    for option in given:
        if str(option).replace("-", "_") not in known and not _device_option(str(option)):
            hint = nearest(str(option), [*OUR_OPTIONS, *known]).split(" (known")[0]
            raise PipelineError(
                f"unknown option {option!r}{hint} (ours: {', '.join(OUR_OPTIONS)}; or Inductor's)"
            )
    return ours, given


def _device_option(option: str) -> bool:
    from torch._inductor.codegen import common

    owner = getattr(common, "get_compile_option_owner", None)
    return owner is not None and owner(option.replace("-", "_")) is not None


def _inductor(mode: str | None, options: dict[str, Any], name: str | None) -> Any:
    """Inductor as torch.compile(backend="inductor") sets it up; its complaints about options are one line."""
    try:
        return torch._TorchCompileInductorWrapper(mode, options, None, *([name] if name else []))
    except RuntimeError as error:
        raise PipelineError(str(error).split(", known options are")[0].splitlines()[0]) from None


# ---- passes --------------------------------------------------------------------------------------------
def run_passes(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    pipeline: list[Pass],
    ours: Mapping[str, Any],
    fragment: Fragment,
) -> torch.fx.GraphModule | None:
    """The graph after the passes, with the same inputs and outputs; None for a fragment left as it is."""
    from ..passes.ir.fx import FxGraph
    from ..passes.ir.fx_trace import retrace
    from ..passes.manager import run_pipeline

    started = time.perf_counter()
    context = PassContext(force=ours["force"], target="torch", table=table_for("fx"))
    try:
        graph = FxGraph.from_module(retrace(gm, example_inputs), example_inputs)
        report = run_pipeline(
            graph, framed(pipeline, "fx"), context=context, runner=None, verify=ours["verify"]
        )
    except NothingMatched as error:
        _nothing_matched(error, pipeline, fragment)
        return None
    fragment.matched()
    seconds = time.perf_counter() - started
    text = format_pipeline(pipeline)
    reports.append({"passes": text, "seconds": seconds, "report": report.to_json()})
    log.info("%s took %.2f s", text, seconds)
    for single in report.passes:
        if single.declined:
            warnings.warn(f"{single.name} left the graph as it was: {single.declined}", stacklevel=2)
    if len(report.graph.inputs) != len(graph.inputs):
        raise Refused(
            f"{text} gives the graph other inputs, which a compiled call cannot pass: run elision.optimize first, and "
            "compile its module"
        )
    if taken_back(report, graph, pipeline):
        return None  # Inductor gets Dynamo's own graph: the same kernels, bit for bit
    return _as_dynamo_graph(report.graph.to_module(), gm)  # type: ignore[attr-defined]


def _nothing_matched(error: NothingMatched, pipeline: list[Pass], fragment: Fragment) -> None:
    """Raise, warn or let pass, by the rule at the top of this file."""
    if fragment.is_last and not fragment.any_matched:
        raise error
    if fragment.first_complaint():
        text = format_pipeline(pipeline)
        warnings.warn(
            f"a part of the model is compiled without {text} ({fragment.why}): {error}",
            stacklevel=2,
        )


def _as_dynamo_graph(module: torch.fx.GraphModule, original: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Give `module` what AOTAutograd reads off Dynamo's graphs: where every input comes from, which are
    static."""
    module.meta.update(original.meta)
    for name in ("_param_name_to_source", "compile_subgraph_reason", "_backend_id"):
        if hasattr(original, name):
            setattr(module, name, getattr(original, name))
    if hasattr(module, "_param_name_to_source"):
        module._param_name_to_source = _sources(module)  # type: ignore[assignment]
    mine = [node for node in module.graph.nodes if node.op == "placeholder"]
    theirs = [node for node in original.graph.nodes if node.op == "placeholder"]
    for node, old in zip(mine, theirs, strict=True):
        for key in ("tensor_dict", "steal_arg", "grapharg"):
            if key in old.meta:
                node.meta[key] = old.meta[key]
        if hasattr(old, "_dynamo_source"):
            node._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    return module


def _sources(module: torch.fx.GraphModule) -> dict[str, Any]:
    """Where every parameter and buffer comes from. Those that passes made, of quantized weights say, come from nowhere
    that Dynamo knows."""
    from torch._dynamo.source import ConstantSource

    known: dict[str, Any] = dict(module._param_name_to_source)  # type: ignore[arg-type]
    for name, _ in [*module.named_parameters(), *module.named_buffers()]:
        known.setdefault(name, ConstantSource(f"elision.{name}"))
    return known


# ---- Inductor ------------------------------------------------------------------------------------------
@functools.cache
def register_decompositions() -> None:
    """Let Inductor see inside our ops: their ATen bodies join its table, once per process."""
    from torch._inductor import decomposition

    from .. import kernels

    decomposition.decompositions.update(kernels.decompositions())
    # Inductor keeps a copy of the table that it made before we came.
    decomposition.fast_random_decomps.cache_clear()


class CacheKey(CustomGraphPass):
    """Changes nothing: Inductor asks graph passes for a key, for forward and backward, on the disk too.

    Passes that the user set stay, inside this one: older versions of torch have room for one only."""

    def __init__(self, key: str, inner: tuple[Any, ...] = ()) -> None:
        self.key = key
        self.inner = inner

    def __call__(self, graph: torch.fx.Graph) -> None:
        for single in self.inner:
            single(graph)

    def uuid(self) -> Any:
        if not self.inner:
            return self.key
        keys = [single.uuid() if hasattr(single, "uuid") else None for single in self.inner]
        return None if None in keys else (self.key, *keys)  # None: such a pass must not be cached


def cache_key(pipeline: list[Pass], ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The Inductor configuration that carries our pipeline, its options, the lowering table and our own version."""
    from torch._inductor import config

    name = "post_grad_custom_pre_pass"
    table = table_for("fx").digest
    key = f"elision {sources_digest()} {pipeline_key(pipeline)} force={ours['force']} table={table}"
    present = theirs.get(name, getattr(config, name))
    inner = tuple(present) if isinstance(present, list | tuple) else () if present is None else (present,)
    return {name: CacheKey(key, inner)}


@functools.cache
def sources_digest() -> str:
    """A digest of the compiler's own sources: a changed pass or op must not meet code compiled before."""
    from .. import kernels, passes

    digest = hashlib.sha256()
    for package in (passes, kernels):
        root = Path(next(iter(package.__path__)))
        for file in sorted(root.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


# ---- errors --------------------------------------------------------------------------------------------
def through_dynamo(error: ElisionError, frame: FrameType) -> ElisionError:
    """`error` as Dynamo lets it through. Other exceptions of a backend reach the user as
    BackendCompilerFailed."""
    if isinstance(error, ShortenTraceback):
        return error
    carried = _carrier(type(error))(str(error), frame)
    for name in ("reproducer", "graph"):
        if hasattr(error, name):
            setattr(carried, name, getattr(error, name))
    return carried


@functools.cache
def _carrier(kind: type[ElisionError]) -> Any:
    """A subclass of `kind` that is also one of Dynamo's own: those are raised again as they are."""

    def __init__(self: Any, line: str, frame: FrameType) -> None:
        ShortenTraceback.__init__(self, line, first_useful_frame=frame)
        self.line = line

    def __str__(self: Any) -> str:
        return self.line  # Dynamo appends advice about its own debugging to args

    body = {"__init__": __init__, "__str__": __str__, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind, ShortenTraceback), body)
