"""Building a pipeline of a search quickly, running it, and racing two of them against each other."""

from __future__ import annotations

import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..passes.base import Pass, PassContext
from ..passes.errors import ElisionError, Refused
from ..passes.ir.graph import Graph
from ..passes.manager import run_pipeline
from .api import is_onnx, open_onnx, open_torch
from .inputs import first_line
from .search_data import Call, Outputs
from .session import session
from .table import table_for
from .tensors import read_tensors

KEPT = 3
"""So many built pipelines are kept, because the best so far runs again and again."""


@dataclass
class Built:
    """A pipeline that can be run. `cost`: the estimated seconds of a call, see passes.cost; `flops` likewise."""

    run: Callable[[Call], Outputs]
    cost: float
    flops: float
    tokens: list[int] = field(default_factory=list)


class Workbench:
    """Builds pipelines of one model without checks, which the one that is chosen gets at the end.

    An ONNX model runs in ONNX Runtime, with our kernels where they are built (`library`); a torch module runs eagerly.
    Raises ElisionError when the model cannot be read."""

    def __init__(self, target: Any, example: Any, *, library: bool = True, threads: int = 0) -> None:
        self.target, self.library, self.threads = target, library, threads
        self._kept: OrderedDict[str, Built] = OrderedDict()
        self.example: Any = None
        if is_onnx(target):
            self.source = open_onnx(target)
            self.host = "onnx"
        else:
            self.source, self.example = open_torch(target, example)
            self.host = "fx"
        self.graph: Graph = self.source
        self.context = PassContext(table=table_for(self.host))

    def begin(self, call: Call) -> None:
        """Bring the graph to one form. `call`: what costs are estimated for, and what passes have as example."""
        names = self.graph.input_names
        self.context = PassContext(
            target="onnxruntime" if self.host == "onnx" else "torch",
            example_inputs=[call[name] for name in names],
            table=self.context.table,
            read_arrays=read_tensors,
        )
        if self.host == "onnx":
            self.graph = run_pipeline(self.source, "normalise", context=self.context, verify=False).graph

    def estimate(self, passes: list[Pass]) -> Any:
        """The estimated cost of a pipeline, which is not built. Raises as the passes do."""
        return self._run(passes)[1]

    def original(self) -> Built:
        """The model as it came: not even brought to one form."""
        return self._keep("the original", lambda: self._built(self.source, self._run([])[1], bare=True))

    def build(self, text: str, passes: list[Pass]) -> Built:
        """Raises ElisionError where a pass refuses, or the result does not run."""

        def make() -> Built:
            graph, cost = self._run(passes)
            if not any(single.name == "lower" for single in passes):
                graph = run_pipeline(graph, "lower", context=self.context, verify=False).graph
            return self._built(graph, cost)

        return self._keep(text, make)

    def _keep(self, text: str, make: Callable[[], Built]) -> Built:
        if text in self._kept:
            self._kept.move_to_end(text)
            return self._kept[text]
        built = make()
        self._kept[text] = built
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return built

    def _run(self, passes: list[Pass]) -> tuple[Graph, Any]:
        report = run_pipeline(self.graph, passes, context=self.context, verify=False)
        for single in report.passes:
            if single.declined:  # the same as a pipeline without it
                raise Refused(f"{single.name} did nothing: {single.declined}")
        last = report.passes[-1] if report.passes else None
        if last is not None and last.name == "lower":
            return report.graph, last.cost_before
        return report.graph, report.cost_after

    def _built(self, graph: Graph, cost: Any, bare: bool = False) -> Built:
        make = self._onnx if self.host == "onnx" else self._torch
        return Built(make(graph, bare), cost.seconds, cost.flops, [int(n) for n in cost.tokens_per_block])

    def _onnx(self, graph: Any, bare: bool) -> Callable[[Call], Outputs]:
        import onnxruntime

        from ..passes.onnx import io
        from .runners import plain_session

        form = "standard" if bare else "onnxruntime"
        if bare and isinstance(self.target, str | os.PathLike):
            model: Any = os.fspath(self.target)
        else:
            model = io.to_proto(graph.model, form, self.context.table).SerializeToString()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = self.threads
        loaded = (
            session(model, options, ["CPUExecutionProvider"])
            if self.library
            else plain_session(model, options)
        )
        names = [item.name for item in loaded.get_inputs()]

        def run(call: Call) -> Outputs:
            feeds = _wanted(call, names)
            try:
                return [np.asarray(o) for o in loaded.run(None, feeds)]
            except Exception as error:
                raise ElisionError(f"onnxruntime does not run it: {first_line(error)}") from error

        return run

    def _torch(self, graph: Any, bare: bool) -> Callable[[Call], Outputs]:
        import torch
        from torch.utils import _pytree as pytree

        from .runners import plain_array
        from .tensors import tensors_of

        module = graph.to_module()
        names = graph.input_names
        leaves, form = pytree.tree_flatten(self.example)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

        def run(call: Call) -> Outputs:
            tensors = tensors_of(_wanted(call, names))
            given = list(leaves)
            for place, name in zip(places, names):
                given[place] = tensors[name].to(leaves[place].device)
            added = {name: tensors[name] for name in names[len(places) :]}
            args, kwargs = pytree.tree_unflatten(given, form)
            with torch.no_grad():
                try:
                    result = module(*args, **{**kwargs, **added})
                except Exception as error:
                    raise ElisionError(f"the module does not run: {first_line(error)}") from error
                # Going to an array waits for the device.
                return [plain_array(t) for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]

        return run


def _wanted(call: Call, names: Sequence[str]) -> Call:
    """What a pipeline reads of a call. Raises ElisionError for an input that the data does not have."""
    for name in names:
        if name not in call:
            raise ElisionError(f"the pipeline takes an input {name!r}, which the data does not have")
    return {name: call[name] for name in names}


# ---- time ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Race:
    """How the challenger did: `ratio` is its time over the other's, the median over the rounds, in each of which both
    ran next to each other; `low` and `high` its 90 % interval. `surely`: the interval is on one side of 1."""

    ratio: float
    low: float
    high: float
    rounds: int

    @property
    def surely(self) -> bool:
        return self.low > 1 or self.high < 1


class Stopwatch:
    """Measures time. A test has one that reads it off what was built."""

    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, built: Built, call: Call) -> float:
        started = time.perf_counter()
        built.run(call)
        return time.perf_counter() - started

    def race(
        self, challenger: Built, other: Built, call: Call, *, least: int = 4, most: int = 12, until: float
    ) -> Race:
        """Both in turn, in one order as in `bench.interleave`, until it is sure which is faster: at least `least`
        rounds, at most `most`, and no new one after `until`."""
        for built in (challenger, other):
            self.seconds(built, call)
        logs: list[float] = []
        while len(logs) < most:
            logs.append(math.log(self.seconds(challenger, call) / self.seconds(other, call)))
            if len(logs) < least:
                continue
            if summary(logs).surely or self.now() > until:
                break
        return summary(logs)


def summary(logs: Sequence[float]) -> Race:
    """Median of log ratios, and its interval from their ranks: about 90 %, whatever their distribution.

    Of n pairs the k-th smallest and largest enclose the median with probability 1 - 2 P(Binomial(n, 1/2) < k)."""
    ordered = sorted(logs)
    n = len(ordered)
    k, tail = 0, 0.0
    while k < n // 2:
        tail += math.comb(n, k) / 2**n
        if 2 * tail > 0.1:
            break
        k += 1
    # Too few for any rank to do: the extremes.
    k = max(k, 1)
    middle = float(np.median(ordered))
    return Race(math.exp(middle), math.exp(ordered[k - 1]), math.exp(ordered[n - k]), n)
