"""linear_nbits against onnxruntime's MatMulNBits, for the rows that checking several tokens at once takes.

One file per shape, with as many weights as do not fit the caches; onnxruntime runs it as it is (the function's body is
MatMulNBits with 8-bit activations) and with our library. The question is the cost of M rows over that of one. The
floor is the larger of two times measured in the same run: the weights read once, and the multiply-adds at four times
the speed of a float32 product, which is what instructions on bytes do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from elision.kernels import OPS
from elision.runtime.bench import interleave, timing
from elision.runtime.session import session
from onnx import helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parent.parent))
from harness import limits

from tests.kernels.linear_cases import quantized

SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536), (2048, 2048), (8192, 2048))
ROWS = (1, 2, 4, 8, 16, 32, 64, 256)
KINDS = ((4, 32, "none"), (4, 128, "ints"), (8, 32, "none"))
"""bits, group, zeros"""
ENOUGH = 100 << 20  # bytes of weights, more than a processor's caches


def products(channels: int, width: int, bits: int, group: int, zeros: str) -> tuple[bytes, int, int]:
    """A file of many products of one operand, the bytes of their weights, and how many they are."""
    parts = quantized(channels, width, bits=bits, group=group, zeros=zeros)
    attrs = OPS["linear_nbits"].pin([(1, width), (channels, 1, 1)], {"bits": bits, "group": group})
    signature = [(2, 1), (3, 2), (2, 1), (2, 2) if parts[2] is not None else None]
    function = OPS["linear_nbits"].onnx_function(signature, attrs, 20)
    size = sum(t.numel() * t.element_size() for t in parts if t is not None)
    count = -(-ENOUGH // size)
    nodes, tensors, outputs = [], [], []
    for i in range(count):
        names = ["x"]
        for name, part in zip(("weight", "scales", "zeros"), parts):
            names.append("" if part is None else f"{name}{i}")
            if part is not None:
                tensors.append(numpy_helper.from_array(part.numpy(), names[-1]))
        node = helper.make_node(function.name, names, [f"y{i}"], domain="elision", **attrs)
        node.overload = function.overload
        nodes.append(node)
        outputs.append(helper.make_tensor_value_info(f"y{i}", 1, ["m", channels]))
    x = helper.make_tensor_value_info("x", 1, ["m", width])
    graph = helper.make_graph(nodes, "products", [x], outputs, tensors)
    opsets = [helper.make_opsetid(d, v) for d, v in (("", 20), ("elision", 1), ("com.microsoft", 1))]
    made = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(made)
    return made.SerializeToString(), size * count, count


def sessions(stored: bytes) -> dict[str, Any]:
    """onnxruntime alone and with our library."""
    options = [onnxruntime.SessionOptions() for _ in range(2)]
    for one in options:
        one.intra_op_num_threads = torch.get_num_threads()
        one.add_session_config_entry("session.intra_op.allow_spinning", "0")
    plain = onnxruntime.InferenceSession(stored, options[0], providers=["CPUExecutionProvider"])
    return {"MatMulNBits": plain, "ours": session(stored, options[1], providers=["CPUExecutionProvider"])}


def measure(
    shape: tuple[int, int], kind: tuple[int, int, str], rows: tuple[int, ...], rounds: int
) -> dict[str, Any]:
    channels, width = shape
    stored, size, count = products(channels, width, *kind)
    sides = sessions(stored)
    found: dict[str, dict[int, float]] = {name: {} for name in sides}
    for m in rows:
        feeds = {"x": np.random.default_rng(0).standard_normal((m, width), dtype=np.float32)}
        actions = {name: (lambda s=side, f=feeds: s.run(None, f)) for name, side in sides.items()}
        for name, runs in interleave(actions, rounds=rounds if m <= 64 else 3, warm_up=1).items():
            found[name][m] = timing(name, runs).median_ms
    bytes_second, adds_second = limits(rounds)
    floor = {
        m: 1e3 * max(size / bytes_second, m * channels * width * count / (4 * adds_second)) for m in rows
    }
    return {
        "case": f"{channels} x {width}, {kind[0]} bits, groups of {kind[1]}, zeros: {kind[2]}",
        "bytes": size,
        "ms": found,
        "floor_ms": floor,
        "of_one_row": {name: {m: t / times[1] for m, t in times.items()} for name, times in found.items()},
        "of_floor": {m: floor[m] / t for m, t in found["ours"].items()},
        "read_gb_s": bytes_second / 1e9,
    }


def run(quick: bool = False) -> dict[str, Any]:
    shapes, kinds = (SHAPES[:1], KINDS[:1]) if quick else (SHAPES, KINDS)
    rows = [measure(s, k, ROWS[:5] if quick else ROWS, 5 if quick else 15) for k in kinds for s in shapes]
    ours, theirs = ([row["of_one_row"][name] for row in rows] for name in ("ours", "MatMulNBits"))
    middle = {m: [float(np.median([side[m] for side in sides])) for sides in (ours, theirs)] for m in (8, 16)}
    gain = float(np.median([row["ms"]["MatMulNBits"][1] / row["ms"]["ours"][1] for row in rows]))
    return {
        "what": "linear_nbits, cost of M rows over that of one (median of the cases)",
        "aim": "T(8)/T(1) 1.5, T(16)/T(1) 2.2",
        "figure": "; ".join(
            f"T({m})/T(1) {own:.2f}, of MatMulNBits {other:.2f}" for m, (own, other) in middle.items()
        )
        + f"; one row {gain:.2f}x of MatMulNBits",
        "rows": rows,
    }
