"""Inputs of small vision-language models, as processors make them: texts with placeholders, pictures, positions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .model import smooth_image

VOCABULARY = 200
IMAGE, VIDEO = 190, 191
BEFORE, BETWEEN, AFTER = 6, 5, 7
"""Text tokens before the first image, between two images and after the last one."""

SIZE, PATCH = 32, 4
PATCHES = (SIZE // PATCH) ** 2
SIDE = SIZE // PATCH
TILE = 16
TILE_PATCHES = (TILE // PATCH) ** 2
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]
ORIGINAL = (24, 32)
"""Height and width of the picture before anyres tiling: 2 by 2 tiles and an overview, two rows of padding."""
ANYRES_TILES = 5
ANYRES_TOKENS = TILE_PATCHES + 6 * (8 + 1)
"""The overview, then 6 rows of 8 patches (8 rows less the padding), each row closed by a newline token."""

SEQUENCE = {
    "input_ids": (1, 0),
    "attention_mask": (1, 0),
    "token_type_ids": (1, 0),
    "position_ids": (2, 1),
    "cross_attention_mask": (1, 0),
}
"""Inputs that have the language axis: where it is, and what padding holds (as the processors pad)."""


def padded(inputs: dict[str, Tensor], left: bool, by: int) -> dict[str, Tensor]:
    """`inputs` with `by` masked positions before (left) or behind the text of every row."""
    result = dict(inputs)
    for name, (axis, value) in SEQUENCE.items():
        if name in inputs:
            given = inputs[name]
            shape = list(given.shape)
            shape[axis] = by
            filling = torch.full(shape, value, dtype=given.dtype)
            result[name] = torch.cat([filling, given] if left else [given, filling], axis)
    return result


def text(batch: int, images: int, tokens: int, placeholder: int) -> tuple[Tensor, list[range]]:
    parts = [BEFORE, *[BETWEEN] * (images - 1), AFTER]
    spans, start = [], 0
    for words in parts[:-1]:
        spans.append(range(start + words, start + words + tokens))
        start += words + tokens
    rows = []
    for index in range(batch):
        generator = torch.Generator().manual_seed(77 + index)
        row = torch.randint(3, IMAGE - 10, (start + AFTER,), generator=generator)
        row[0] = 1
        for span in spans:
            row[span.start : span.stop] = placeholder
        rows.append(row)
    return torch.stack(rows), spans


def grid_positions(shape: torch.Size, spans: list[range], grid: tuple[int, int]) -> Tensor:
    """[3, batch, tokens] time, row and column of every token, as Qwen's get_rope_index makes them."""
    rows, columns = grid
    index = torch.arange(rows * columns)
    parts, at, here = [], 0, 0
    for span in spans:
        parts.append((torch.arange(span.start - at) + here).expand(3, -1))
        here += span.start - at
        parts.append(torch.stack([torch.zeros_like(index), index // columns, index % columns]) + here)
        here += max(rows, columns)
        at = span.stop
    parts.append((torch.arange(shape[1] - at) + here).expand(3, -1))
    return torch.cat(parts, 1)[:, None].repeat(1, shape[0], 1)


def cross_mask(ids: Tensor, spans: list[range], tiles: int) -> Tensor:
    """[batch, tokens, images, tiles]: a token attends to the last image at or before it; none: to nothing."""
    mask = torch.zeros(*ids.shape, len(spans), tiles, dtype=torch.int64)
    for image, span in enumerate(spans):
        stop = spans[image + 1].start if image + 1 < len(spans) else ids.shape[1]
        mask[:, span.start : stop, image] = 1
    return mask


def pixels(size: int, *lead: int) -> Tensor:
    """[*lead, 3, size, size] pictures, each different."""
    count = int(np.prod(lead))
    return smooth_image(count, size, size).reshape(*lead, 3, size, size)


def flat(size: int) -> Callable[[int, int], dict[str, Tensor]]:
    return lambda batch, images: {"pixel_values": pixels(size, batch * images)}


def anyres(batch: int, images: int) -> dict[str, Tensor]:
    return {"pixel_values": pixels(TILE, batch * images, ANYRES_TILES)}


def smolvlm_inputs(batch: int, images: int) -> dict[str, Tensor]:
    mask = torch.ones(batch, images, SIZE, SIZE, dtype=torch.int64)
    return {"pixel_values": pixels(SIZE, batch, images), "pixel_attention_mask": mask}


def qwen_inputs(batch: int, images: int) -> dict[str, Tensor]:
    """Rows of pixels, one per patch, in the order of merged 2x2 blocks; a still picture is two equal frames."""
    pictures = pixels(SIZE, batch * images)
    blocks = SIDE // 2
    rows = pictures.reshape(batch * images, 3, blocks, 2, PATCH, blocks, 2, PATCH)
    rows = rows.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None].repeat(1, 1, 1, 1, 1, 1, 2, 1, 1)
    return {"pixel_values": rows.reshape(batch * images * PATCHES, 3 * 2 * PATCH * PATCH)}


def mllama_inputs(batch: int, images: int) -> dict[str, Tensor]:
    return {
        "pixel_values": pixels(TILE, batch, images, 2),
        "aspect_ratio_ids": torch.full((batch, images), 2),
        "aspect_ratio_mask": torch.ones(batch, images, 2, dtype=torch.int64),
    }
