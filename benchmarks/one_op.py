"""What the benchmarks of single ops share: every way to run one, interleaved, beside the floor of the machine.

An op's file says its cases: operands, attributes, and the operations that no implementation can save. The floor of a
case is the larger of two times measured in the same run: these operations at the speed of a large matrix product, and
a copy of as many bytes as the op must read and write.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from elision.kernels import OPS, cpu
from elision.runtime.backend import register_decompositions
from elision.runtime.bench import interleave, timing
from elision.runtime.session import session

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.kernels.onnx_call import model

Operands = list[torch.Tensor | None]


@dataclass(frozen=True)
class Case:
    """One call. `flops`: the multiply-adds, two each, that the result needs whatever computes it."""

    label: str
    operands: Operands
    attrs: dict[str, Any]
    flops: float = 0.0


def bytes_of(tensors: Sequence[torch.Tensor | None]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def as_list(out: Any) -> list[torch.Tensor]:
    return list(out) if isinstance(out, tuple) else [out]


def ways(op: str, case: Case, wanted: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """The op under every host: ATen, Inductor, our kernel in torch; the function body and our kernel in ONNX
    Runtime."""
    operands, attrs = case.operands, case.attrs
    found: dict[str, Callable[[], Any]] = {}
    if hasattr(torch.ops.elision, op):
        reference = getattr(torch.ops.elision, op)
        torch._dynamo.reset()  # every case is compiled for its own lengths
        compiled = torch.compile(lambda *given: reference(*given, **attrs), dynamic=False)
        found["ATen"] = lambda: reference(*operands, **attrs)
        found["Inductor"] = lambda: compiled(*operands)
    kernels = cpu.kernels() if cpu.available() else {}
    if op in kernels:
        found["C++ in torch"] = lambda: kernels[op].overload(*operands, **attrs)
    names = [name.removesuffix("?") for name in OPS[op].inputs]
    feeds = {name: t.contiguous().numpy() for name, t in zip(names, operands) if t is not None}
    stored = model(op, operands, attrs, 20).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    plain = onnxruntime.InferenceSession(stored, options, providers=["CPUExecutionProvider"])
    found["ONNX Runtime"] = lambda: plain.run(None, feeds)
    if cpu.available():
        own = onnxruntime.SessionOptions()
        own.intra_op_num_threads = torch.get_num_threads()
        ours = session(stored, own, providers=["CPUExecutionProvider"])
        found["C++ in ONNX Runtime"] = lambda: ours.run(None, feeds)
    return {name: found[name] for name in wanted if name in found}


WAYS = ("ATen", "Inductor", "C++ in torch", "ONNX Runtime", "C++ in ONNX Runtime")


def floors(case: Case, results: Sequence[torch.Tensor]) -> dict[str, Callable[[], Any]]:
    """The copy and the product that a floor is read off."""
    moved = bytes_of(case.operands) + bytes_of(results)
    source = torch.empty(max(moved // 8, 1), dtype=torch.float32)
    target = torch.empty_like(source)
    sides: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source)}
    if case.flops:
        square = torch.randn(768, 768)
        sides["product"] = lambda: square @ square
    return sides


def interleave_hosts(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Runs in turn, torch's among themselves and ONNX Runtime's: idle threads of either turn for a while after a run,
    and would slow down the other's."""
    times: dict[str, list[float]] = {}
    for onnx in (False, True):
        mine = {name: run for name, run in sides.items() if name.endswith("ONNX Runtime") is onnx}
        times |= interleave(mine, rounds=rounds, warm_up=5, seconds=20)
    return times


def measure(op: str, case: Case, rounds: int, wanted: Sequence[str] = WAYS) -> dict[str, Any]:
    """Medians in milliseconds of every way, and the floor."""
    register_decompositions()
    results = as_list(getattr(torch.ops.elision, op)(*case.operands, **case.attrs))
    with torch.no_grad():
        times = interleave_hosts({**ways(op, case, wanted), **floors(case, results)}, rounds)
    medians = {name: timing(name, runs).median_ms for name, runs in times.items()}
    copy, product = medians.pop("copy"), medians.pop("product", 0.0)
    by_flops = case.flops / (2 * 768**3) * product
    ours = medians.get("C++ in torch")
    return {
        "case": case.label,
        "ms": medians,
        "floor_ms": max(copy, by_flops),
        "bound": "memory" if copy >= by_flops else "arithmetic",
        "bytes": bytes_of(case.operands) + bytes_of(results),
        "flops": case.flops,
        "of_floor": max(copy, by_flops) / ours if ours else None,
    }


def report(op: str, cases: Sequence[Case], quick: bool, wanted: Sequence[str] = WAYS) -> dict[str, Any]:
    """The result of an op's benchmark: rows, and the first case in words."""
    rows = [measure(op, case, 10 if quick else 60, wanted) for case in (cases[:1] if quick else cases)]
    first = rows[0]["ms"]
    parts = []
    for theirs, ours in (("ATen", "C++ in torch"), ("ONNX Runtime", "C++ in ONNX Runtime")):
        if theirs in first and ours in first:
            parts.append(f"{first[theirs] / first[ours]:.2f}x of {theirs}")
    share = rows[0]["of_floor"]
    floor = "" if share is None else f", {share:.0%} of the floor ({rows[0]['bound']})"
    return {
        "what": f"{op}, {rows[0]['case']}",
        "aim": "",
        "figure": ", ".join(parts) + floor,
        "rows": rows,
    }
