"""restore_tokens in Triton against the reference: copies, so always bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .numerics import DEVICE, WHERE, close, examples, kernel, reference, seeded

pytestmark = WHERE

COPIED = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool)


@examples(25)
@given(
    st.integers(1, 3),
    st.integers(1, 30),
    st.integers(1, 50),
    st.sampled_from([1, 3, 64, 300]),
    st.sampled_from(COPIED),
    st.integers(0, 2**20),
)
def test_rows_are_copied(
    batch: int, slots: int, count: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    random = seeded(seed)
    y = (torch.randn(batch, slots, width, generator=random) * 3).to(dtype)
    slot = torch.randint(-1, slots, (batch, count), generator=random, dtype=torch.int32)
    (x,) = kernel("restore_tokens", y, slot, axis=1)
    (expected,) = reference("restore_tokens", y, slot, axis=1)
    assert x.dtype == dtype and torch.equal(x, expected)


@pytest.mark.parametrize(
    ("shape", "axis", "batch_axis", "maps"),
    [
        ((2, 9, 4), 1, 0, 2),
        ((9, 2, 4), 0, 1, 2),
        ((2, 4, 9), 2, 0, 2),
        ((2, 9), 1, 0, 2),
        ((9, 2), 0, 1, 2),
        ((2, 3, 9, 4), 2, 0, 2),
        ((9, 3, 2, 4), 0, 2, 2),
        ((4, 9), 1, -1, 1),
        ((9, 4, 3), 0, -1, 1),
        ((9,), 0, -1, 1),
        ((1, 9, 4), 1, 0, 3),
        ((3, 9, 4), 1, 0, 1),
    ],
    ids=str,
)
def test_layouts(shape: tuple[int, ...], axis: int, batch_axis: int, maps: int) -> None:
    slot = torch.randint(-1, 9, (maps, 13), dtype=torch.int32)
    for y in (torch.randn(*shape), torch.randn(*shape, 2)[..., 1]):
        (x,) = kernel("restore_tokens", y, slot, axis=axis, batch_axis=batch_axis)
        assert torch.equal(
            x, reference("restore_tokens", y, slot, axis=axis, batch_axis=batch_axis)[0].contiguous()
        )


def test_a_slot_outside_gives_zeros() -> None:
    slot = torch.tensor([[0, 5, 2**30, -7, 4]], dtype=torch.int32)
    y = torch.randn(1, 5, 3)
    (x,) = kernel("restore_tokens", y, slot, axis=1)
    assert torch.equal(x[0, [0, 4]], y[0, [0, 4]])
    assert not x[0, 1:4].any()


def test_gradient_is_that_of_the_reference() -> None:
    from elision.kernels.gpu import load

    load()
    slot = torch.randint(-1, 9, (2, 13), dtype=torch.int32)
    y, found = torch.randn(2, 9, 4), []
    for namespace, device in ((torch.ops.elision_triton, DEVICE), (torch.ops.elision, "cpu")):
        leaf = y.to(device).detach().clone().requires_grad_()
        namespace.restore_tokens(leaf, slot.to(device), axis=1).pow(3).sum().backward()
        found.append(leaf.grad)
    close(found[0].cpu(), found[1])
