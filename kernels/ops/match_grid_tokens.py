"""match_grid_tokens: matching on a grid of tokens, one destination in every cell."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..body import INT32, Body
from ..definition import Attr, OpDef
from ..lengths import Dim, fraction
from .match_tokens import body_normalised, body_sorted, map_shapes, normalised


@functools.lru_cache(maxsize=64)
def partition(height: int, width: int, sy: int, sx: int, seed: int) -> tuple[list[int], list[int]]:
    """Positions that may go (sources) and those that receive (destinations), both ascending.

    Each whole cell of sy x sx tokens has one destination: its first token, or with seed >= 0 a random one.
    What is left over at the lower and right edge are sources."""
    rows, columns = height // sy, width // sx
    offset = np.zeros((2, rows, columns), dtype=np.int64)
    if seed >= 0:
        rng = np.random.default_rng(seed)
        offset = np.stack([rng.integers(0, sy, (rows, columns)), rng.integers(0, sx, (rows, columns))])
    y = np.arange(rows)[:, None] * sy + offset[0]
    x = np.arange(columns)[None, :] * sx + offset[1]
    receives = np.zeros(height * width, dtype=bool)
    receives[(y * width + x).ravel()] = True
    return np.flatnonzero(~receives).tolist(), np.flatnonzero(receives).tolist()


def match_grid_tokens(
    metric: Tensor,
    *,
    height: int,
    width: int,
    sy: int = 2,
    sx: int = 2,
    r: int = -1,
    ratio: float = -1.0,
    seed: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """metric [B, height * width, D] -> slot [B, N], keep [B, N'], source [B, N-N'], all int32.

    The r (or floor(ratio * N)) sources most similar to their best destination merge into it. The partition is
    the same for the whole batch and for every call. Slots are in order of position."""
    batch, count, _ = metric.shape
    gone, sources, destinations = _checked(height, width, sy, sx, r, ratio, seed)
    if count != height * width:
        raise ValueError(f"match_grid_tokens: {count} tokens are no grid of {height} x {width}")
    device = metric.device
    movable = torch.tensor(sources, dtype=torch.int64, device=device)
    receiving = torch.tensor(destinations, dtype=torch.int64, device=device)
    positions = torch.arange(count, device=device).expand(batch, count)
    unit = normalised(metric)
    score = torch.bmm(unit.index_select(1, movable), unit.index_select(1, receiving).transpose(1, 2))
    best, partner = score.max(-1)
    ranking = torch.sort(best, dim=1, descending=True, stable=True).indices
    removed, stay = ranking[:, :gone], ranking[:, gone:]
    fixed = receiving.expand(batch, len(destinations))
    keep = torch.sort(torch.cat([movable[stay], fixed], dim=1), dim=1).values
    source = movable[removed]
    target = receiving[torch.gather(partner, 1, removed)]
    slot = torch.zeros_like(positions).scatter(1, keep, positions[:, : count - gone])
    slot = slot.scatter(1, source, torch.gather(slot, 1, target))
    return slot.int(), keep.int(), source.int()


def _checked(
    height: int, width: int, sy: int, sx: int, r: int, ratio: float, seed: int
) -> tuple[int, list[int], list[int]]:
    if min(sy, sx) < 1 or height < sy or width < sx:
        raise ValueError(f"match_grid_tokens: no cell of {sy} x {sx} fits a grid of {height} x {width}")
    if r < 0 and not 0.0 <= ratio <= 1.0:
        raise ValueError(f"match_grid_tokens: give r >= 0 or a ratio between 0 and 1, not {r}, {ratio}")
    sources, destinations = partition(height, width, sy, sx, seed)
    share = fraction(max(ratio, 0.0))
    wish = r if r >= 0 else height * width * share.numerator // share.denominator
    return min(wish, len(sources)), sources, destinations


def _gone(attrs: dict[str, Any]) -> int:
    return _checked(**attrs)[0]


def _work(shapes: list[Any], attrs: dict[str, Any]) -> Dim:
    _, sources, destinations = _checked(**attrs)
    batch, count, width = shapes[0]
    return batch * (2 * len(sources) * len(destinations) * width + 3 * count * width)


def _body(b: Body, operands: list[Any], attrs: dict[str, Any]) -> list[str]:
    gone, sources, destinations = _checked(**attrs)
    count, batch = attrs["height"] * attrs["width"], b.length("metric", 0)
    movable, receiving = b.constant(sources), b.constant(destinations)
    unit = body_normalised(b, "metric", operands[0][1])
    a, other = b("Gather", unit, movable, axis=1), b("Gather", unit, receiving, axis=1)
    scores = b("MatMul", a, b.permute(other, [0, 2, 1]))
    best = b("ReduceMax", scores, b.constant([2]), keepdims=0)
    partner = b("ArgMax", scores, axis=2, keepdims=0)
    ranking = body_sorted(b, best, largest=True)[1]
    removed, stay = b.slice(ranking, 1, 0, gone), b.slice(ranking, 1, gone)
    positions = b("Expand", b.constant(range(count)), b.join(batch, count))
    fixed = b("Expand", receiving, b.join(batch, len(destinations)))
    keep = body_sorted(b, b("Concat", b("Gather", movable, stay), fixed, axis=1), largest=False)[0]
    source = b("Gather", movable, removed)
    target = b("Gather", receiving, b("GatherElements", partner, removed, axis=1))
    slot = b("ScatterElements", positions, keep, b.slice(positions, 1, 0, count - gone), axis=1)
    slot = b("ScatterElements", slot, source, b("GatherElements", slot, target, axis=1), axis=1)
    return [b.cast(x, INT32) for x in (slot, keep, source)]


OP = OpDef(
    name="match_grid_tokens",
    summary="Matching on a grid: one destination in each cell of sy × sx tokens, the others may merge into one.",
    inputs=("metric",),
    outputs=("slot", "keep", "source"),
    attrs=(
        Attr("height"),
        Attr("width"),
        Attr("sy", 2),
        Attr("sx", 2),
        Attr("r", -1),
        Attr("ratio", -1.0),
        Attr("seed", -1),
    ),
    reference=match_grid_tokens,
    shapes=lambda shapes, attrs: map_shapes(shapes[0], _gone(attrs)),
    dtypes=lambda dtypes, attrs: ["int32"] * 3,
    body=_body,
    work=_work,
    chooses=True,
    source="Bolya and Hoffman, Token Merging for Fast Stable Diffusion, CVPRW 2023",
)
