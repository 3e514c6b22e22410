"""Attention with sizes: what it means, and that it stays one fused kernel."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from . import onnx_call
from .cases import call


def qkv(n: int = 6, m: int = 6, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(2, 3, length, 8).to(dtype) for length in (n, m, m)]


def test_a_key_of_size_s_counts_like_s_equal_keys() -> None:
    q, k, v = qkv()
    size = torch.tensor([[1, 2, 3, 1, 1, 4], [2, 2, 1, 1, 5, 1]]).float()
    found = call("attention", [q, k, v, None, size], {})[0]
    for sample in range(2):
        times = size[sample].long()
        one = [t[sample : sample + 1] for t in (q, k, v)]
        wide = [one[0], *(t.repeat_interleave(times, dim=2) for t in one[1:])]
        torch.testing.assert_close(found[sample : sample + 1], call("attention", wide, {})[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
def test_padding_is_not_attended_to(dtype: torch.dtype, mask: str) -> None:
    q, k, v = qkv(dtype=dtype)
    size = torch.tensor([[1.0, 2, 1, 1, 0, 0]]).expand(2, 6)
    given = None
    if mask == "bool":
        given = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    elif mask == "additive":
        given = torch.where(size > 0, 0.0, torch.finfo(dtype).min).to(dtype)[:, None, None]
    found = call("attention", [q, k, v, given, size], {})[0]
    short = call("attention", [q, k[:, :, :4], v[:, :, :4], None, size[:, :4]], {})[0]
    torch.testing.assert_close(found, short)
    empty = call("attention", [q, k, v, given, torch.zeros(2, 6)], {})[0]
    assert bool(empty.isfinite().all())


def test_ones_change_nothing() -> None:
    q, k, v = qkv()
    torch.testing.assert_close(
        call("attention", [q, k, v, None, torch.ones(2, 6)], {})[0], call("attention", [q, k, v], {})[0]
    )


def test_causal_with_sizes_sees_only_the_past() -> None:
    q, k, v = qkv()
    size = torch.randint(1, 4, (2, 6)).float()
    attrs = {"causal": True}
    before = call("attention", [q, k, v, None, size], attrs)[0]
    k[:, :, 4:], v[:, :, 4:] = 9.0, 9.0
    after = call("attention", [q, k, v, None, size], attrs)[0]
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    boolean = torch.ones(6, 6, dtype=torch.bool)
    torch.testing.assert_close(
        call("attention", [q, k, v, boolean], attrs)[0], call("attention", [q, k, v], attrs)[0]
    )


def test_fused_kernel_is_kept() -> None:
    q, k, v = qkv()
    traced = make_fx(lambda q, k, v, s: torch.ops.elision.attention(q, k, v, None, s), tracing_mode="fake")(
        q, k, v, torch.ones(2, 6)
    )
    targets = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    assert any("scaled_dot_product" in target for target in targets)
    assert not any("softmax" in target for target in targets)


def test_gradient_reaches_queries_keys_values_and_sizes() -> None:
    operands = [t.double().requires_grad_() for t in qkv()]
    size = torch.rand(2, 6, dtype=torch.float64).add(0.5).requires_grad_()

    def attend(*args: torch.Tensor) -> torch.Tensor:
        return torch.ops.elision.attention(*args[:3], None, args[3])

    assert torch.autograd.gradcheck(attend, (*operands, size))


def test_rows_without_any_key_are_finite_in_onnx() -> None:
    operands = [*qkv(), torch.zeros(2, 1, 1, 6, dtype=torch.bool), torch.zeros(2, 6)]
    assert bool(onnx_call.run("attention", operands, {})[0].isfinite().all())
