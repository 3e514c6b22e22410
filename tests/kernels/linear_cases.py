"""Operands for the products: weights of few bits, rows, the largest outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def quantized(
    channels: int,
    width: int,
    *,
    bits: int,
    group: int,
    zeros: str = "none",
    scales: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> list[Tensor | None]:
    """weight, scales and zeros ("none", "ints" or "floats") of a product width -> channels, of random numbers."""
    g = generator
    groups = -(-width // group)
    weight = torch.randint(0, 256, (channels, groups, group * bits // 8), dtype=torch.uint8, generator=g)
    scale = (torch.rand(channels, groups, generator=g) + 0.5) / (1 << bits)
    if zeros == "ints":
        zero = torch.randint(0, 1 << bits, (channels, groups), dtype=torch.uint8, generator=g)
    elif zeros == "floats":
        zero = torch.randn(channels, groups, generator=g) * 0.3
    else:
        zero = None
    return [weight, scale.to(scales), zero]


def x_of(*shape: int, dtype: torch.dtype = torch.float32, exact: bool = True) -> Tensor:
    """Random operands. exact: of numbers that 8 bits hold exactly, so that quantizing them changes nothing."""
    if not exact:
        return torch.randn(*shape).to(dtype)
    x = torch.randint(-127, 128, shape)
    x[..., ::16] = 127  # every block has the same largest number
    return (x.float() / 128).to(dtype)


def nbits(
    *shape: int,
    channels: int,
    bits: int,
    group: int,
    zeros: str = "none",
    scales: torch.dtype = torch.float32,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor | None]:
    weight = quantized(channels, shape[-1], bits=bits, group=group, zeros=zeros, scales=scales)
    return [x_of(*shape, dtype=dtype), *weight, torch.randn(channels) if bias else None]


Call = tuple[str, str, Any, dict[str, Any]]


def linear_calls() -> list[Call]:
    """(op, label, function that makes the operands, attributes)."""
    half = torch.float16
    found: list[Call] = []
    kinds: tuple[tuple[str, tuple[int, ...], dict[str, Any]], ...] = (
        ("4 bits", (2, 3, 64), {"bits": 4, "group": 32, "channels": 10}),
        ("8 bits", (2, 3, 64), {"bits": 8, "group": 32, "channels": 10}),
        ("4 bits zeros", (5, 96), {"bits": 4, "group": 32, "channels": 17, "zeros": "ints"}),
        ("8 bits zeros", (5, 96), {"bits": 8, "group": 32, "channels": 17, "zeros": "ints", "bias": True}),
        (
            "4 bits offsets",
            (5, 96),
            {"bits": 4, "group": 32, "channels": 17, "zeros": "floats", "bias": True},
        ),
        ("4 bits part of a group", (5, 72), {"bits": 4, "group": 64, "channels": 16, "zeros": "ints"}),
        ("4 bits part and offsets", (5, 72), {"bits": 4, "group": 32, "channels": 16, "zeros": "floats"}),
        ("8 bits groups of 16", (5, 72), {"bits": 8, "group": 16, "channels": 5}),
        ("8 bits one group", (5, 90), {"bits": 8, "group": 96, "channels": 5, "bias": True}),
        ("4 bits one group zeros", (2, 5, 90), {"bits": 4, "group": 96, "channels": 5, "zeros": "ints"}),
        ("4 bits half scales", (1, 128), {"bits": 4, "group": 128, "channels": 32, "scales": half}),
        ("4 bits half", (3, 64), {"bits": 4, "group": 64, "channels": 32, "scales": half, "dtype": half}),
    )
    for label, shape, kwargs in kinds:
        attrs = {"bits": kwargs["bits"], "group": kwargs["group"]}
        found.append(("linear_nbits", label, lambda s=shape, k=kwargs: nbits(*s, **k), attrs))
    for label, shape, weight, bias, dtype in (
        ("float32", (2, 3, 20), torch.float32, True, torch.float32),
        ("half weight", (3, 33), half, False, torch.float32),
        ("half", (3, 32), half, True, half),
    ):
        found.append(
            (
                "linear_rows",
                label,
                lambda s=shape, w=weight, b=bias, d=dtype: [
                    torch.randn(*s).to(d),
                    torch.randn(21, s[-1]).to(w),
                    torch.randn(21) if b else None,
                ],
                {},
            )
        )
    for bits, zeros in ((4, "none"), (8, "ints"), (8, "floats")):
        # Normalising would leave numbers that 8 bits do not hold
        found.append(
            (
                "linear_topk",
                f"{bits} bits {zeros}",
                lambda b=bits, z=zeros: nbits(2, 3, 64, channels=90, bits=b, group=32, zeros=z),
                {"bits": bits, "group": 32, "k": 5},
            )
        )
    found.append(
        (
            "linear_topk",
            "float32 norm",
            lambda: [torch.randn(4, 40), torch.randn(70, 40), None, None, torch.randn(70), torch.randn(40)],
            {"bits": 32, "group": 0, "k": 3, "norm_offset": 1.0},
        )
    )
    found.append(
        (
            "linear_topk",
            "all of half",
            lambda: [torch.randn(4, 40), torch.randn(7, 40).half()],
            {"bits": 16, "group": 0, "k": 7},
        )
    )
    found += [("linear_spread", *rest) for op, *rest in found if op == "linear_topk"]
    return found
