"""cached_attention against onnxruntime's GroupQueryAttention (the operator of genai's models) and torch's fused kernel.

All read the same number of keys. GroupQueryAttention appends rows to a past and turns them by no angles here; torch's
kernel is given keys and values already in place, and a mask where several rows see different ones. The floor is the
larger of two times measured in the same run: both caches read once, and the multiply-adds at the speed of a product."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from elision.kernels import cpu
from elision.runtime.bench import interleave, timing
from onnx import helper

sys.path.insert(0, str(Path(__file__).parent.parent))
from harness import limits

from tests.kernels import onnx_call, steps

HEADS = ((9, 3, 64), (32, 8, 128), (16, 16, 64))
"""heads, heads of keys, width"""
CASES = ((1, 128), (1, 512), (1, 2000), (8, 512), (16, 512), (64, 512), (512, 0), (1024, 0))
"""new rows, keys before them"""


def options() -> onnxruntime.SessionOptions:
    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads = torch.get_num_threads()
    made.log_severity_level = 3
    made.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return made


def grouped_query(heads: int, shared: int, width: int, rows: int, past: int) -> Any:
    """GroupQueryAttention whose present is its past's buffer, long enough for both."""
    total, f = past + rows, onnx.TensorProto.FLOAT
    names = ["q", "k", "v", "past_k", "past_v", "seqlens", "total"]
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        ["out", "present_k", "present_v"],
        domain="com.microsoft",
        num_heads=heads,
        kv_num_heads=shared,
    )
    cache = [1, shared, total, width]
    shapes = [[1, rows, heads * width], *[[1, rows, shared * width]] * 2, cache, cache, [1], []]
    types = [f] * 5 + [onnx.TensorProto.INT32] * 2
    inputs = [helper.make_tensor_value_info(n, t, s) for n, t, s in zip(names, types, shapes)]
    outputs = [helper.make_tensor_value_info("out", f, shapes[0])]
    outputs += [helper.make_tensor_value_info(n, f, cache) for n in ("present_k", "present_v")]
    graph = helper.make_graph([node], "grouped", inputs, outputs)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options())
    feeds = [np.random.default_rng(0).standard_normal(s, dtype=np.float32) for s in shapes[:5]]
    feeds += [np.array([total - 1], np.int32), np.array(total, np.int32)]
    return bound(session, dict(zip(names, feeds)), {"past_k": "present_k", "past_v": "present_v"}, "out")


def bound(session: Any, feeds: dict[str, np.ndarray], same: dict[str, str], out: str) -> Any:
    """A call whose operands in `same` are the buffers of those results too."""
    binding = session.io_binding()
    for name, array in feeds.items():
        value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        binding.bind_ortvalue_input(name, value)
        if name in same:
            binding.bind_ortvalue_output(same[name], value)
    binding.bind_output(out)

    def call() -> None:
        session.run_with_iobinding(binding)

    call.held = feeds  # type: ignore[attr-defined]
    return call


def ways(heads: int, shared: int, width: int, rows: int, past: int) -> dict[str, Any]:
    capacity = past + rows + 1
    seen = steps.chunk(past, rows)
    given = [t for t in steps.operands(seen, heads, shared, capacity, width) if t is not None]
    flat = [x.transpose(1, 2).flatten(2).contiguous() for x in given[:3]]
    attrs = {"heads": heads, "kv_heads": shared}
    joined = [*flat, *given[3:], *[None] * 5]
    made = options()
    made.register_custom_ops_library(str(cpu.library_path()))
    model = onnx_call.model("joined_cached_attention", joined, attrs)
    session = onnxruntime.InferenceSession(model.SerializeToString(), made)
    names = ["q", "k", "v", "key_cache", "value_cache", "slots", "prefix", "ancestors"]
    feeds = {n: t.numpy() for n, t in zip(names, joined) if t is not None}
    same = {"key_cache": "new_key_cache", "value_cache": "new_value_cache"}
    q, keys, values = given[0], *(torch.randn(1, shared, past + rows, width) for _ in range(2))
    past_or_own = torch.ones(rows, past + rows, dtype=torch.bool).tril(past)
    mask = None if rows == 1 else past_or_own
    write = cpu.mutating_kernels()["joined_cached_attention"]
    return {
        "ours in onnxruntime": bound(session, feeds, same, "out"),
        "GroupQueryAttention": grouped_query(heads, shared, width, rows, past),
        "ours in torch": lambda: write(*joined, **attrs),
        "torch SDPA": lambda: torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, enable_gqa=heads != shared
        ),
    }


def run(quick: bool = False) -> dict[str, Any]:
    cpu.kernels()
    found, rounds = [], 7 if quick else 31
    bytes_second, adds_second = limits(rounds)
    for heads, shared, width in HEADS[:1] if quick else HEADS:
        for rows, past in CASES[:4] if quick else CASES:
            sides = ways(heads, shared, width, rows, past)
            times = interleave(sides, rounds=rounds, warm_up=2)
            ms = {name: timing(name, runs).median_ms for name, runs in times.items()}
            size = 8 * shared * (past + rows) * width
            pairs = sum(past + m + 1 for m in range(rows))
            floor = 1e3 * max(size / bytes_second, 2 * heads * width * pairs / adds_second)
            case = f"{rows} rows behind {past}, {heads} / {shared} heads x {width}"
            found.append({"case": case, "ms": ms, "floor_ms": floor})
    gain = {
        theirs: [row["ms"][theirs] / row["ms"][ours] for row in found]
        for ours, theirs in (("ours in onnxruntime", "GroupQueryAttention"), ("ours in torch", "torch SDPA"))
    }
    figures = [f"{np.median(r):.2f}x of {name} ({min(r):.2f} to {max(r):.2f})" for name, r in gain.items()]
    return {
        "what": "attention over a cache, 1 to 1024 new rows (median of the cases)",
        "aim": "1x",
        "figure": "; ".join(figures),
        "rows": found,
    }
