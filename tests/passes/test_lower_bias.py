"""Biases leave their linear only where an elementwise operation follows, and Inductor then has none to write first."""

from __future__ import annotations

import pytest
import torch
from elision.passes.ir.fx import FxGraph
from elision.passes.lower_bias import set_biases_apart
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code


class Block(nn.Module):
    """A projection into heads, one back with dropout and a residual, and an MLP whose result is also put out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        heads = self.q(x).unflatten(2, (2, 8)).transpose(1, 2).softmax(-1)
        x = x + self.drop(self.out(heads.transpose(1, 2).flatten(2)))
        y = self.down(nn.functional.gelu(self.up(x)))
        return x + y, y


@pytest.fixture
def lowered() -> tuple[nn.Module, FxGraph, Tensor]:
    model, x = Block().eval(), torch.randn(2, 7, 16)
    graph = FxGraph.trace(model, (x,))
    assert set_biases_apart(graph) == 2
    graph.verify()
    return model, graph, x


def test_where_the_bias_stays(lowered: tuple[nn.Module, FxGraph, Tensor]) -> None:
    _, graph, _ = lowered
    biases = [op.operand(2) is not None for op in graph.ops_of("linear")]
    # Into heads (a reshape follows), out of them, up, and down (which is put out itself).
    assert biases == [True, False, False, True]
    assert set_biases_apart(graph) == 0


def test_numbers_and_gradients_stay(lowered: tuple[nn.Module, FxGraph, Tensor]) -> None:
    model, graph, x = lowered
    module = graph.to_module()
    for one, other in zip(module(x), model(x)):
        torch.testing.assert_close(one, other)
    grads = [
        torch.autograd.grad(run(x)[0].square().sum(), list(model.parameters())) for run in (model, module)
    ]
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_inductor_does_not_put_them_back(lowered: tuple[nn.Module, FxGraph, Tensor]) -> None:
    _, graph, x = lowered
    torch._dynamo.reset()
    with torch.no_grad():
        _, code = run_and_get_code(torch.compile(graph.to_module()), x)
    assert code[0].count("extern_kernels.mm(") == 2 and code[0].count("extern_kernels.addmm(") == 2


def test_short_types_keep_their_bias() -> None:
    """The product would be rounded twice."""
    graph = FxGraph.trace(Block().eval().bfloat16(), (torch.randn(2, 7, 16).bfloat16(),))
    assert set_biases_apart(graph) == 0
