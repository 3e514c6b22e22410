"""The FX view of other people's models: what it gives back is what went in, to the bit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from elision.passes.ir.fx import FxGraph
from torch import fx
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).parent))
import small_models

torch.set_num_threads(1)


def tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


# The library itself adds its mask to the bias only while tracing, which rounds differently.
TRACES_DIFFERENTLY = {"hf_beit"}


@pytest.mark.parametrize("name", small_models.MODELS)
@torch.no_grad()
def test_view_gives_back_the_model_to_the_bit(name: str) -> None:
    module, args, kwargs = small_models.build(name)
    program = torch.export.export(module, args, kwargs, strict=False)
    graph = FxGraph.from_export(program)
    plain = FxGraph.from_export(program, raise_attention=False)
    eager = tensors(module(*args, **kwargs))
    exported = tensors(program.module()(*args, **kwargs))
    prepared = fx.GraphModule(plain.module, plain.module.graph)
    for found in (tensors(graph.to_module()(*args, **kwargs)), tensors(prepared(*args, **kwargs))):
        assert len(found) == len(exported) == len(eager)
        assert all(torch.equal(a, b) for a, b in zip(exported, found))
        if name not in TRACES_DIFFERENTLY:
            assert all(torch.equal(a, b) for a, b in zip(eager, found))
        torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", small_models.MODELS)
def test_every_op_has_a_kind(name: str) -> None:
    module, args, kwargs = small_models.build(name)
    graph = FxGraph.trace(module, args, kwargs)
    assert [repr(op) for op in graph.ops_of("unknown")] == []
    graph.verify()
    assert graph.copy().text() == graph.text()
