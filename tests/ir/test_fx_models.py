"""The FX view of other people's models: what it gives back is what went in, to the bit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from elision.passes.ir.fx import FxGraph
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).parent))
import small_models

torch.set_num_threads(1)


def tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("name", small_models.MODELS)
@torch.no_grad()
def test_view_gives_back_the_model_to_the_bit(name: str) -> None:
    module, args, kwargs = small_models.build(name)
    graph = FxGraph.trace(module, args, kwargs)
    before = tensors(module(*args, **kwargs))
    after = tensors(graph.to_module()(*args, **kwargs))
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    graph.verify()
    assert graph.copy().text() == graph.text()
