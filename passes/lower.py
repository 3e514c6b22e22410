"""lower: every op in the form that its target runs fastest, by the lowering table. The function stays the same.

In torch graphs an op of the dialect becomes our kernel for the device where there is one that takes it and is faster;
for MLIR it is taken apart into ATen. In ONNX graphs the canonical operators (attention, norms, GELUs, products) take
the form that ONNX Runtime's kernels run fastest; ops of the dialect stay functions there, which our library, where it
is registered, replaces by kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .base import Outcome, Pass, PassContext, register
from .errors import NothingMatched, PipelineError, Refused
from .ir.graph import Graph
from .lower_bias import set_biases_apart
from .lower_caches import write_into_caches
from .lower_packed import OPERANDS, pack_weights
from .lower_steps import fuse_steps
from .lowering import KERNEL, MLIR, ONNXRUNTIME, TARGETS, TORCH_CPU, TORCH_CUDA, Table, dialect_class
from .options import nearest

HOSTS = {ONNXRUNTIME: ("onnx",), TORCH_CPU: ("fx",), TORCH_CUDA: ("fx",), MLIR: ("fx", "onnx")}


@dataclass(frozen=True)
class LowerOptions:
    """target: onnxruntime, torch-cpu, torch-cuda or mlir; none: what the graph is made for, by host and device."""

    target: str | None = None

    def __post_init__(self) -> None:
        if self.target is not None and self.target not in TARGETS:
            raise PipelineError(f"unknown target {self.target!r}{nearest(self.target, TARGETS)}")


@register
class Lower(Pass):
    """Gives every op the form that its target runs fastest. Leaves a graph alone in which there is nothing to do."""

    name = "lower"
    exact = True
    summary = "the kernels and forms that the target runs fastest"
    Options = LowerOptions

    def run(self, graph: Graph, context: PassContext) -> Outcome:
        """Raises NothingMatched for a target that does not run this kind of graph."""
        target = self.options.target or target_of(graph)
        if graph.host not in HOSTS[target]:
            host = "torch" if graph.host == "fx" else "ONNX"
            runs = [name for name, hosts in HOSTS.items() if graph.host in hosts]
            raise NothingMatched(f"lower: {target} runs no {host} graphs (those are for {', '.join(runs)})")
        table = context.table or default_table()
        if target == ONNXRUNTIME:
            from .onnx.lower import lower_graph

            return lower_graph(graph, table)
        if target == MLIR:
            return take_apart(graph)
        return to_kernels(graph, target, table)


def target_of(graph: Graph) -> str:
    """What a graph is made for: ONNX Runtime, or torch on the device of its tensors."""
    if graph.host == "onnx":
        return ONNXRUNTIME
    return TORCH_CUDA if graph.device_type == "cuda" else TORCH_CPU  # type: ignore[attr-defined]


def default_table() -> Table:
    from .lowering_defaults import DEFAULTS

    return DEFAULTS


# ---- torch -------------------------------------------------------------------------------------------
def kernels_of(target: str) -> tuple[dict[str, Any], str]:
    """The kernels of a torch target by op, registered; where there are none, why not."""
    if target == TORCH_CUDA:
        from ..kernels import gpu

        try:
            return gpu.load(), ""
        except ModuleNotFoundError as error:
            return {}, str(error)
    from ..kernels import cpu

    return (cpu.kernels(), "") if cpu.available() else ({}, cpu.why_not())


def mutating_kernels(target: str) -> dict[str, Any]:
    """The kernels of a torch target that write into the caches they are given, by op."""
    from ..kernels import cpu

    return cpu.mutating_kernels() if target == TORCH_CPU and cpu.available() else {}


def to_kernels(graph: Graph, target: str, table: Table) -> Outcome:
    """Ops of the dialect as the kernels of `target`, where one takes them and the table finds it faster; on the CPU
    biases are set apart, too."""
    from ..kernels import OPS

    outcome = Outcome()
    if target == TORCH_CPU and (apart := set_biases_apart(graph)):
        outcome.changed = True
        outcome.statistics["biases set apart"] = apart
    if target == TORCH_CPU and (fused := fuse_steps(graph)):
        outcome.changed = True
        outcome.statistics |= fused
    ops = [op for op in graph.ops_of("elision") if op.target.partition(".")[0] == "elision"]
    if not ops:
        outcome.notes.append("the graph has no op of the dialect")
        return outcome
    kernels, problem = kernels_of(target)
    if problem:
        outcome.notes.append(problem)
    packed: dict[Any, Any] = {}
    writing = mutating_kernels(target)
    for op in ops:
        name = op.target.partition(".")[2]
        shapes = [None if v is None else v.shape for v in op.inputs]
        dtypes = [None if v is None else v.dtype for v in op.inputs]
        attrs = OPS[name].complete(op.attrs)
        reason = ""
        if name in writing:
            reason = write_into_caches(graph, op, writing[name], attrs)
            if not reason:
                outcome.changed = True
                count(outcome, f"{name} writes into its caches")
                continue
            reason = f"{name}: {reason}"
        elif name not in kernels:
            reason = "" if problem else f"{name}: no kernel for {target}"
        else:
            reason = kernels[name].refuses(shapes, dtypes, attrs)
            choice = table.choose(name, target, dialect_class(name, shapes, dtypes, attrs))
            if reason:
                reason = f"{name}: {reason}"
            elif not OPS[name].same_bits and choice is not None and choice.form != KERNEL:
                reason = f"{name}: ATen is as fast at this size"
            elif not OPS[name].same_bits and choice is None and target == TORCH_CUDA:
                # GPUs differ too much for a guess, and none was measured where the defaults come from.
                reason = f"{name}: not measured on this GPU (elision tune-kernels --target torch-cuda)"
        if name in kernels and not reason and target == TORCH_CPU and name in OPERANDS:
            reason = pack_weights(graph, op, name, attrs, packed)
            if not reason:
                outcome.changed = True
                count(outcome, f"{name} with a packed weight")
                continue
            outcome.notes.append(f"{name}: {reason}: it is packed in every call")
            reason = ""
        if name in kernels and not reason:
            graph.retarget(op, kernels[name].overload)  # type: ignore[attr-defined]
            outcome.changed = True
            count(outcome, f"{name} as {target} kernel")
            continue
        count(outcome, f"{name} as ATen")
        if reason and reason not in outcome.notes:
            outcome.notes.append(reason)
    if packed:
        graph.remove_dead()  # the weights as they were
    return outcome


def take_apart(graph: Graph) -> Outcome:
    """Every op of the dialect, kernels too, as the operators of its definition that torch-mlir takes."""
    from ..kernels import definition_of

    if graph.host == "onnx":
        from .onnx.mlir import decompose
    else:
        from .ir.fx_mlir import decompose
    for op in graph.ops_of("elision"):
        definition = definition_of(op.target)
        if definition is not None and definition.bounds is not None:
            raise Refused(
                f"{op.target} (%{op.name}) makes a length of data, and a file of MLIR has numbers for its lengths"
            )
    counts = decompose(graph)  # type: ignore[arg-type]
    if not counts:
        return Outcome(notes=["nothing to lower: the graph has no op that torch-mlir does not take"])
    return Outcome(changed=True, statistics={f"{name} taken apart": times for name, times in counts.items()})


def count(outcome: Outcome, what: str) -> None:
    outcome.statistics[what] = int(outcome.statistics.get(what, 0)) + 1
