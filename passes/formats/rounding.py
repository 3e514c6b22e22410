"""Rounding a float matrix to groups of few bits, each weight by itself.

Symmetric groups have no zero point. With 4 bits the weight of largest magnitude becomes the code 0, that is -8 times a
scale of either sign, so that the wider side of the range is used. `search` looks for the scale with the least squared
error: a few scales around the plain one, each refined by least squares for the codes that it gives.
"""

from __future__ import annotations

import numpy as np

from .layout import Quantized, from_codes, grouped, values

_TINY = 1e-36  # a scale that nothing can be divided by
_CHUNK = 1 << 21  # weights worked on at a time
_SHRINK = np.linspace(0.74, 1.14, 12, dtype=np.float32)
# For the scale of the other sign, which has 7 steps to the edge.
_TURNED = np.linspace(1.0, 1.2, 3, dtype=np.float32)


def quantize(
    w: np.ndarray,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    offsets: bool = False,
    search: bool = False,
    importance: np.ndarray | None = None,
    scales: str = "float16",
) -> Quantized:
    """w [N, K] float -> Quantized. bits: 4 or 8. group: how many weights along K share a scale, a multiple of 16.

    offsets: with symmetric=False, the least weight of a group instead of a whole zero point.
    importance [K]: the mean square of each input, which weighs the errors in the search. scales: the type that scales
    are stored in; they are rounded to it before the codes are chosen. The error of a weight is at most half a scale,
    or a whole one where it lies beyond the range's edge. Raises ValueError for what is none of these."""
    check(bits, group)
    w = np.asarray(w, np.float32)
    rows, width = w.shape
    weight = None if importance is None else grouped(importance[None].astype(np.float32), group)[0]
    parts = []
    step = max(1, _CHUNK // max(width, 1))
    for start in range(0, rows, step):
        block = grouped(w[start : start + step], group)
        mode = mode_of(symmetric, offsets)
        scale, zero = choose(block, bits, mode, search and bits == 4, weight, scales)
        parts.append((codes_of(block, scale, zero, bits), scale.astype(scales), kept(zero, scales)))
    codes, scale, zero = (None if p[0] is None else np.concatenate(p) for p in zip(*parts))
    assert codes is not None and scale is not None
    return from_codes(codes, scale, zero, bits, width)


def check(bits: int, group: int) -> None:
    """Raises ValueError where there is no such layout."""
    if bits not in (4, 8):
        raise ValueError(f"weights are quantized to 4 or 8 bits, not {bits}")
    if group < 16 or group % 16:
        raise ValueError(f"a group has a multiple of 16 weights, not {group}")


def mode_of(symmetric: bool, offsets: bool) -> str:
    """What groups have besides a scale: "none", "points" or "offsets"."""
    return "none" if symmetric else "offsets" if offsets else "points"


def kept(zero: np.ndarray | None, scales: str) -> np.ndarray | None:
    """Zero points as they are, offsets in the type of the scales."""
    return zero if zero is None or zero.dtype == np.uint8 else zero.astype(scales)


def codes_of(g: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, bits: int) -> np.ndarray:
    """The nearest codes uint8 [..., group] for weights [..., group] under scales [...]."""
    usable = np.abs(scale) > _TINY
    inverse = np.where(usable, 1 / np.where(usable, scale, 1), 0).astype(np.float32)
    if zero is not None and zero.dtype != np.uint8:
        return np.clip(np.rint((g - zero[..., None]) * inverse[..., None]), 0, 2**bits - 1).astype(np.uint8)
    middle = np.float32(2 ** (bits - 1)) if zero is None else zero.astype(np.float32)[..., None]
    return np.clip(np.rint(g * inverse[..., None]) + middle, 0, 2**bits - 1).astype(np.uint8)


def choose(
    g: np.ndarray, bits: int, mode: str, search: bool, weight: np.ndarray | None, dtype: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales float32 [...] and zero points uint8 or offsets float32 [...] for groups [..., group]; all floats are
    representable in dtype."""
    if mode == "offsets":
        return _with_offsets(g, bits, search, weight, dtype)
    if mode == "none":
        scale = _edge(g, bits)
        if search:
            scale = _search(g, scale, bits, weight, dtype)
        return stored(scale, dtype), None
    top = 2**bits - 1
    low, high = np.minimum(g.min(-1), 0), np.maximum(g.max(-1), 0)
    scale = stored((high - low) / top, dtype)
    zero = _zero(low, scale, top)
    return _search_both(g, low, high, bits, weight, dtype) if search else (scale, zero.astype(np.uint8))


def stored(scale: np.ndarray, dtype: str) -> np.ndarray:
    """Rounded to what is stored, as float32."""
    if dtype == "float16":
        limit = np.float32(np.finfo(np.float16).max)
        return np.clip(scale, -limit, limit).astype(np.float16).astype(np.float32)
    return scale.astype(np.float32)


def _edge(g: np.ndarray, bits: int) -> np.ndarray:
    """The scale that just reaches the largest magnitude."""
    if bits == 8:
        return np.abs(g).max(-1) / np.float32(127)
    at = np.abs(g).argmax(-1)
    return np.take_along_axis(g, at[..., None], -1)[..., 0] / np.float32(-8)


def _zero(low: np.ndarray, scale: np.ndarray, top: int) -> np.ndarray:
    usable = np.abs(scale) > _TINY
    return np.clip(np.rint(np.where(usable, -low / np.where(usable, scale, 1), 0)), 0, top)


def _error(g: np.ndarray, found: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
    gap = np.square(g - found)
    return gap.sum(-1) if weight is None else (gap * weight).sum(-1)


def _least_squares(
    g: np.ndarray, steps: np.ndarray, scale: np.ndarray, weight: np.ndarray | None
) -> np.ndarray:
    """The best scale for given steps (codes less their zero point)."""
    weighted = steps if weight is None else steps * weight
    above, below = (weighted * g).sum(-1), (weighted * steps).sum(-1)
    return np.where(below > 0, above / np.where(below > 0, below, 1), scale)


def _search(g: np.ndarray, edge: np.ndarray, bits: int, weight: np.ndarray | None, dtype: str) -> np.ndarray:
    best = stored(edge, dtype)
    least = _error(g, values(codes_of(g, best, None, bits), best, None, bits), weight)
    for factor in [*_SHRINK, *-_TURNED]:
        trial = edge * factor
        steps = codes_of(g, trial, None, bits).astype(np.float32) - np.float32(2 ** (bits - 1))
        scale = stored(_least_squares(g, steps, trial, weight), dtype)
        error = _error(g, steps * scale[..., None], weight)
        better = error < least
        best, least = np.where(better, scale, best), np.where(better, error, least)
    return best


def _search_both(
    g: np.ndarray, low: np.ndarray, high: np.ndarray, bits: int, weight: np.ndarray | None, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    top = 2**bits - 1
    best = stored((high - low) / top, dtype)
    best_zero = _zero(low, best, top)
    found = values(
        codes_of(g, best, best_zero.astype(np.uint8), bits), best, best_zero.astype(np.uint8), bits
    )
    least = _error(g, found, weight)
    for factor in _SHRINK:
        trial = (high - low) * factor / top
        for shift in (-0.5, 0.0, 0.5):
            middle = _zero(low * factor + shift * trial, trial, top)
            steps = codes_of(g, trial, middle.astype(np.uint8), bits).astype(np.float32) - middle[..., None]
            scale = stored(_least_squares(g, steps, trial, weight), dtype)
            error = _error(g, steps * scale[..., None], weight)
            better = error < least
            best, best_zero = np.where(better, scale, best), np.where(better, middle, best_zero)
            least = np.where(better, error, least)
    return best, best_zero.astype(np.uint8)


def _with_offsets(
    g: np.ndarray, bits: int, search: bool, weight: np.ndarray | None, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    top = 2**bits - 1
    low, span = g.min(-1), g.max(-1) - g.min(-1)
    best, best_low = stored(span / top, dtype), stored(low, dtype)
    if not search:
        return best, best_low
    least = _error(g, values(codes_of(g, best, best_low, bits), best, best_low, bits), weight)
    total = np.float32(g.shape[-1]) if weight is None else weight.sum(-1)
    for factor in _SHRINK:
        trial = span * factor / top
        codes = codes_of(g, trial, low + span * (1 - factor) / 2, bits).astype(np.float32)
        weighted = codes if weight is None else codes * weight
        mean_code = weighted.sum(-1) / total
        mean = (g if weight is None else g * weight).sum(-1) / total
        spread = (weighted * codes).sum(-1) / total - mean_code**2
        slope = (weighted * g).sum(-1) / total - mean_code * mean
        usable = spread > 1e-6
        scale = stored(np.where(usable, slope / np.where(usable, spread, 1), trial), dtype)
        offset = stored(mean - scale * mean_code, dtype)
        error = _error(g, codes * scale[..., None] + offset[..., None], weight)
        better = error < least
        best, best_low = np.where(better, scale, best), np.where(better, offset, best_low)
        least = np.where(better, error, least)
    return best, best_low
