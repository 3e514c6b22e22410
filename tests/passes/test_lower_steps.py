"""lower on step graphs: what stands around an attention over a cache joins it, and the function stays what it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from elision.kernels import cpu
from elision.passes.base import PassContext, known_passes
from elision.passes.ir.fx import FxGraph
from elision.passes.lower_steps import fuse_steps
from torch import Tensor, nn

from ..kernels import steps

HEADS, SHARED, WIDTH, CAPACITY, HIDDEN = 4, 2, 8, 40, 24
INPUTS = ("x", "cos", "sin", "key_cache", "value_cache", "slots", "prefix", "ancestors")
needs_kernels = pytest.mark.skipif(not cpu.available(), reason="the C++ kernels are not built")


def halves(x: Tensor) -> Tensor:
    return torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)


def pairs(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Layer(nn.Module):
    """One layer of a step graph, written as models write it; `style` says how."""

    def __init__(self, style: str, rotated: int = WIDTH) -> None:
        super().__init__()
        self.style, self.rotated = style, rotated
        sizes = [HEADS * WIDTH, SHARED * WIDTH, SHARED * WIDTH]
        self.sizes = sizes
        self.q, self.k, self.v = (nn.Linear(HIDDEN, n, bias=style == "biases") for n in sizes)
        self.qkv = nn.Linear(HIDDEN, sum(sizes))
        self.o = nn.Linear(sizes[0], HIDDEN, bias=False)
        self.gate, self.up = nn.Linear(HIDDEN, 20, bias=False), nn.Linear(HIDDEN, 20, bias=False)
        self.both = nn.Linear(HIDDEN, 40, bias=False)
        wide = style == "norm of all"
        self.q_norm = nn.Parameter(torch.rand(sizes[0] if wide else WIDTH) + 0.5)
        self.k_norm = nn.Parameter(torch.rand(sizes[1] if wide else WIDTH) + 0.5)

    def split(self, x: Tensor, norm: Tensor) -> Tensor:
        if self.style == "norm of all":
            x = rms(x, norm)
        x = x.view(1, x.shape[1], -1, WIDTH)
        if self.style == "norm before":
            x = rms(x, norm)
        x = x.transpose(1, 2)
        return rms(x, norm) if self.style == "norm behind" else x

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.style == "no angles":
            return x
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        change = pairs if self.style == "pairs" else halves
        first, rest = x[..., : self.rotated], x[..., self.rotated :]
        turned = first * cos + change(first) * sin
        return torch.cat([turned, rest], -1) if self.rotated < WIDTH else turned

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, *rows: Tensor
    ) -> Any:
        if self.style == "packed":
            q, k, v = self.qkv(x).split(self.sizes, -1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q, k = (
            self.turn(self.split(q, self.q_norm), cos, sin),
            self.turn(self.split(k, self.k_norm), cos, sin),
        )
        v = v.view(1, v.shape[1], -1, WIDTH).transpose(1, 2)
        out, keys, values = torch.ops.elision.cached_attention(q, k, v, keys, values, *rows, scale=0.3)
        x = x + self.o(out.transpose(1, 2).reshape(1, x.shape[1], -1))
        if self.style == "packed":
            gate, up = self.both(x).chunk(2, -1)
        else:
            gate, up = self.gate(x), self.up(x)
        return nn.functional.silu(gate) * up, keys, values


def operands(rotated: int = WIDTH, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    rows = steps.trees(CAPACITY, [(9, 6), (3, 4)], seed=1)
    count = len(rows.seen)
    caches = [torch.randn(SHARED, CAPACITY, WIDTH) for _ in range(2)]
    angles = [torch.randn(1, count, rotated) for _ in range(2)]
    return [torch.randn(1, count, HIDDEN), *angles, *caches, *rows.tensors]


def step_graph(layer: nn.Module, given: list[Tensor]) -> FxGraph:
    """The layer with any number of rows and of ancestors."""
    rows, deep = torch.export.Dim("rows", min=1, max=4096), torch.export.Dim("deep", min=1, max=4096)
    shapes = [{1: rows}, {1: rows}, {1: rows}, None, None, {0: rows}, {0: rows}, {0: rows, 1: deep}]
    spread = (*shapes[:5], tuple(shapes[5:]))
    return FxGraph.from_export(torch.export.export(layer.eval(), tuple(given), dynamic_shapes=spread))


def names(graph: Any) -> list[str]:
    return [op.target for op in graph.ops_of("elision")]


STYLES = [("halves", 8), ("halves", 4), ("pairs", 8), ("pairs", 6), ("no angles", 8), ("biases", 8)]
STYLES += [("norm before", 8), ("norm behind", 8), ("norm of all", 8), ("packed", 4)]


@pytest.mark.parametrize(("style", "rotated"), STYLES)
def test_a_layer_becomes_one_attention_and_one_gate(style: str, rotated: int) -> None:
    given = operands(rotated)
    graph = step_graph(Layer(style, rotated), given)
    expected = graph.to_module()(*given)
    assert fuse_steps(graph) == {
        "attention with its heads joined": 1,
        "gated": 1,
        **({"products side by side": 2} if style == "packed" else {}),
    }
    graph.verify()
    assert names(graph) == ["elision.joined_cached_attention", "elision.gated"]
    assert not graph.ops_of("transpose", "concat", "stack", "softmax")
    attention = graph.ops_of("elision")[0]
    assert (attention.operand(1) is None) == (style == "packed")
    assert attention.attrs["rotary"] == {"no angles": 0, "pairs": 2}.get(style, 1)
    for one, other in zip(graph.to_module()(*given), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


class Other(Layer):
    """Almost the same: the second half is not negated, other angles for keys, a result that is used twice."""

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.style == "not negated":
            swapped = torch.cat([x[..., WIDTH // 2 :], x[..., : WIDTH // 2]], -1)
            return x * cos.unsqueeze(1) + swapped * sin.unsqueeze(1)
        if self.style == "other angles" and x.shape[1] == SHARED:
            cos, sin = sin, cos
        if self.style == "angles per head":
            return x * x.sigmoid() + halves(x) * sin.unsqueeze(1)
        return super().turn(x, cos, sin)


@pytest.mark.parametrize("style", ["not negated", "other angles", "angles per head"])
def test_what_only_looks_alike_is_left(style: str) -> None:
    given = operands()
    graph = step_graph(Other(style), given)
    expected = graph.to_module()(*given)
    assert "attention with its heads joined" not in fuse_steps(graph)
    assert "elision.cached_attention" in names(graph)
    for one, other in zip(graph.to_module()(*given), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_graph_without_a_cache_is_left() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.silu(self.gate(x)) * self.up(x)

    graph = FxGraph.from_export(torch.export.export(Plain(), (torch.randn(1, 3, 8),)))
    before = graph.text()
    assert fuse_steps(graph) == {} and graph.text() == before


@needs_kernels
@pytest.mark.parametrize("style", ["halves", "packed", "norm of all"])
def test_lowered_for_the_cpu_the_caches_are_written_to(style: str) -> None:
    given = operands(4 if style == "packed" else WIDTH)
    graph = step_graph(Layer(style, given[1].shape[-1]), given)
    expected = graph.to_module()(*given)
    passes = known_passes()
    passes["fix-rows"]().run(graph, PassContext())
    passes["lower"]().run(graph, PassContext())
    graph.verify()
    assert "elision_cpu.joined_cached_attention_" in names(graph) and "elision_cpu.gated" in names(graph)
    # One product for q, k and v, one for the gate and what it opens, and one behind the attention.
    assert sum("linear_packed" in op.target for op in graph.ops) == 3
    module, caches = graph.to_module(), [x.clone() for x in given[3:5]]
    found = module(*given[:3], *caches, *given[5:])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert all(one.data_ptr() == other.data_ptr() for one, other in zip(found[1:], caches))
    for row in range(given[0].shape[1]):
        x, cos, sin = (t[:, row : row + 1] for t in given[:3])
        single = module(x, cos, sin, *(c.clone() for c in caches), *(t[row : row + 1] for t in given[5:]))
        assert torch.equal(single[0][0, 0], found[0][0, row])


@needs_kernels
def test_a_cache_that_something_else_reads_is_not_written_to() -> None:
    class Twice(Layer):
        def forward(
            self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, *rows: Tensor
        ) -> Any:
            return (*super().forward(x, cos, sin, keys, values, *rows), keys * 2)

    given = operands()
    graph = step_graph(Twice("halves"), given)
    expected = graph.to_module()(*given)
    outcome = known_passes()["lower"]().run(graph, PassContext())
    assert any("reads a cache as it was before" in note for note in outcome.notes)
    for one, other in zip(graph.to_module()(*given), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# ---- ONNX ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("llama", 32),
        ("llama", 4),
        ("cohere", 32),
        ("phi3", 32),
        ("qwen3", 32),
        ("gpt-neox", 4),
        ("gemma3", 32),
        ("smollm3", 32),
    ],
)
def test_step_graphs_of_files(name: str, bits: int) -> None:
    pytest.importorskip("transformers")
    from elision.passes.ir.onnx import OnnxGraph
    from elision.passes.onnx.io import to_proto
    from elision.passes.onnx.normalise import normalise
    from elision.runtime.lm_export import plain_causal_graph

    from ..runtime import lm_zoo

    model = lm_zoo.make(name)
    if name == "smollm3":  # the second layer turns nothing
        model.config.no_rope_layers = [1, 0]
        torch.manual_seed(0)
        model = type(model)(model.config)
    exported = torch.onnx.export(
        plain_causal_graph(model), dynamo=True, verbose=False, output_names=["logits"]
    )
    assert exported is not None
    normalise(exported.model)
    graph = OnnxGraph(exported.model)
    passes, context = known_passes(), PassContext(target="onnxruntime")
    if bits != 32:
        passes["quantize"](bits=bits, method="rtn").run(graph, context)
    passes["incremental"](capacity=CAPACITY).run(graph, context)
    passes["fix-rows"]().run(graph, context)
    rows = steps.trees(CAPACITY, [(9, 6), (3, 4)], seed=1)
    draw = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {n: t.numpy() for n, t in zip(INPUTS[5:], rows.tensors)}
    feeds["input_ids"] = draw.integers(3, 90, (1, len(rows.seen)))
    feeds["position_ids"] = np.array([[len(seen) - 1 for seen in rows.seen]])
    for value in graph.inputs:
        if value.name not in feeds:
            feeds[value.name] = draw.standard_normal([int(d) for d in value.shape or ()]).astype(np.float32)

    def outputs(custom: bool, fed: dict[str, np.ndarray]) -> list[np.ndarray]:
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        if custom:
            options.register_custom_ops_library(str(cpu.library_path()))
        session = ort.InferenceSession(to_proto(graph.model).SerializeToString(), options)
        return session.run(None, {i.name: fed[i.name] for i in session.get_inputs()})

    expected = outputs(False, feeds)
    outcome = passes["lower"]().run(graph, context)
    graph.verify()
    assert outcome.statistics["attention with its heads joined"] == 2
    assert outcome.statistics.get("gated", 0) == (0 if name == "gpt-neox" else 2)
    attentions = [op for op in graph.ops_of("elision") if op.target.endswith("joined_cached_attention")]
    assert len(attentions) == 2 and all(op.operand(1) is None for op in attentions)
    # Layers with a window and without are of one function, those without angles of one that our library knows too.
    names = {"joined_cached_attention"} | ({"joined_cached_attention_2"} if name == "smollm3" else set())
    assert {op.raw.op_type for op in attentions} == names and len(
        {op.raw.overload for op in attentions}
    ) == len(names)
    products = [op for op in graph.ops if op.target in ("elision.linear_rows", "elision.linear_nbits")]
    assert len(products) == 9  # four in a layer, and the head
    for custom in (False, True) if cpu.available() else (False,):
        found = outputs(custom, feeds)
        # The kernels round what a product of few bits reads, and plain operators do not.
        loose = 0.2 if custom and bits != 32 else 1e-4
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=loose, atol=loose)
    if not cpu.available():
        return
    found = outputs(True, feeds)
    written = {**feeds, **dict(zip([v.name for v in graph.inputs if "cache" in v.name], found[1:]))}
    for row in range(len(rows.seen)):
        one = {
            n: a[:, row : row + 1] if n in ("input_ids", "position_ids") else a for n, a in written.items()
        }
        one |= {n: written[n][row : row + 1] for n in INPUTS[5:]}
        assert np.array_equal(outputs(True, one)[0][0, 0], found[0][0, row]), (
            f"row {row} alone has other bits"
        )
