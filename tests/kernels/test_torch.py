"""The ops inside torch's machinery: gradients, symbolic lengths, autocast, Inductor."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from elision.kernels import OPS, decompositions
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch.export import Dim

from .cases import call, padded_size, token_map

elision = torch.ops.elision


@pytest.mark.parametrize("r", [3, 140])
def test_gradients_of_what_carries_features(r: int) -> None:
    count = 14 if r == 3 else 290
    slot, keep, source = token_map(2, count, r)
    x = torch.randn(2, count, 1 + (r == 3), dtype=torch.float64, requires_grad=True)

    def through(x: Tensor) -> tuple[Tensor, ...]:
        y, size = elision.merge_tokens(x, None, slot, keep, source, axis=1)
        return (
            y,
            elision.restore_tokens(y, slot, axis=1),
            elision.pool_tokens(y, size, axis=1),
            elision.select_tokens(x, keep, axis=1, rank=3),
        )

    assert torch.autograd.gradcheck(through, (x,), fast_mode=r > 3)


class Merged(nn.Module):
    """Matching, merging, attention with sizes, pooling and restoring, with weights to train."""

    def __init__(self, padded: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.padded = padded

    def forward(self, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.inner(x)
        if self.padded:
            maps = elision.match_padded_tokens(h, size, r=4, prefix=1)
        else:
            maps = elision.match_tokens(h, r=4, prefix=1)
        y, sizes = elision.merge_tokens(h, size, *maps, axis=1)
        q = y.unflatten(2, (2, 8)).transpose(1, 2)
        attended = elision.attention(q, q, q, None, sizes)
        return elision.restore_tokens(y, maps[0], axis=1), attended, elision.pool_tokens(y, sizes, axis=1)


@pytest.mark.parametrize("padded", [False, True])
def test_export_with_dynamic_batch_and_tokens(padded: bool) -> None:
    model = Merged(padded)
    axes = {0: Dim("batch"), 1: Dim("tokens", min=9)}
    example = (torch.randn(3, 19, 16), padded_size(3, 19))
    exported = torch.export.export(model, example, dynamic_shapes=(axes, axes))
    merged = next(n for n in exported.graph.nodes if n.target is elision.merge_tokens.default)
    tokens = exported.graph.find_nodes(op="placeholder")[-1].meta["val"].shape[1]
    assert merged.meta["val"][0].shape[1] == tokens - 4
    for batch, count in ((1, 9), (2, 10), (4, 31)):
        operands = (torch.randn(batch, count, 16), padded_size(batch, count))
        for one, other in zip(exported.module()(*operands), model(*operands)):
            torch.testing.assert_close(one, other)


def test_shapes_of_symbolic_lengths() -> None:
    n = sympy.Symbol("n", integer=True, positive=True)
    slot, keep, source = OPS["match_tokens"].output_shapes([(2, n, 8)], {"r": 4, "prefix": 1})
    for count in (3, 8, 9, 30):
        gone = min(4, (count - 1) // 2)
        found = [sympy.sympify(shape[1]).subs(n, count) for shape in (slot, keep, source)]
        assert found == [count, count - gone, gone]
    half = OPS["match_tokens"].output_shapes([(2, n, 8)], {"ratio": 0.25})
    assert sympy.sympify(half[1][1]).subs(n, 22) == 17
    assert OPS["merge_tokens"].output_shapes([(2, n, 5), None, (2, n), keep, source], {"axis": 1})[0] == (
        2,
        keep[1],
        5,
    )


def _trained(model: nn.Module, run: Any, operands: tuple[Tensor, ...]) -> list[Tensor]:
    model.zero_grad()
    outputs = run(*operands)
    sum(out.square().sum() for out in outputs).backward()
    return [*(out.detach() for out in outputs), *(p.grad.clone() for p in model.parameters())]  # type: ignore


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_sees_inside_forward_and_backward(dynamic: bool) -> None:
    torch._dynamo.reset()
    model, seen, inner = Merged(padded=False), [], []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.extend(str(n.target) for n in graph.graph.nodes if "elision" in str(n.target))

        def compile_inner(lowered: torch.fx.GraphModule, example: list[Any], **kwargs: Any) -> Any:
            from torch._inductor.compile_fx import compile_fx_inner

            inner.extend(str(n.target) for n in lowered.graph.nodes)
            return compile_fx_inner(lowered, example, **kwargs)

        table = {**select_decomp_table(), **decompositions()}
        return compile_fx(graph, inputs, inner_compile=compile_inner, decompositions=table)

    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    sizes = (19, 24) if dynamic else (19,)
    for count in sizes:
        operands = (torch.randn(3, count, 16), torch.ones(3, count))
        for one, other in zip(_trained(model, compiled, operands), _trained(model, model, operands)):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert len(seen) == 5  # whole ops in Dynamo's graph, compiled once
    assert inner and not [target for target in inner if "elision" in target]


def test_autocast_does_not_blur_the_matching() -> None:
    metric = torch.randn(2, 33, 16)
    exact = call("match_tokens", [metric], {"r": 8})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call("match_tokens", [metric], {"r": 8})
    assert all(torch.equal(one, other) for one, other in zip(exact, found))


def test_functional_gradients() -> None:
    slot, keep, source = token_map(2, 8, 3)

    def loss(x: Tensor) -> Tensor:
        return elision.merge_tokens(x, None, slot, keep, source, axis=1)[0].square().sum()

    x = torch.randn(2, 8, 4)
    torch.testing.assert_close(
        torch.func.grad(loss)(x), torch.autograd.grad(loss(leaf := x.clone().requires_grad_()), leaf)[0]
    )
