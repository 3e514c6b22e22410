"""Pictures for reports: which patches of an image became one token, and how many tokens each block has."""

from __future__ import annotations

import base64
import colorsys
import io
import math

import numpy as np

SIDE = 448
"""Pixels of the longer side of a picture; smaller images are enlarged so that outlines stay thin."""

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


def as_image(array: np.ndarray) -> np.ndarray | None:
    """One image [3, H, W], [H, W, 3] or [1, H, W] of floats or bytes as uint8 [H, W, 3]; None for anything
    else.

    Floats below zero are taken as normalised with ImageNet's mean and deviation, the custom of the field."""
    if array.ndim != 3:
        return None
    if array.shape[0] in (1, 3) and min(array.shape[1:]) > 3:
        array = array.transpose(1, 2, 0)
    if array.shape[-1] not in (1, 3):
        return None
    if array.dtype == np.uint8:
        return np.broadcast_to(array, (*array.shape[:2], 3)).copy()
    pixels = np.nan_to_num(array.astype(np.float64))
    if pixels.min() < -0.01:
        pixels = pixels * STD + MEAN
    elif pixels.max() > 1.5:
        pixels = pixels / 255.0
    pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    return (np.clip(pixels, 0.0, 1.0) * 255).round().astype(np.uint8)


def patch_grid(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """(rows, columns) of `tokens` patches over an image: nearly square patches that divide it; None if none
    do."""
    best: tuple[float, tuple[int, int]] | None = None
    for rows in range(1, tokens + 1):
        if tokens % rows:
            continue
        columns = tokens // rows
        if height < rows or width < columns:
            continue
        stretch = abs(math.log((height / rows) / (width / columns)))
        if stretch < 0.3 and (best is None or stretch < best[0]):
            best = (stretch, (rows, columns))
    return None if best is None else best[1]


def place_patches(
    slots: int, height: int, width: int, prefix: int | None = None, suffix: int = 0
) -> tuple[int, tuple[int, int]] | None:
    """(tokens before the patches, grid) for a map of `slots` tokens. Where the number of tokens before the
    patches is not known, the smallest one that leaves a grid is taken."""
    for first in range(0, min(slots, 17)) if prefix is None else (prefix,):
        grid = patch_grid(slots - first - suffix, height, width)
        if grid is not None and min(grid) > 1:
            return first, grid
    return None


def merged_picture(image: np.ndarray, slot: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The merged tokens over an image.

    image: uint8 [H, W, 3]. slot: integers [rows * columns], the slot of every patch; -1 = dropped. Every
    slot gets the mean colour of its patches; patches that share a slot are outlined in a colour of their
    own, dropped ones are dark. Returns uint8 [h, w, 3], enlarged to about SIDE pixels."""
    rows, columns = grid
    size = max(4, SIDE // max(grid))
    groups = np.asarray(slot).reshape(rows, columns)
    means = _patch_means(image, grid)
    flat, colours = groups.ravel(), means.reshape(-1, 3)
    unique, index, count = np.unique(flat, return_inverse=True, return_counts=True)
    sums = np.stack([np.bincount(index, weights=colours[:, c]) for c in range(3)], axis=1)
    filled = (sums / count[:, None])[index].reshape(rows, columns, 3)
    filled[groups == -1] *= 0.15
    picture = filled.repeat(size, axis=0).repeat(size, axis=1)
    lines = np.zeros((len(unique), 3))
    for position, key in enumerate(unique):
        if count[position] > 1 and key != -1:
            lines[position] = np.array(colorsys.hsv_to_rgb((position * 0.618034) % 1.0, 0.85, 1.0)) * 255
    _outline(picture, groups, lines[index].reshape(rows, columns, 3), size)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _patch_means(image: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    rows, columns = grid
    y = np.linspace(0, image.shape[0], rows + 1).astype(int)
    x = np.linspace(0, image.shape[1], columns + 1).astype(int)
    sums = np.add.reduceat(np.add.reduceat(image.astype(np.float64), y[:-1], axis=0), x[:-1], axis=1)
    return sums / (np.diff(y)[:, None, None] * np.diff(x)[None, :, None])


def _outline(picture: np.ndarray, groups: np.ndarray, colours: np.ndarray, size: int) -> None:
    """Draw, inside each patch, the edges that it shares with another slot."""
    rows, columns = groups.shape
    thick = max(1, size // 10)
    padded = np.pad(groups, 1, constant_values=-2)
    for row in range(rows):
        for column in range(columns):
            colour = colours[row, column]
            if not colour.any():
                continue
            own = groups[row, column]
            top, left = row * size, column * size
            block = picture[top : top + size, left : left + size]
            if padded[row, column + 1] != own:
                block[:thick] = colour
            if padded[row + 2, column + 1] != own:
                block[-thick:] = colour
            if padded[row + 1, column] != own:
                block[:, :thick] = colour
            if padded[row + 1, column + 2] != own:
                block[:, -thick:] = colour


def enlarged(image: np.ndarray) -> np.ndarray:
    """The image at a whole multiple of its size, about SIDE pixels."""
    factor = max(1, round(SIDE / max(image.shape[:2])))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def png(image: np.ndarray) -> str:
    """A data URI of an image, uint8 [H, W, 3]."""
    from matplotlib import image as writer

    buffer = io.BytesIO()
    writer.imsave(buffer, image, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def tokens_chart(before: list[float], after: list[float]) -> str:
    """An inline SVG: tokens of each attention block, before (grey) and after (blue)."""
    if not after:
        return ""
    width, height, left, bottom = 640, 220, 46, 28
    top = max([*before, *after, 1.0])
    step = (width - left - 10) / max(len(before), len(after), 1)

    def bars(series: list[float], colour: str, share: float, offset: float) -> list[str]:
        drawn = []
        for index, value in enumerate(series):
            tall = (height - bottom - 12) * value / top
            x, y = left + index * step + offset * step, height - bottom - tall
            place = f'x="{x:.1f}" y="{y:.1f}" width="{share * step:.1f}" height="{tall:.1f}"'
            drawn.append(
                f'<rect {place} fill="{colour}"><title>block {index}: {value:g} tokens</title></rect>'
            )
        return drawn

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="tokens per block">']
    parts += bars(before, "#c8ccd2", 0.40, 0.08) + bars(after, "#2f6fde", 0.40, 0.50)
    for value in (0.0, top / 2, top):
        y = height - bottom - (height - bottom - 12) * value / top
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        parts.append(f'<line x1="{left}" x2="{width - 10}" y1="{y:.1f}" y2="{y:.1f}"/>')
    every = max(1, len(after) // 16)
    for index in range(0, len(after), every):
        x = left + (index + 0.5) * step
        parts.append(f'<text x="{x:.1f}" y="{height - 10}" text-anchor="middle">{index}</text>')
    return "".join([*parts, "</svg>"])
