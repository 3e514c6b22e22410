"""Small random vision-language models of transformers, and calls of them with images among the text.

Every wrapper takes what the model's processor makes, positionally, and gives the logits [batch, tokens,
vocabulary]. What torch.export cannot read from a tensor (sizes of images, grids) is baked into the wrapper.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from .export import export as export_call
from .export import quiet
from .model import Built, randomise, smooth_image

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

_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    **_SPECIAL,
}
_SEQUENCE = {
    "input_ids": (1, 0),
    "attention_mask": (1, 0),
    "token_type_ids": (1, 0),
    "position_ids": (2, 1),
    "cross_attention_mask": (1, 0),
}
"""Inputs that have the language axis: where it is, and what padding holds (as the processors pad)."""


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
        ids, spans = _text(batch, images, self.image_tokens, self.placeholder)
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.extras(batch, images)}
        if self.types is not None:
            made["token_type_ids"] = (ids == self.placeholder).long() * self.types
        if self.positions is not None:
            made["position_ids"] = _grid_positions(ids.shape, spans, self.positions)
        if self.cross:
            made["cross_attention_mask"] = _cross_mask(ids, spans, self.tiles)
        return made

    def spans(self, images: int = 1) -> list[range]:
        """The language positions of each image, the same in every row."""
        return _text(1, images, self.image_tokens, self.placeholder)[1]

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...] | None:
        """dynamic_shapes for torch.export (a batch of any size, one image per row); None: static only."""
        if not self.batch_axes:
            return None
        batch = torch.export.Dim("batch", min=1, max=32)
        return tuple({self.batch_axes[name]: batch} for name in self.inputs(2))


def padded(inputs: dict[str, Tensor], left: bool, by: int) -> dict[str, Tensor]:
    """`inputs` with `by` masked positions before (left) or behind the text of every row."""
    result = dict(inputs)
    for name, (axis, value) in _SEQUENCE.items():
        if name in inputs:
            given = inputs[name]
            shape = list(given.shape)
            shape[axis] = by
            filling = torch.full(shape, value, dtype=given.dtype)
            result[name] = torch.cat([filling, given] if left else [given, filling], axis)
    return result


def export(model: VlmModel, *, checks: bool = True) -> torch.export.ExportedProgram:
    """`model` at the level of torch.export for two rows; the batch is dynamic where the model permits it.

    checks: with transformers' check that placeholders and image features are as many. torch.onnx cannot
    translate it (aten._is_all_true), so files are made without, by transformers' own switch."""
    with _checks(checks):
        return export_call(model.build(2), model.dynamic_shapes())


def onnx_file(model: VlmModel, folder: Path) -> Path:
    """The ONNX file of `model` in `folder`, exported the first time it is asked for."""
    file = folder / f"{model.name}.onnx"
    if file.exists():
        return file
    program = export(model, checks=False)
    with quiet():
        made = torch.onnx.export(
            program, dynamo=True, input_names=list(model.inputs(2)), verbose=False, optimize=True
        )
        assert made is not None
        temporary = folder / f"{model.name}.{os.getpid()}.onnx"
        made.save(temporary)
    temporary.replace(file)  # whole or not at all: several workers may export the same model
    return file


@contextlib.contextmanager
def _checks(on: bool) -> Iterator[None]:
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


# ---- inputs ----------------------------------------------------------------------------------------------


def _text(batch: int, images: int, tokens: int, placeholder: int) -> tuple[Tensor, list[range]]:
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


def _grid_positions(shape: torch.Size, spans: list[range], grid: tuple[int, int]) -> Tensor:
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


def _cross_mask(ids: Tensor, spans: list[range], tiles: int) -> Tensor:
    """[batch, tokens, images, tiles]: a token attends to the last image at or before it; none: to nothing."""
    mask = torch.zeros(*ids.shape, len(spans), tiles, dtype=torch.int64)
    for image, span in enumerate(spans):
        stop = spans[image + 1].start if image + 1 < len(spans) else ids.shape[1]
        mask[:, span.start : stop, image] = 1
    return mask


def _pixels(size: int, *lead: int) -> Tensor:
    """[*lead, 3, size, size] pictures, each different."""
    count = int(np.prod(lead))
    return smooth_image(count, size, size).reshape(*lead, 3, size, size)


def _flat(size: int) -> Callable[[int, int], dict[str, Tensor]]:
    return lambda batch, images: {"pixel_values": _pixels(size, batch * images)}


def _anyres(batch: int, images: int) -> dict[str, Tensor]:
    return {"pixel_values": _pixels(TILE, batch * images, ANYRES_TILES)}


def _smolvlm_inputs(batch: int, images: int) -> dict[str, Tensor]:
    mask = torch.ones(batch, images, SIZE, SIZE, dtype=torch.int64)
    return {"pixel_values": _pixels(SIZE, batch, images), "pixel_attention_mask": mask}


def _qwen_inputs(batch: int, images: int) -> dict[str, Tensor]:
    """Rows of pixels, one per patch, in the order of merged 2x2 blocks; a still picture is two equal frames."""
    pictures = _pixels(SIZE, batch * images)
    blocks = SIDE // 2
    rows = pictures.reshape(batch * images, 3, blocks, 2, PATCH, blocks, 2, PATCH)
    rows = rows.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None].repeat(1, 1, 1, 1, 1, 1, 2, 1, 1)
    return {"pixel_values": rows.reshape(batch * images * PATCHES, 3 * 2 * PATCH * PATCH)}


def _mllama_inputs(batch: int, images: int) -> dict[str, Tensor]:
    return {
        "pixel_values": _pixels(TILE, batch, images, 2),
        "aspect_ratio_ids": torch.full((batch, images), 2),
        "aspect_ratio_mask": torch.ones(batch, images, 2, dtype=torch.int64),
    }


# ---- wrappers --------------------------------------------------------------------------------------------


class Logits(nn.Module):
    """Calls a model with its inputs by name, without a cache.

    Inputs are spelt out because torch.export matches dynamic_shapes to parameters, not to *inputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        return self.call(input_ids, attention_mask, pixel_values=pixel_values)

    def call(self, input_ids: Tensor, attention_mask: Tensor, **more: Any) -> Tensor:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **more).logits


class Typed(Logits):
    """PaliGemma and Gemma 3: token types say which tokens see each other both ways."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, token_type_ids: Tensor
    ) -> Tensor:
        return self.call(input_ids, attention_mask, pixel_values=pixel_values, token_type_ids=token_type_ids)


class Crossed(Logits):
    """Mllama: which tiles are real, and which tokens read them.

    The mask is made floating here: torch.onnx cannot decompose the model's `1.0 - mask` of integers."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        aspect_ratio_ids: Tensor,
        aspect_ratio_mask: Tensor,
        cross_attention_mask: Tensor,
    ) -> Tensor:
        return self.call(
            input_ids,
            attention_mask,
            pixel_values=pixel_values,
            aspect_ratio_ids=aspect_ratio_ids,
            aspect_ratio_mask=aspect_ratio_mask,
            cross_attention_mask=cross_attention_mask.to(pixel_values.dtype),
        )


class Whole(Logits):
    """LLaVA-1.5 without its `list(image_features)`, which fixes the batch in torch.export."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        model = self.inner.model
        seen = model.vision_tower(pixel_values, output_hidden_states=True)
        features = model.multi_modal_projector(seen.hidden_states[-2][:, 1:])
        given = BaseModelOutputWithPooling(pooler_output=(features,))
        return self.call(input_ids, attention_mask, mm_encoder_outputs={"image": given})


class Anyres(Logits):
    """LLaVA-NeXT and OneVision: image_sizes is read with tolist(), so each picture's size is a constant."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        sizes = [ORIGINAL] * pixel_values.shape[0]
        return self.call(input_ids, attention_mask, pixel_values=pixel_values, image_sizes=sizes)


class Connected(Logits):
    """Idefics3's family: the model drops images of zeros by a boolean index, so that their number is data.

    Here no image is dropped: its own tower and connector are called with every image."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor,
    ) -> Tensor:
        model = self.inner.model
        size = model.config.vision_config.patch_size
        areas = pixel_attention_mask.flatten(0, 1).unfold(1, size, size).unfold(2, size, size)
        patches = areas.sum((-1, -2)) > 0
        seen = model.vision_model(pixel_values=pixel_values.flatten(0, 1), patch_attention_mask=patches)
        features = model.connector(seen.last_hidden_state).flatten(0, 1)
        given = BaseModelOutputWithPooling(pooler_output=features)
        return self.call(input_ids, attention_mask, mm_encoder_outputs={"image": given})


class Packed(Logits):
    """Qwen: image_grid_thw is read with tolist(), so every picture's grid is a constant.

    The tower is called with the tables that it makes of the grid, as transformers' exporters do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        grid = torch.tensor([[1, SIDE, SIDE]])
        tower = inner.model.visual
        self.register_buffer("places", get_vision_position_ids(grid, tower.spatial_merge_size))
        self.bounds: tuple[int, ...] = ()
        if hasattr(tower, "window_size"):
            index, bounds = get_vision_window_index(
                grid, tower.spatial_merge_size, tower.window_size, tower.patch_size
            )
            self.register_buffer("window", index)
            self.bounds = tuple(bounds.tolist())
        else:
            indices, weights = get_vision_interpolation_indices_and_weights(
                grid,
                tower.num_grid_per_side,
                mode=tower.interpolation_mode,
                align_corners=tower.interpolation_align_corners,
                spatial_merge_size=tower.spatial_merge_size,
            )
            self.register_buffer("indices", indices)
            self.register_buffer("weights", weights)

    def tables(self, count: int) -> dict[str, Any]:
        """What the tower reads off a grid, for so many pictures of one size. Bounds are plain numbers."""
        made: dict[str, Any] = {
            "position_ids": self.places.repeat(count, 1),
            "cu_seqlens": np.arange(count + 1) * PATCHES,
        }
        if self.bounds:
            steps = torch.arange(count)[:, None] * self.window.shape[0]
            made["window_index"] = (self.window[None] + steps).flatten()
            inner = [i * PATCHES + bound for i in range(count) for bound in self.bounds[1:]]
            made["cu_window_seqlens"] = np.array([0, *inner])
        else:
            made["interp_indices"] = self.indices.repeat(count, 1)
            made["interp_weights"] = self.weights.repeat(count, 1)
        return made

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, position_ids: Tensor
    ) -> Tensor:
        count = pixel_values.shape[0] // PATCHES
        seen = self.inner.model.visual(pixel_values, grid_thw=None, **self.tables(count))
        seen.pooler_output = (seen.pooler_output,)
        if getattr(seen, "deepstack_features", None) is not None:
            seen.deepstack_features = [(level,) for level in seen.deepstack_features]
        return self.call(
            input_ids, attention_mask, mm_encoder_outputs={"image": seen}, position_ids=position_ids
        )


# ---- models ----------------------------------------------------------------------------------------------


def _tower(size: int) -> dict[str, Any]:
    return {**_TOWER, "image_size": size, "patch_size": PATCH}


def _siglip(size: int, **more: Any) -> hf.SiglipVisionConfig:
    return hf.SiglipVisionConfig(**_tower(size), vision_use_head=False, **more)


def _llava(wrapper: type[Logits] = Logits) -> nn.Module:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**{**_tower(SIZE), "num_hidden_layers": 4}),
        text_config=hf.LlamaConfig(**_TEXT),
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
    )
    return wrapper(hf.LlavaForConditionalGeneration(config))


def _llava_next() -> nn.Module:
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**{**_tower(TILE), "num_hidden_layers": 4}),
        text_config=hf.MistralConfig(**_TEXT, sliding_window=None),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=TILE_PATCHES,
    )
    return Anyres(hf.LlavaNextForConditionalGeneration(config))


def _onevision() -> nn.Module:
    config = hf.LlavaOnevisionConfig(
        vision_config=_siglip(TILE),
        text_config=hf.Qwen2Config(**_TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
    )
    return Anyres(hf.LlavaOnevisionForConditionalGeneration(config))


def _qwen2_5_vl() -> nn.Module:
    config = hf.Qwen2_5_VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": PATCH,
            "window_size": 4 * PATCH,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        text_config={**_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=192,
        vision_end_token_id=193,
    )
    return Packed(hf.Qwen2_5_VLForConditionalGeneration(config))


def _qwen3_vl() -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [3, 3, 2], "mrope_interleaved": True}
    config = hf.Qwen3VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": PATCH,
            "out_hidden_size": 64,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config={**_TEXT, "head_dim": 16, "rope_parameters": rope},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=192,
        vision_end_token_id=193,
    )
    return Packed(hf.Qwen3VLForConditionalGeneration(config))


def _internvl() -> nn.Module:
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**_tower(SIZE)),
        text_config=hf.Qwen2Config(**_TEXT),
        image_token_id=IMAGE,
        image_seq_length=PATCHES // 4,
        tie_word_embeddings=False,
    )
    return Logits(hf.InternVLForConditionalGeneration(config))


def _smolvlm() -> nn.Module:
    config = hf.SmolVLMConfig(
        vision_config=_tower(SIZE),
        text_config=hf.LlamaConfig(**_TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    return Connected(hf.SmolVLMForConditionalGeneration(config))


def _paligemma() -> nn.Module:
    config = hf.PaliGemmaConfig(
        vision_config=_siglip(SIZE),
        text_config=hf.GemmaConfig(**_TEXT, head_dim=16),
        image_token_index=IMAGE,
        projection_dim=64,
        hidden_size=64,
        vocab_size=VOCABULARY,
    )
    return Typed(hf.PaliGemmaForConditionalGeneration(config))


def _gemma3() -> nn.Module:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = hf.Gemma3Config(
        vision_config=_siglip(SIZE),
        text_config=hf.Gemma3TextConfig(
            **_TEXT, head_dim=16, query_pre_attn_scalar=16, sliding_window=12, layer_types=layers
        ),
        mm_tokens_per_image=PATCHES // 4,
        image_token_index=IMAGE,
        boi_token_index=192,
        eoi_token_index=193,
    )
    return Typed(hf.Gemma3ForConditionalGeneration(config))


def _blip2() -> nn.Module:
    config = hf.Blip2Config(
        vision_config=hf.Blip2VisionConfig(**_tower(SIZE)),
        qformer_config=hf.Blip2QFormerConfig(
            **{**_TOWER, "num_hidden_layers": 2}, vocab_size=VOCABULARY, encoder_hidden_size=32
        ),
        text_config=hf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            word_embed_proj_dim=64,
            max_position_embeddings=512,
            **_SPECIAL,
        ),
        num_query_tokens=8,
        image_token_index=IMAGE,
    )
    return Logits(hf.Blip2ForConditionalGeneration(config))


def _mllama() -> nn.Module:
    config = hf.MllamaConfig(
        vision_config={
            **_tower(TILE),
            "num_global_layers": 2,
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 96,
        },
        text_config={**_TEXT, "num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
        image_token_index=IMAGE,
    )
    return Crossed(hf.MllamaForConditionalGeneration(config))


_PLAIN = {"input_ids": 0, "attention_mask": 0, "pixel_values": 0}
_BAKED_SIZES = "image_sizes (24, 32) of every picture baked in: the model reads them with tolist()"
_BAKED_GRID = "image_grid_thw (1, 8, 8) of every picture baked in; position_ids are M-RoPE's"

MODELS = [
    VlmModel("llava", "LLaVA-1.5", _llava, _flat(SIZE), PATCHES, PATCHES + 1),
    VlmModel(
        "llava_batch",
        "LLaVA-1.5",
        lambda: _llava(Whole),
        _flat(SIZE),
        PATCHES,
        PATCHES + 1,
        batch_axes=_PLAIN,
        note="image features joined as one tensor, so that the batch may vary",
    ),
    VlmModel(
        "llava_next",
        "LLaVA-NeXT",
        _llava_next,
        _anyres,
        ANYRES_TOKENS,
        TILE_PATCHES + 1,
        tiles=ANYRES_TILES,
        note=_BAKED_SIZES,
    ),
    VlmModel(
        "llava_onevision",
        "LLaVA-OneVision",
        _onevision,
        _anyres,
        ANYRES_TOKENS,
        TILE_PATCHES,
        tiles=ANYRES_TILES,
        note=_BAKED_SIZES,
    ),
    VlmModel(
        "qwen2_5_vl",
        "Qwen2.5-VL",
        _qwen2_5_vl,
        _qwen_inputs,
        PATCHES // 4,
        PATCHES,
        note=_BAKED_GRID,
        positions=(SIDE // 2, SIDE // 2),
    ),
    VlmModel(
        "qwen3_vl",
        "Qwen3-VL",
        _qwen3_vl,
        _qwen_inputs,
        PATCHES // 4,
        PATCHES,
        note=_BAKED_GRID,
        positions=(SIDE // 2, SIDE // 2),
    ),
    VlmModel("internvl", "InternVL", _internvl, _flat(SIZE), PATCHES // 4, PATCHES + 1, batch_axes=_PLAIN),
    VlmModel(
        "smolvlm",
        "SmolVLM",
        _smolvlm,
        _smolvlm_inputs,
        PATCHES // 4,
        PATCHES,
        batch_axes={**_PLAIN, "pixel_attention_mask": 0},
        note="images that are all zeros are not dropped: the model does that by a boolean index",
    ),
    VlmModel(
        "paligemma",
        "PaliGemma",
        _paligemma,
        _flat(SIZE),
        PATCHES,
        PATCHES,
        batch_axes={**_PLAIN, "token_type_ids": 0},
        types=0,
    ),
    VlmModel(
        "gemma3",
        "Gemma 3",
        _gemma3,
        _flat(SIZE),
        PATCHES // 4,
        PATCHES,
        batch_axes={**_PLAIN, "token_type_ids": 0},
        types=1,
    ),
    VlmModel("blip2", "BLIP-2", _blip2, _flat(SIZE), 8, PATCHES + 1, batch_axes=_PLAIN),
    VlmModel(
        "mllama",
        "Llama 3.2 Vision",
        _mllama,
        _mllama_inputs,
        1,
        TILE_PATCHES + 1,
        tiles=2,
        batch_axes={**_PLAIN, "aspect_ratio_ids": 0, "aspect_ratio_mask": 0, "cross_attention_mask": 0},
        note="cross-attention: one placeholder an image",
        cross=True,
    ),
]

VLMS: dict[str, VlmModel] = {model.name: model for model in MODELS}
