"""linear_nbits in Triton: against the reference, and row by row bit for bit in any company."""

from __future__ import annotations

import pytest
import torch
from elision.kernels.gpu import linear_nbits as module
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ..linear_cases import quantized
from .numerics import DEVICE, DTYPES, WHERE, close, examples, kernel, reference, seeded

pytestmark = WHERE

LAYOUTS = st.sampled_from([(72, 16), (90, 96), (64, 32), (200, 64), (600, 128), (300, 256), (30, 32)])


def operands(
    rows: int,
    columns: int,
    channels: int,
    *,
    bits: int,
    group: int,
    zeros: str = "none",
    scales: torch.dtype = torch.float32,
    bias: bool = False,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> list[Tensor | None]:
    """x of a size such that results are about 1, weight, scales, zeros, bias."""
    random = seeded(seed)
    weight = quantized(
        channels, columns, bits=bits, group=group, zeros=zeros, scales=scales, generator=random
    )
    x = torch.randn(rows, columns, generator=random) / columns**0.5
    return [x.to(dtype), *weight, torch.randn(channels, generator=random) if bias else None]


def compare(given: list[Tensor | None], **attrs: int) -> Tensor:
    """The kernel against the reference, which gets the same values in float32."""
    x = given[0]
    assert x is not None
    (found,) = kernel("linear_nbits", *given, **attrs)
    (expected,) = reference("linear_nbits", x.float(), *given[1:], **attrs)
    assert found.dtype == x.dtype
    close(found, expected)
    return found


@examples(25)
@given(
    st.integers(1, 70),
    LAYOUTS,
    st.integers(1, 100),
    st.sampled_from([4, 8]),
    st.sampled_from(["none", "ints", "floats"]),
    st.sampled_from([torch.float32, torch.float16]),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.integers(0, 2**20),
)
def test_linear_nbits(
    rows: int,
    layout: tuple[int, int],
    channels: int,
    bits: int,
    zeros: str,
    scales: torch.dtype,
    bias: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    columns, group = layout
    given = operands(
        rows, columns, channels, bits=bits, group=group, zeros=zeros, scales=scales, bias=bias, dtype=dtype,
        seed=seed,
    )  # fmt: skip
    compare(given, bits=bits, group=group)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "zeros"), [(4, "ints"), (8, "floats")])
def test_a_row_has_the_same_bits_in_any_company(bits: int, zeros: str, dtype: torch.dtype) -> None:
    columns = 200 if dtype == torch.float32 else 520
    given = operands(100, columns, 40, bits=bits, group=32, zeros=zeros, bias=True, dtype=dtype)
    x = given[0]
    assert x is not None and module.splits(columns, 40, x.element_size()) > 1
    attrs = {"bits": bits, "group": 32}
    whole = compare(given, **attrs)
    for rows in (64, 33, 16, 7, 2):
        assert torch.equal(kernel("linear_nbits", x[:rows], *given[1:], **attrs)[0], whole[:rows])
    for row in (0, 9, 20, 37, 63, 99):
        assert torch.equal(kernel("linear_nbits", x[row : row + 1], *given[1:], **attrs)[0][0], whole[row])
    turned = torch.randperm(100, generator=seeded(1))
    assert torch.equal(kernel("linear_nbits", x[turned], *given[1:], **attrs)[0], whole[turned])


def test_other_rows_may_hold_anything() -> None:
    given = operands(20, 256, 40, bits=4, group=64)
    (expected,) = kernel("linear_nbits", *given, bits=4, group=64)
    x = given[0]
    assert x is not None
    x[1::2] = float("nan")
    assert torch.equal(kernel("linear_nbits", *given, bits=4, group=64)[0][::2], expected[::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_all_configurations_give_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    given = operands(20, 260, 70, bits=4, group=64, zeros="floats", bias=True, dtype=dtype)
    item = torch.empty(0, dtype=dtype).element_size()
    found = []
    for config in module.CONFIGS:
        if config.kwargs["BLOCK_K"] == module.TABLE[item][0]:
            monkeypatch.setattr(module.multiply_groups, "configs", [config])
            monkeypatch.setattr(module.multiply_groups, "cache", {})
            found += kernel("linear_nbits", *given, bits=4, group=64)
    assert len(found) == len(module.TABLE[item][1]) > 1
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_splits_hang_on_the_weight_alone() -> None:
    """And leave each part something to do; a power of two, so that few kernels are compiled."""
    for item, (columns_per_block, _) in module.TABLE.items():
        for columns in (1, 90, 576, 1536, 4096, 16384):
            for channels in (1, 192, 4096, 49152, 151936):
                parts = module.splits(columns, channels, item)
                assert 1 <= parts <= module.MOST_SPLITS and parts & (parts - 1) == 0
                assert parts == 1 or columns // columns_per_block >= 2 * parts - 1
                assert parts == 1 or parts * (channels // 64) <= module.PROGRAMS


def test_what_stands_behind_the_last_column_does_not_matter() -> None:
    given = operands(3, 90, 20, bits=8, group=64, zeros="ints", dtype=torch.float32)
    weight = given[1]
    assert weight is not None
    (expected,) = kernel("linear_nbits", *given, bits=8, group=64)
    weight[:, -1, 90 - 64 :] = 255
    assert torch.equal(kernel("linear_nbits", *given, bits=8, group=64)[0], expected)


def test_layouts() -> None:
    """Any rank, no rows at all, operands that are views."""
    given = operands(12, 64, 20, bits=4, group=32, zeros="ints", dtype=torch.float32)
    x = given[0]
    assert x is not None
    (expected,) = kernel("linear_nbits", *given, bits=4, group=32)
    for shape in ((2, 6), (1, 12), (2, 3, 2)):
        found = kernel("linear_nbits", x.reshape(*shape, 64), *given[1:], bits=4, group=32)[0]
        assert torch.equal(found.reshape(12, 20), expected)
    assert torch.equal(kernel("linear_nbits", x[4], *given[1:], bits=4, group=32)[0], expected[4])
    assert kernel("linear_nbits", x[:0], *given[1:], bits=4, group=32)[0].shape == (0, 20)
    turned = [
        x.t().contiguous().t(),
        *(y if y is None else y.repeat(2, *[1] * (y.dim() - 1)) for y in given[1:]),
    ]
    views = [y if y is None or i == 0 else y[:20] for i, y in enumerate(turned)]
    views[1] = torch.cat([given[1], given[1]], 2)[..., :16]  # type: ignore[list-item]
    assert torch.equal(kernel("linear_nbits", *views, bits=4, group=32)[0], expected)


def test_gradient_is_that_of_the_reference() -> None:
    from elision.kernels.gpu import load

    load()
    given = operands(5, 64, 20, bits=4, group=32, bias=True, dtype=torch.float32)
    found = []
    for namespace, device in ((torch.ops.elision_triton, DEVICE), (torch.ops.elision, "cpu")):
        leaves = [x if x is None else x.to(device).detach().clone() for x in given]
        assert leaves[0] is not None
        leaves[0].requires_grad_()
        namespace.linear_nbits(*leaves, bits=4, group=32).square().sum().backward()
        found.append(leaves[0].grad)
    torch.testing.assert_close(found[0].cpu(), found[1], rtol=1e-3, atol=1e-4)
