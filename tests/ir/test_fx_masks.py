"""Writing under a mask: what it is to an analysis, and that it stays the same."""

from __future__ import annotations

import torch
from elision.passes.ir.fx import FxGraph
from torch import Tensor, nn


class Masked(nn.Module):
    """Zeros where the mask is true; the mask has some of the axes of x, or all."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x * 2
        x[mask] = 0.0
        return x + 1


def traced(axes: int) -> tuple[FxGraph, Tensor, Tensor]:
    x = torch.randn(2, 5, 3)
    mask = torch.rand(x.shape[:axes]) > 0.5
    return FxGraph.trace(Masked(), (x, mask)), x, mask


def test_one_value_under_a_mask_of_the_whole_is_a_choice_place_by_place() -> None:
    graph, x, mask = traced(3)
    assert not graph.ops_of("scatter")
    (where,) = [op for op in graph.ops if op.attrs.get("fn") == "where"]
    assert where.output.shape == (2, 5, 3)
    assert torch.equal(graph.run(x, mask), Masked()(x, mask))


def test_a_mask_of_some_axes_stands_for_all_of_them() -> None:
    graph, x, mask = traced(2)
    (scatter,) = graph.ops_of("scatter")
    assert scatter.attrs["axes"] == (0, 1)
    assert torch.equal(graph.run(x, mask), Masked()(x, mask))
