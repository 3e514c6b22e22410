"""The ops for MLIR: sorts, scatters and arg-maxima as comparisons and sums.

torch-mlir lowers `aten.sort` and `aten.scatter` to a dialect of its own (`tm_tensor`) that other back ends do not
read, and `aten.sort.stable` not at all. Compared pairwise they are plain `linalg.generic`s, quadratic in the tokens as
the matching itself is. All of it is exact: integers, and copies of floats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def sort(x: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """`torch.sort(stable=True)`: an element's place is the number of elements that stand before it."""
    rows = x.movedim(dim, -1)
    position = torch.arange(rows.shape[-1], device=x.device)
    one, other = rows.unsqueeze(-1), rows.unsqueeze(-2)
    before, same = (other > one if descending else other < one), other == one
    if x.is_floating_point():  # NaN counts as the largest
        nan_one, nan_other = one != one, other != other
        before = before | (nan_other & ~nan_one if descending else nan_one & ~nan_other)
        same = same | (nan_one & nan_other)
    earlier = position.unsqueeze(0) < position.unsqueeze(1)
    place = (before | (same & earlier)).long().sum(-1)
    hit = place.unsqueeze(-2) == position.unsqueeze(-1)  # [..., place, element]
    indices = torch.where(hit, position, 0).sum(-1)
    return torch.gather(rows, -1, indices).movedim(-1, dim), indices.movedim(-1, dim)


def scatter(x: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    """`x.scatter(dim, index, src)`, index as long as x but along `dim`; of several writers the last one wins."""
    if index.shape[dim] == 0:
        return x.clone()
    turn = torch.arange(index.shape[dim], device=x.device)
    last = torch.where(_hits(x, dim, index), turn, -1).amax(-1)
    written = torch.gather(src.movedim(dim, -1), -1, last.clamp(min=0))
    return torch.where(last >= 0, written, x.movedim(dim, -1)).movedim(-1, dim)


def scatter_value(x: Tensor, dim: int, index: Tensor, value: float) -> Tensor:
    """`x.scatter(dim, index, value)`, index as long as x but along `dim`."""
    return torch.where(_hits(x, dim, index).any(-1), value, x.movedim(dim, -1)).to(x.dtype).movedim(-1, dim)


def scatter_add(x: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    """`x.scatter_add(dim, index, src)`, index as long as x but along `dim`; added up in a fixed order."""
    if x.dim() == 3 and dim % 3 == 1 and index.stride(2) == 0:  # whole rows: a product with a one-hot matrix
        return x + torch.bmm(_hits(x[..., 0], 1, index[..., 0]).to(src.dtype), src)
    added = torch.where(_hits(x, dim, index), src.movedim(dim, -1).unsqueeze(-2), 0).sum(-1, dtype=x.dtype)
    return x + added.movedim(-1, dim)


def max_dim(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """`x.max(dim)`; the first place among equals, however a back end splits the reduction."""
    best = x.amax(dim, keepdim=True)
    found = x == best
    if x.is_floating_point():
        found = found | (x != x)
    rows = found.movedim(dim, -1)
    place = torch.where(rows, torch.arange(rows.shape[-1], device=x.device), rows.shape[-1]).amin(-1)
    return (best, place.unsqueeze(dim)) if keepdim else (best.squeeze(dim), place)


def _hits(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """[..., N, R]: does the r-th index say n?"""
    lengths = [(a, b) for i, (a, b) in enumerate(zip(x.shape, index.shape)) if i != dim % x.dim()]
    if x.dim() != index.dim() or any(a != b for a, b in lengths):
        raise ValueError(f"an index of shape {list(index.shape)} writes only a part of {list(x.shape)}")
    position = torch.arange(x.shape[dim], device=x.device).unsqueeze(-1)
    return index.movedim(dim, -1).unsqueeze(-2) == position


def _stable_sort(x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False) -> Any:
    return sort(x, dim, descending)


PRIMITIVES: dict[Any, Callable[..., Any]] = {
    aten.sort.stable: _stable_sort,
    aten.sort.default: sort,
    aten.scatter.src: scatter,
    aten.scatter.value: scatter_value,
    aten.scatter_add.default: scatter_add,
    aten.max.dim: max_dim,
}
"""What the ops' definitions use and torch-mlir does not lower to linalg, as what it lowers. Same arguments."""

STABLE_SORT = {aten.sort.stable: PRIMITIVES[aten.sort.stable]}
"""The one that torch-mlir does not take at all: for sorts of the model itself."""
