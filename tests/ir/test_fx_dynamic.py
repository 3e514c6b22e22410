"""Models traced with a dynamic batch and a dynamic sequence: the view keeps both open."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from elision.passes.ir.fx import FxGraph
from torch import fx, nn
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).parent))
import small_models

torch.set_num_threads(1)

AUTO = torch.export.Dim.AUTO


def tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def symbols(graph: FxGraph) -> int:
    found: set[Any] = set()
    for value in graph.inputs:
        for dim in value.shape or ():
            found |= set(getattr(dim, "free_symbols", ()))
    return len(found)


IMAGES = [
    "timm_vit",
    "timm_eva02",
    "timm_swin",
    "timm_samvit",
    "hf_dinov2_registers",
    "hf_dinov3",
    "siglip",
    "unet",
]
TEXTS = ["bert", "modernbert", "t5_encoder", "clip_text"]


@pytest.mark.parametrize("name", IMAGES)
def test_dynamic_batch(name: str) -> None:
    module, args, _ = small_models.build(name)
    shapes = tuple({0: AUTO} if a.dim() > 1 else None for a in args)
    graph = FxGraph.trace(module, args, dynamic_shapes=(*shapes,))
    assert symbols(graph) == 1
    graph.verify()
    assert graph.ops_of("unknown") == []
    wide = tuple(torch.cat([a, a[:1]]) if a.dim() > 1 else a for a in args)
    prepared = fx.GraphModule(graph.module, graph.module.graph)
    with torch.no_grad():
        expected = tensors(module(*wide))
        assert all(map(torch.equal, tensors(graph.to_module()(*wide)), expected))
        torch.testing.assert_close(tensors(prepared(*wide)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TEXTS)
def test_dynamic_batch_and_sequence(name: str) -> None:
    module, _, kwargs = small_models.build(name)
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=4, max=12)
    shapes = {key: {0: batch, 1: length} for key in kwargs}
    graph = FxGraph.trace(module, (), kwargs, shapes)
    assert symbols(graph) == 2
    graph.verify()
    assert graph.ops_of("unknown") == []
    longer = small_models.tokens(4, 11)
    with torch.no_grad():
        expected = tensors(module(**longer))
        for found in (graph.to_module(), fx.GraphModule(graph.module, graph.module.graph)):
            torch.testing.assert_close(tensors(found(**longer)), expected, rtol=1e-5, atol=1e-5)


class Block(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.reshape(2, 4, 2, 3).transpose(1, 2)
        return x + (y * 2).relu().transpose(1, 2).reshape(2, 4, 6).tanh()


def stacked(count: int) -> fx.GraphModule:
    """`count` copies of the block's eight calls, one behind the other."""
    block = torch.export.export(Block(), (torch.randn(2, 4, 6),)).module(check_guards=False)
    graph, value = fx.Graph(), None
    for _ in range(count):
        copied: dict[fx.Node, fx.Node] = {}
        for node in block.graph.nodes:  # type: ignore[union-attr]
            if node.op == "placeholder":
                copied[node] = value if value is not None else graph.node_copy(node)
            elif node.op == "call_function":
                copied[node] = value = graph.node_copy(node, copied.__getitem__)
    graph.output(value)
    return fx.GraphModule(nn.Module(), graph)


def test_four_thousand_calls_in_two_seconds() -> None:
    module = stacked(500)
    start = time.process_time()
    graph = FxGraph.from_module(module)
    took = time.process_time() - start
    assert len(graph.ops) == 4000
    assert took < 4, f"{took:.2f} s"  # 1 s on an idle core; the bound is for busy ones

    start = time.process_time()
    for op in graph.ops_of("elementwise")[:200]:
        graph.insert_call(torch.ops.aten.neg.default, [op.output], after=op)
    assert time.process_time() - start < 1
    graph.remove_dead()
    assert len(graph.ops) == 4000
