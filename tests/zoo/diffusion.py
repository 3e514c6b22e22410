"""Denoisers from diffusers: a latent, a time step and a condition in, a latent out."""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from .model import Call, Inputs, ZooModel, smooth_image

SIZE = 8
TEXT = 6


def _dit() -> nn.Module:
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        norm_num_groups=2,
        sample_size=SIZE,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    return Call(model, "hidden_states timestep class_labels", "sample")


def _pixart() -> nn.Module:
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=32,
        sample_size=SIZE,
        patch_size=2,
        caption_channels=24,
        use_additional_conditions=False,
    )
    return Call(
        model,
        "hidden_states encoder_hidden_states timestep encoder_attention_mask",
        "sample",
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )


def _unet() -> nn.Module:
    model = UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return Call(model, "sample timestep encoder_hidden_states", "sample")


def _condition(batch: int) -> Tensor:
    return torch.cat(
        [torch.randn(1, TEXT, 24, generator=torch.Generator().manual_seed(5 + i)) for i in range(batch)]
    )


def _dit_inputs(batch: int) -> dict[str, Tensor]:
    return {
        "hidden_states": smooth_image(batch, SIZE, SIZE, 4),
        "timestep": torch.arange(batch) * 100 + 17,
        "class_labels": torch.arange(batch) + 1,
    }


def _pixart_inputs(batch: int) -> dict[str, Tensor]:
    mask = torch.ones(batch, TEXT, dtype=torch.int64)
    for index in range(batch):
        mask[index, TEXT - index % 3 :] = 0
    return {
        "hidden_states": smooth_image(batch, SIZE, SIZE, 4),
        "encoder_hidden_states": _condition(batch),
        "timestep": torch.arange(batch) * 100 + 17,
        "encoder_attention_mask": mask,
    }


def _unet_inputs(batch: int) -> dict[str, Tensor]:
    return {
        "sample": smooth_image(batch, SIZE, SIZE, 4),
        "timestep": torch.arange(batch) * 100 + 17,
        "encoder_hidden_states": _condition(batch),
    }


AROUND = "token-merge{ratio=0.25 where=around metric=hidden}"


def _entry(name: str, make, architecture: str, inputs: Inputs, tokens: int, **more) -> ZooModel:
    return ZooModel(
        name, "diffusers", make, inputs, tokens=tokens, blocks=3, architecture=architecture, **more
    )


MODELS = [
    _entry("dit", _dit, "DiT", _dit_inputs, (SIZE // 2) ** 2),
    _entry(
        "dit_around",
        _dit,
        "DiT",
        _dit_inputs,
        (SIZE // 2) ** 2,
        passes=AROUND,
        variant=True,
        note="merged around the self-attention",
    ),
    _entry("pixart", _pixart, "PixArt", _pixart_inputs, (SIZE // 2) ** 2),
    # Every transformer of a UNet is one block deep, so that there is no later block to give fewer tokens to.
    _entry("unet", _unet, "UNet2DCondition", _unet_inputs, SIZE**2, passes=AROUND),
]
