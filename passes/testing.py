"""Helpers for testing a pass of one's own: capture a graph, run passes, expect a diff, measure drift.

    before = capture(module, (x,))
    after = apply(before, MyPass(), (x,))
    expect_diff(before, after, "- %a = ...")
    assert drift(before, after, (x,))[0].max_abs < 1e-5

Also importable as `elision.testing`. Nothing here needs a test framework.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import drift as _drift
from .base import PassContext
from .diff import diff_graphs
from .drift import Drift
from .errors import ElisionError
from .ir.graph import Graph
from .manager import PipelineReport, run_pipeline
from .pipeline import Passes


def capture(target: Any, args: Sequence[Any] = (), *, dynamic_shapes: Any = None) -> Graph:
    """The graph view of a torch module (traced with `args`), an ExportedProgram, an ONNX model (ModelProto
    or onnx_ir.Model) or a graph (a copy). Raises ElisionError for anything else."""
    if isinstance(target, Graph):
        return target.copy()
    kinds = {f"{c.__module__.partition('.')[0]}.{c.__name__}" for c in type(target).__mro__}
    if "torch.Module" in kinds:
        from .ir.fx import FxGraph

        return FxGraph.trace(target, tuple(args), dynamic_shapes=dynamic_shapes)
    if "torch.ExportedProgram" in kinds:
        from .ir.fx import FxGraph

        return FxGraph.from_export(target)
    if kinds & {"onnx.ModelProto", "onnx_ir.Model"}:
        import onnx_ir

        from .ir.onnx import OnnxGraph

        model = target.clone() if isinstance(target, onnx_ir.Model) else onnx_ir.from_proto(target)
        return OnnxGraph(model)
    raise ElisionError(f"cannot capture a graph from {type(target).__name__}")


def report(graph: Graph, passes: Passes, args: Sequence[Any] = (), **context: Any) -> PipelineReport:
    """Run passes with every check the manager has, numerics on `args` included if they are given.

    `context` are fields of PassContext; `force` is on unless given, since test graphs are small."""
    context = {"force": True, "example_inputs": tuple(args) or None, **context}
    runner = (lambda g: run(g, args)) if args else None
    return run_pipeline(graph, passes, context=PassContext(**context), runner=runner)


def apply(graph: Graph, passes: Passes, args: Sequence[Any] = (), **context: Any) -> Graph:
    """The graph after `passes`; `graph` itself stays as it was. Same arguments as `report`."""
    return report(graph, passes, args, **context).graph


def run(graph: Graph, args: Sequence[Any]) -> list[np.ndarray]:
    """The outputs of `graph` on `args` (tensors or arrays), in order, as arrays.

    A torch graph runs eagerly. An ONNX graph runs in onnx's reference evaluator: slow, exact, no session."""
    if graph.host == "fx":
        return _run_torch(graph, args)
    if graph.host == "onnx":
        return _run_onnx(graph, args)
    raise ElisionError(f"cannot run a graph of host {graph.host!r}")


def drift(before: Graph, after: Graph, args: Sequence[Any]) -> list[Drift]:
    """How far each output of `after` lies from that of `before` on `args`."""
    return _drift.compare([v.name for v in before.outputs], run(before, args), run(after, args))


def expect_diff(
    before: Graph, after: Graph, expected: str, *, context: int = 0, lengths: bool = False
) -> None:
    """Assert that the diff of two graphs is `expected`, a string literal at the call.

    Indentation and blank lines around it do not count. With EXPECTTEST_ACCEPT=1 and expecttest installed, a
    literal that differs is rewritten in the test's source."""
    actual = diff_graphs(before, after, context, lengths) or "(no difference)"
    wanted = textwrap.dedent(expected).strip("\n").rstrip()
    if actual == wanted:
        return
    if os.environ.get("EXPECTTEST_ACCEPT"):
        import expecttest

        expecttest.assert_expected_inline(f"\n{actual}\n", expected, skip=1)
        return
    raise AssertionError(
        f"the diff is not as expected (EXPECTTEST_ACCEPT=1 accepts it).\n--- expected\n{wanted}\n"
        f"--- actual\n{actual}"
    )


def _run_torch(graph: Any, args: Sequence[Any]) -> list[np.ndarray]:
    import torch
    from torch.utils import _pytree as pytree

    tensors = [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in args]
    with torch.no_grad():
        leaves = pytree.tree_leaves(graph.run(*tensors))
    found = [leaf.detach().cpu() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return [(t.float() if t.dtype == torch.bfloat16 else t).numpy() for t in found]


def _run_onnx(graph: Any, args: Sequence[Any]) -> list[np.ndarray]:
    import onnx_ir
    from onnx.reference import ReferenceEvaluator

    arrays = [a if isinstance(a, np.ndarray) else a.detach().cpu().numpy() for a in args]
    names = [value.name for value in graph.inputs]
    if len(arrays) != len(names):
        raise ElisionError(f"the graph takes {len(names)} inputs ({', '.join(names)}), not {len(arrays)}")
    evaluator = ReferenceEvaluator(onnx_ir.to_proto(graph.model))
    return [np.asarray(array) for array in evaluator.run(None, dict(zip(names, arrays)))]
