"""The zoo of vision-language models: small random configurations, and calls of them with images among the text."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import vlm_models
from .export import export as export_call
from .export import saved
from .model import Built, randomise
from .vlm_inputs import (
    ANYRES_TILES,
    ANYRES_TOKENS,
    IMAGE,
    PATCHES,
    SIDE,
    SIZE,
    TILE_PATCHES,
    anyres,
    cross_mask,
    flat,
    grid_positions,
    mllama_inputs,
    padded,
    qwen_inputs,
    smolvlm_inputs,
    text,
)
from .vlm_models import Whole

__all__ = ["VLMS", "VlmModel", "export", "onnx_file", "padded", "placeholder_checks"]


@dataclass(frozen=True)
class VlmModel:
    """One small random-weight configuration of a published vision-language architecture.

    make: the wrapper; extras: (batch, images per row) -> the inputs behind input_ids and attention_mask, by
    name, in positional order. `image_tokens` is how many language positions one image takes, `vision_tokens`
    the tokens of one row of the tower (class token included), `tiles` how many such rows an image takes.
    `batch_axes` is the batch axis of each input where torch.export may vary it with one image per row; empty:
    static shapes only. `positions`: for M-RoPE, the sides of an image's grid of language positions. `types`:
    the token type of an image's positions where the model takes types (0 is text, and PaliGemma's prompt).
    """

    name: str
    architecture: str
    make: Callable[[], nn.Module]
    extras: Callable[[int, int], dict[str, Tensor]]
    image_tokens: int
    vision_tokens: int
    tiles: int = 1
    placeholder: int = IMAGE
    batch_axes: dict[str, int] = field(default_factory=dict)
    mask: str = "attention_mask"
    note: str = ""
    positions: tuple[int, int] | None = None
    types: int | None = None
    cross: bool = False

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())

    def module(self) -> nn.Module:
        """The wrapper, in eval mode, with weights that depend on the name only and ask for no gradients."""
        torch.manual_seed(self.seed)
        module = self.make()
        randomise(module, self.seed)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "gate" in name and parameter.numel() == 1:
                    parameter.fill_(0.7)  # Mllama's gates: randomise leaves them near zero
        return module.eval().requires_grad_(False)

    def build(self, batch: int = 2, images: int = 1) -> Built:
        """The module and one call of it."""
        return Built(self.module(), tuple(self.inputs(batch, images).values()))

    def inputs(self, batch: int = 2, images: int = 1) -> dict[str, Tensor]:
        """Inputs by name, in positional order; text and pictures differ from row to row."""
        ids, spans = text(batch, images, self.image_tokens, self.placeholder)
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.extras(batch, images)}
        if self.types is not None:
            made["token_type_ids"] = (ids == self.placeholder).long() * self.types
        if self.positions is not None:
            made["position_ids"] = grid_positions(ids.shape, spans, self.positions)
        if self.cross:
            made["cross_attention_mask"] = cross_mask(ids, spans, self.tiles)
        return made

    def spans(self, images: int = 1) -> list[range]:
        """The language positions of each image, the same in every row."""
        return text(1, images, self.image_tokens, self.placeholder)[1]

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...] | None:
        """dynamic_shapes for torch.export (a batch of any size, one image per row); None: static only."""
        if not self.batch_axes:
            return None
        batch = torch.export.Dim("batch", min=1, max=32)
        return tuple({self.batch_axes[name]: batch} for name in self.inputs(2))


def export(model: VlmModel, *, checks: bool = True) -> torch.export.ExportedProgram:
    """`model` at the level of torch.export for two rows; the batch is dynamic where the model permits it.

    checks: with transformers' check that placeholders and image features are as many. torch.onnx cannot
    translate it (aten._is_all_true), so files are made without, by transformers' own switch."""
    with placeholder_checks(checks):
        return export_call(model.build(2), model.dynamic_shapes())


def onnx_file(model: VlmModel, folder: Path) -> Path:
    """The ONNX file of `model` in `folder`, exported the first time it is asked for."""
    file = folder / f"{model.name}.onnx"
    if file.exists():
        return file
    return saved(export(model, checks=False), list(model.inputs(2)), file)


@contextlib.contextmanager
def placeholder_checks(on: bool) -> Iterator[None]:
    """With or without transformers' check that placeholders and image features are as many."""
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "0" if on else "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


_PLAIN = {"input_ids": 0, "attention_mask": 0, "pixel_values": 0}
_BAKED_SIZES = "image_sizes (24, 32) of every picture baked in: the model reads them with tolist()"
_BAKED_GRID = "image_grid_thw (1, 8, 8) of every picture baked in; position_ids are M-RoPE's"

MODELS = [
    VlmModel("llava", "LLaVA-1.5", vlm_models.llava, flat(SIZE), PATCHES, PATCHES + 1),
    VlmModel(
        "llava_batch",
        "LLaVA-1.5",
        lambda: vlm_models.llava(Whole),
        flat(SIZE),
        PATCHES,
        PATCHES + 1,
        batch_axes=_PLAIN,
        note="image features joined as one tensor, so that the batch may vary",
    ),
    VlmModel(
        "llava_next",
        "LLaVA-NeXT",
        vlm_models.llava_next,
        anyres,
        ANYRES_TOKENS,
        TILE_PATCHES + 1,
        tiles=ANYRES_TILES,
        note=_BAKED_SIZES,
    ),
    VlmModel(
        "llava_onevision",
        "LLaVA-OneVision",
        vlm_models.onevision,
        anyres,
        ANYRES_TOKENS,
        TILE_PATCHES,
        tiles=ANYRES_TILES,
        note=_BAKED_SIZES,
    ),
    VlmModel(
        "qwen2_5_vl",
        "Qwen2.5-VL",
        vlm_models.qwen2_5_vl,
        qwen_inputs,
        PATCHES // 4,
        PATCHES,
        note=_BAKED_GRID,
        positions=(SIDE // 2, SIDE // 2),
    ),
    VlmModel(
        "qwen3_vl",
        "Qwen3-VL",
        vlm_models.qwen3_vl,
        qwen_inputs,
        PATCHES // 4,
        PATCHES,
        note=_BAKED_GRID,
        positions=(SIDE // 2, SIDE // 2),
    ),
    VlmModel(
        "internvl", "InternVL", vlm_models.internvl, flat(SIZE), PATCHES // 4, PATCHES + 1, batch_axes=_PLAIN
    ),
    VlmModel(
        "smolvlm",
        "SmolVLM",
        vlm_models.smolvlm,
        smolvlm_inputs,
        PATCHES // 4,
        PATCHES,
        batch_axes={**_PLAIN, "pixel_attention_mask": 0},
        note="images that are all zeros are not dropped: the model does that by a boolean index",
    ),
    VlmModel(
        "paligemma",
        "PaliGemma",
        vlm_models.paligemma,
        flat(SIZE),
        PATCHES,
        PATCHES,
        batch_axes={**_PLAIN, "token_type_ids": 0},
        types=0,
    ),
    VlmModel(
        "gemma3",
        "Gemma 3",
        vlm_models.gemma3,
        flat(SIZE),
        PATCHES // 4,
        PATCHES,
        batch_axes={**_PLAIN, "token_type_ids": 0},
        types=1,
    ),
    VlmModel("blip2", "BLIP-2", vlm_models.blip2, flat(SIZE), 8, PATCHES + 1, batch_axes=_PLAIN),
    VlmModel(
        "mllama",
        "Llama 3.2 Vision",
        vlm_models.mllama,
        mllama_inputs,
        1,
        TILE_PATCHES + 1,
        tiles=2,
        batch_axes={**_PLAIN, "aspect_ratio_ids": 0, "aspect_ratio_mask": 0, "cross_attention_mask": 0},
        note="cross-attention: one placeholder an image",
        cross=True,
    ),
]

VLMS: dict[str, VlmModel] = {model.name: model for model in MODELS}
