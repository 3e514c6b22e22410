"""The FX view inside a torch.compile backend: retraced, viewed, and handed on to Inductor."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from elision.passes.ir.fx import FxGraph
from elision.passes.ir.fx_trace import retrace
from torch import fx, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor.compile_fx import compile_fx
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).parent))
import small_models

torch.set_num_threads(1)


class Backend:
    """Retraces, views, gives the graph on; remembers the views."""

    def __init__(self, compiler: Any) -> None:
        self.compiler = compiler
        self.graphs: list[FxGraph] = []

    def __call__(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graph = FxGraph.from_module(retrace(module, example_inputs), example_inputs)
        graph.verify()
        assert graph.ops_of("unknown") == []
        self.graphs.append(graph)
        (last,) = graph.outputs[-1:]
        # An edit that changes nothing, so that the prepared graph is what runs.
        graph.replace_output(len(graph.outputs) - 1, last)
        assert graph.edited
        return self.compiler(graph.to_module(), list(example_inputs))


def loss(result: Any) -> torch.Tensor:
    leaves = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
    return torch.stack([t.float().pow(2).mean() for t in leaves]).sum()


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(module: Any, reference: nn.Module, args: Any, kwargs: Any, tolerance: float) -> None:
    """One forward and backward of both; results, gradients and buffers must agree."""
    twin = reference if isinstance(reference, nn.Module) else None
    assert twin is not None
    found, expected = loss(module(*args, **kwargs)), loss(twin(*args, **kwargs))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    found.backward()
    expected.backward()
    for (name, a), b in zip(module.named_parameters(), twin.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=tolerance)
    for a, b in zip(module.buffers(), twin.buffers()):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["timm_vit", "timm_swin", "bert", "t5_encoder", "clip_text", "unet"])
def test_training_step_through_the_view(name: str) -> None:
    module, args, kwargs = small_models.build(name)
    reference = copy.deepcopy(module)
    backend = Backend(aot_eager)
    step(torch.compile(module, backend=backend, fullgraph=True), reference, args, kwargs, 1e-5)
    (graph,) = backend.graphs
    held = [n.meta.get("elision_tensor") for n in graph.module.graph.nodes if n.op == "placeholder"]
    own = {id(p) for p in module.parameters()}
    assert any(id(t) in own for t in held)
    assert all(v.origin == "input" for v in graph.inputs)
    assert len(graph.inputs) <= len(pytree.tree_leaves((args, kwargs)))


class Small(nn.Module):
    """A convolution, a batch norm that is trained, an in-place activation, and one attention written out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 2, 2), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        attention = ((q * 0.5) @ k.transpose(-2, -1)).softmax(-1)
        return x + (attention @ v).transpose(1, 2).flatten(2)


def test_inductor_trains_with_buffers_and_a_raised_attention() -> None:
    torch.manual_seed(0)
    module = Small().train()
    reference, backend = copy.deepcopy(module), Backend(compile_fx)
    compiled = torch.compile(module, backend=backend)
    for _ in range(2):
        step(compiled, reference, (torch.randn(2, 3, 8, 8),), {}, 1e-4)
    assert len(backend.graphs) == 1
    assert len(backend.graphs[0].ops_of("attention")) == 1
    assert int(module.norm.num_batches_tracked) == 2


@pytest.mark.parametrize("name", ["timm_vit", "bert"])
def test_dynamic_shapes(name: str) -> None:
    module, args, kwargs = small_models.build(name)
    reference, backend = copy.deepcopy(module), Backend(aot_eager)
    compiled = torch.compile(module, backend=backend, dynamic=True)
    step(compiled, reference, args, kwargs, 1e-5)
    count = len(backend.graphs)
    symbols = {
        str(s)
        for v in backend.graphs[-1].inputs
        for d in v.shape or ()
        for s in getattr(d, "free_symbols", ())
    }
    assert symbols
    args, kwargs = pytree.tree_map(lambda t: torch.cat([t, t]), (args, kwargs))
    with torch.no_grad():
        torch.testing.assert_close(loss(compiled(*args, **kwargs)), loss(reference(*args, **kwargs)))
    assert len(backend.graphs) <= count + 1


def test_an_unedited_graph_is_the_retraced_one() -> None:
    module, args, _ = small_models.build("timm_swin")
    results = []

    def plain(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        return aot_eager(gm, list(example_inputs))

    def viewed(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graph = FxGraph.from_module(retrace(gm, example_inputs), example_inputs)
        assert graph.ops_of("attention") and not graph.edited
        return aot_eager(graph.to_module(), list(example_inputs))

    for backend in (plain, viewed):
        torch._dynamo.reset()
        with torch.no_grad():
            results.append(torch.compile(module, backend=backend)(*args))
    assert torch.equal(*results)
