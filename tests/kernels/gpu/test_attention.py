"""attention in Triton against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from .numerics import DEVICE, DTYPES, TOLERANCE, WHERE, close, examples, kernel, reference, seeded

pytestmark = WHERE

HEADS = st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)])
WIDTHS = st.sampled_from([(8, 8), (16, 24), (40, 40), (64, 64), (80, 64), (128, 96)])


def wide(x: Tensor | None) -> Tensor | None:
    return x.float() if x is not None and x.is_floating_point() else x


def compare(operands: list[Tensor | None], **attrs: float | bool) -> None:
    """The kernel against the reference, which gets the same values in float32."""
    q = operands[0]
    assert q is not None
    (found,) = kernel("attention", *operands, **attrs)
    (expected,) = reference("attention", *(wide(x) for x in operands), **attrs)
    assert found.dtype == q.dtype
    close(found, expected)


@examples(30)
@given(
    st.integers(1, 2),
    HEADS,
    st.integers(1, 70),
    st.integers(1, 90),
    WIDTHS,
    st.sampled_from(DTYPES),
    st.sampled_from(["none", "own", "shared"]),
    st.sampled_from(["none", "bool", "added", "keys only"]),
    st.booleans(),
    st.sampled_from([0.0, 0.2]),
    st.integers(0, 2**20),
)
def test_attention(
    batch: int,
    heads: tuple[int, int],
    n: int,
    m: int,
    widths: tuple[int, int],
    dtype: torch.dtype,
    sizes: str,
    masks: str,
    causal: bool,
    scale: float,
    seed: int,
) -> None:
    random = seeded(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    q, k = normal(batch, heads[0], n, widths[0]), normal(batch, heads[1], m, widths[0])
    v = normal(batch, heads[1], m, widths[1])
    size = mask = None
    if sizes != "none":
        size = torch.randint(0, 5, (batch if sizes == "own" else 1, m), generator=random).float()
        size[:, 0] = 1.0  # every query sees some key
    if masks == "bool":
        mask = torch.rand(batch, 1, n, m, generator=random) > 0.3
        mask[..., 0] = True
    elif masks == "added":
        mask = normal(1, heads[0], n, m)
        mask[torch.rand(mask.shape, generator=random) < 0.3] = torch.finfo(dtype).min
        mask[..., 0] = 0.0
    elif masks == "keys only":
        mask = torch.rand(batch, 1, 1, m, generator=random) > 0.3
        mask[..., 0] = True
    compare([q, k, v, mask, size], scale=scale, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_other_ranks(causal: bool) -> None:
    for lead in ((), (3, 2)):
        q, k = torch.randn(*lead, 4, 19, 16), torch.randn(*lead, 2, 19, 16)
        for size in (None, torch.randint(1, 4, (q.shape[0], 19)).float()):
            compare([q, k, torch.randn_like(k), None, size], causal=causal)
        mask = torch.randn(*[1] * len(lead), 4, 19, 19)
        compare([q, k, torch.randn_like(k), mask, None], causal=causal)
        compare([q, k, torch.randn_like(k), torch.randn(19), None], causal=causal)


def test_strided_operands() -> None:
    packed = torch.randn(2, 33, 3, 4, 16)  # as one projection for q, k and v leaves them
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    compare([q, k, v, None, None])
    compare([q.transpose(-1, -2).contiguous().transpose(-1, -2), k, v, None, None])
    mask = (torch.randn(33, 33, 2) > -1)[..., 0].t()
    compare([q, k, v, mask | torch.eye(33, dtype=torch.bool), None])


@pytest.mark.parametrize("width", [192, 256])
def test_wide_heads(width: int) -> None:
    compare([torch.randn(1, 1, n, width) for n in (17, 40, 40)] + [None, None])


def test_padding_may_hold_anything() -> None:
    """Keys of size 0 are not attended to, even where they hold infinities; queries that see nothing get zeros."""
    q, k, v = (torch.randn(2, 2, n, 16) for n in (5, 40, 40))
    size = torch.ones(2, 40)
    size[:, 30:] = 0.0
    (expected,) = reference("attention", q, k, v, None, size)
    k[:, :, 30:], v[:, :, 33:] = float("nan"), float("inf")
    close(kernel("attention", q, k, v, None, size)[0], expected)
    assert not kernel("attention", q, k, v, None, torch.zeros(2, 40))[0].any()
    k, v = k.nan_to_num(), v.nan_to_num()
    none = torch.zeros(2, 1, 5, 40, dtype=torch.bool)
    assert not kernel("attention", q, k, v, none, None)[0].any()
    assert not kernel("attention", q, k, v, torch.full((5, 40), -torch.inf), None)[0].any()


def test_a_size_counts_as_that_many_keys() -> None:
    q, k, v = (torch.randn(1, 2, n, 16) for n in (7, 10, 10))
    size = torch.randint(1, 5, (1, 10))
    (found,) = kernel("attention", q, k, v, None, size.float())
    times = size[0]
    repeated = [x.repeat_interleave(times, dim=2) for x in (k, v)]
    close(found, kernel("attention", q, *repeated)[0])


def test_large_logits_and_masks_at_the_end_of_the_type() -> None:
    q, k, v = (20 * torch.randn(1, 1, n, 16) for n in (9, 40, 40))
    (found,) = kernel("attention", q, k, v, scale=1.0)  # logits of thousands, which float32 holds to 1e-4
    torch.testing.assert_close(found, reference("attention", q, k, v, scale=1.0)[0], rtol=5e-3, atol=5e-3)
    least = torch.full((9, 40), torch.finfo(torch.float32).min)
    v = torch.randn(1, 1, 40, 16)
    compare([q, k, v, least, None])  # all equally forbidden: all equally seen, as softmax has it
    least[:, ::3] = 0.0
    compare([q, k, v, least, None])


def test_runs_repeat_bit_for_bit() -> None:
    q, k, v = (torch.randn(2, 3, n, 32).half() for n in (65, 130, 130))
    size = torch.rand(2, 130) + 0.1
    first = kernel("attention", q, k, v, None, size)[0]
    for _ in range(3):
        assert torch.equal(first, kernel("attention", q, k, v, None, size)[0])


def test_gradients_are_those_of_the_reference() -> None:
    from elision.kernels.gpu import load

    load()
    operands = [torch.randn(1, 2, n, 16) for n in (7, 9, 9)]
    size, found = torch.rand(1, 9) + 0.5, []
    for namespace, device in ((torch.ops.elision_triton, DEVICE), (torch.ops.elision, "cpu")):
        leaves = [x.to(device).detach().clone().requires_grad_() for x in operands]
        namespace.attention(*leaves, None, size.to(device)).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=10 * TOLERANCE[torch.float32])
