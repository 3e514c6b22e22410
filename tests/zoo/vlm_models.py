"""Small random vision-language models of transformers, and wrappers that call them with tensors only.

Every wrapper takes what the model's processor makes, positionally, and gives the logits [batch, tokens, vocabulary].
What torch.export cannot read from a tensor (sizes of images, grids) is baked into the wrapper.
"""

from __future__ import annotations

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

from .vlm_inputs import (
    IMAGE,
    ORIGINAL,
    PATCH,
    PATCHES,
    PINPOINTS,
    SIDE,
    SIZE,
    TILE,
    TILE_PATCHES,
    VIDEO,
    VOCABULARY,
)

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


def _clip(size: int) -> hf.CLIPVisionConfig:
    """One layer more than the language model reads."""
    return hf.CLIPVisionConfig(**{**_tower(size), "num_hidden_layers": 4})


def llava(wrapper: type[Logits] = Logits) -> nn.Module:
    config = hf.LlavaConfig(
        vision_config=_clip(SIZE),
        text_config=hf.LlamaConfig(**_TEXT),
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
    )
    return wrapper(hf.LlavaForConditionalGeneration(config))


def llava_next() -> nn.Module:
    config = hf.LlavaNextConfig(
        vision_config=_clip(TILE),
        text_config=hf.MistralConfig(**_TEXT, sliding_window=None),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=TILE_PATCHES,
    )
    return Anyres(hf.LlavaNextForConditionalGeneration(config))


def onevision() -> nn.Module:
    config = hf.LlavaOnevisionConfig(
        vision_config=_siglip(TILE),
        text_config=hf.Qwen2Config(**_TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
    )
    return Anyres(hf.LlavaOnevisionForConditionalGeneration(config))


_QWEN_TOWER = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "patch_size": PATCH,
    "out_hidden_size": 64,
}
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": 192,
    "vision_end_token_id": 193,
}


def qwen2_5_vl() -> nn.Module:
    config = hf.Qwen2_5_VLConfig(
        vision_config={**_QWEN_TOWER, "window_size": 4 * PATCH, "fullatt_block_indexes": [1]},
        text_config={**_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        **_QWEN_IDS,
    )
    return Packed(hf.Qwen2_5_VLForConditionalGeneration(config))


def qwen3_vl() -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [3, 3, 2], "mrope_interleaved": True}
    config = hf.Qwen3VLConfig(
        vision_config={**_QWEN_TOWER, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]},
        text_config={**_TEXT, "head_dim": 16, "rope_parameters": rope},
        **_QWEN_IDS,
    )
    return Packed(hf.Qwen3VLForConditionalGeneration(config))


def internvl() -> nn.Module:
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**_tower(SIZE)),
        text_config=hf.Qwen2Config(**_TEXT),
        image_token_id=IMAGE,
        image_seq_length=PATCHES // 4,
        tie_word_embeddings=False,
    )
    return Logits(hf.InternVLForConditionalGeneration(config))


def smolvlm() -> nn.Module:
    config = hf.SmolVLMConfig(
        vision_config=_tower(SIZE),
        text_config=hf.LlamaConfig(**_TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    return Connected(hf.SmolVLMForConditionalGeneration(config))


def paligemma() -> nn.Module:
    config = hf.PaliGemmaConfig(
        vision_config=_siglip(SIZE),
        text_config=hf.GemmaConfig(**_TEXT, head_dim=16),
        image_token_index=IMAGE,
        projection_dim=64,
        hidden_size=64,
        vocab_size=VOCABULARY,
    )
    return Typed(hf.PaliGemmaForConditionalGeneration(config))


def gemma3() -> nn.Module:
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


def blip2() -> nn.Module:
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


def mllama() -> nn.Module:
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
