"""What tests of the reference for dropping tokens draw."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

GRIDS = [(1, 2), (2, 2), (3, 1)]
RATES = st.one_of(st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.floats(0, 1))
SIDES = st.sampled_from([2, 3, 4, 6])
quick = settings(max_examples=80, deadline=None)


def scores(*shape: int, seed: int = 0, levels: int = 0) -> Tensor:
    """Random scores; with levels so few that many are equal, and sums of them exact."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(0, levels, shape, generator=generator).float()
    return torch.rand(shape, generator=generator)


def keys(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kept_of(mask: Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in mask]


# The class token's row
