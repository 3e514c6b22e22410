"""merge_tokens in Triton against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from .numerics import DEVICE, DTYPES, WHERE, close, examples, kernel, reference, seeded

pytestmark = WHERE

NAN = float("nan")


def random_map(batch: int, count: int, gone: int, dropped: float, random: torch.Generator) -> list[Tensor]:
    """slot, keep, source: any positions go, to any slot or (a share `dropped`) to none."""
    order = torch.argsort(torch.rand(batch, count, generator=random), dim=1)
    source, keep = order[:, :gone], order[:, gone:]
    left = count - gone
    target = torch.randint(0, left, (batch, gone), generator=random)
    target[torch.rand(batch, gone, generator=random) < dropped] = -1
    places = torch.arange(left).expand(batch, left)
    slot = torch.zeros(batch, count, dtype=torch.int64).scatter(1, keep, places).scatter(1, source, target)
    return [slot.int(), keep.int(), source.int()]


def untouched(slot: Tensor, source: Tensor, size: Tensor | None, left: int) -> Tensor:
    """[B, S]: the slots that no token of any weight goes into."""
    goes = torch.gather(slot, 1, source.long()).long()
    weight = torch.ones_like(goes) if size is None else torch.gather(size, 1, source.long())
    counted = torch.where((goes >= 0) & (weight > 0), 1, 0)
    return torch.zeros(slot.shape[0], left, dtype=torch.int64).scatter_add(1, goes.clamp(min=0), counted) == 0


@examples(30)
@given(
    st.integers(1, 3),
    st.integers(2, 40),
    st.sampled_from([1, 3, 64, 300]),
    st.sampled_from(DTYPES),
    st.floats(0.0, 0.9),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from(["none", "whole", "with padding"]),
    st.integers(0, 2**20),
)
def test_means(
    batch: int,
    count: int,
    width: int,
    dtype: torch.dtype,
    share: float,
    dropped: float,
    sizes: str,
    seed: int,
) -> None:
    random = seeded(seed)
    slot, keep, source = random_map(batch, count, int(share * count), dropped, random)
    x = torch.randn(batch, count, width, generator=random).to(dtype)
    size = None
    if sizes != "none":
        size = torch.randint(1, 6, (batch, count), generator=random).float()
    if sizes == "with padding":
        assert size is not None
        size[torch.rand(batch, count, generator=random) < 0.2] = 0.0
    y, total = kernel("merge_tokens", x, size, slot, keep, source, axis=1)
    expected, expected_total = reference("merge_tokens", x, size, slot, keep, source, axis=1)
    assert y.dtype == dtype and total.dtype == torch.float32
    assert torch.equal(total, expected_total)  # sums of small whole numbers
    close(y, expected)
    alone = untouched(slot, source, size, keep.shape[1])
    home = torch.gather(x, 1, keep.long().unsqueeze(-1).expand(-1, -1, width))
    assert torch.equal(y[alone], home[alone])


LAYOUTS = [
    ((2, 14, 5), 1, 0, 2, 2),
    ((14, 2, 5), 0, 1, 2, 2),
    ((2, 5, 14), 2, 0, 2, 2),
    ((2, 14), 1, 0, 2, 2),
    ((14, 2), 0, 1, 2, 1),
    ((2, 3, 14, 4), 2, 0, 2, 2),
    ((14, 3, 2, 4), 0, 2, 2, 1),
    ((3, 14), 1, -1, 1, 1),
    ((14, 3, 2), 0, -1, 1, 1),
    ((14,), 0, -1, 1, 1),
    ((1, 14, 5), 1, 0, 2, 1),
    ((3, 14, 5), 1, 0, 1, 1),
    ((3, 14, 5), 1, 0, 3, 1),
]


@pytest.mark.parametrize(("shape", "axis", "batch_axis", "maps", "sizes"), LAYOUTS, ids=str)
def test_layouts(shape: tuple[int, ...], axis: int, batch_axis: int, maps: int, sizes: int) -> None:
    slot, keep, source = random_map(maps, 14, 5, 0.0, seeded(3))
    size = torch.randint(1, 6, (sizes, 14)).float()
    for x in (torch.randn(*shape), torch.randn(*shape, 2)[..., 1]):
        where = {"axis": axis, "batch_axis": batch_axis}
        found = kernel("merge_tokens", x, size, slot, keep, source, **where)
        for one, other in zip(
            found, reference("merge_tokens", x, size, slot, keep, source, **where), strict=True
        ):
            close(one, other)


def test_padding_may_hold_anything() -> None:
    slot, keep, source = random_map(2, 20, 8, 0.3, seeded(1))
    x, size = torch.randn(2, 20, 6), torch.ones(2, 20)
    gone = torch.gather(slot, 1, source.long())
    for b in range(2):
        for j in range(8):
            if j % 2 or gone[b, j] < 0:  # every other source and all that are dropped
                size[b, source[b, j]] = 0.0
                x[b, source[b, j]] = [NAN, float("inf")][j % 2]
    y, total = kernel("merge_tokens", x, size, slot, keep, source, axis=1)
    assert y.isfinite().all()
    close(y, reference("merge_tokens", x, size, slot, keep, source, axis=1)[0])
    assert total.sum() == size.sum()


def test_a_map_that_points_outside_touches_nothing() -> None:
    """What points outside counts as dropped, or as a slot of nothing, and no other slot changes."""
    slot, keep, source = random_map(1, 20, 8, 0.0, seeded(2))
    x = torch.randn(1, 20, 6)
    dropped, wrong = slot.clone(), slot.clone()
    dropped[0, source[0, :3].long()] = -1
    wrong[0, source[0, :3].long()] = torch.tensor([12, 2**30, -(2**30)], dtype=torch.int32)
    expected = reference("merge_tokens", x, None, dropped, keep, source, axis=1)
    for one, other in zip(
        kernel("merge_tokens", x, None, wrong, keep, source, axis=1), expected, strict=True
    ):
        close(one, other)
    beyond = source.clone()
    beyond[0, :3] = torch.tensor([20, 2**30, -5], dtype=torch.int32)
    for one, other in zip(kernel("merge_tokens", x, None, slot, keep, beyond, axis=1), expected, strict=True):
        close(one, other)
    lost = keep.clone()
    lost[0, 4] = 2**30
    y = kernel("merge_tokens", x, None, dropped, lost, source, axis=1)[0]
    others = torch.arange(12) != 4
    close(y[:, others], expected[0][:, others])


def test_runs_repeat_bit_for_bit_and_do_not_hang_on_the_batch() -> None:
    """Long chains of values whose sum hangs on the order."""
    slot, keep, source = random_map(3, 200, 190, 0.0, seeded(5))
    x = torch.randn(3, 200, 40) * 10.0 ** torch.randint(-6, 7, (3, 200, 1))
    size = torch.rand(3, 200) + 0.1
    first = kernel("merge_tokens", x, size, slot, keep, source, axis=1)
    for _ in range(3):
        again = kernel("merge_tokens", x, size, slot, keep, source, axis=1)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    alone = kernel("merge_tokens", x[1:2], size[1:2], slot[1:2], keep[1:2], source[1:2], axis=1)
    assert all(torch.equal(one[1], other[0]) for one, other in zip(first, alone, strict=True))


def test_gradients_are_those_of_the_reference() -> None:
    from elision.kernels.gpu import load

    load()
    maps = random_map(2, 14, 5, 0.2, seeded(4))
    x, size = torch.randn(2, 14, 6), torch.rand(2, 14) + 0.5
    found = []
    for namespace, device in ((torch.ops.elision_triton, DEVICE), (torch.ops.elision, "cpu")):
        leaves = [x.to(device).detach().clone().requires_grad_(), size.to(device).clone().requires_grad_()]
        y, total = namespace.merge_tokens(*leaves, *(m.to(device) for m in maps), axis=1)
        (y.square().sum() + total.square().sum()).backward()
        found.append([leaf.grad for leaf in leaves])
    for one, other in zip(*found, strict=True):
        close(one.cpu(), other)
