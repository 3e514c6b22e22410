"""Vision towers from transformers."""

from __future__ import annotations

import transformers as hf

from .model import Call, ZooModel, images

SIZE = 32
PATCH = 8
PATCHES = (SIZE // PATCH) ** 2
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
IMAGE = {"image_size": SIZE, "patch_size": PATCH}
LABELS = {"num_labels": 5}


def _vit() -> Call:
    config = hf.ViTConfig(**SIZES, **IMAGE, **LABELS)
    return Call(hf.ViTForImageClassification(config), "pixel_values", "logits")


def _vit_dense() -> Call:
    config = hf.ViTConfig(**SIZES, **IMAGE)
    return Call(hf.ViTModel(config, add_pooling_layer=False), "pixel_values", "last_hidden_state")


def _deit() -> Call:
    config = hf.DeiTConfig(**SIZES, **IMAGE, **LABELS)
    return Call(hf.DeiTForImageClassificationWithTeacher(config), "pixel_values", "logits")


def _beit() -> Call:
    config = hf.BeitConfig(
        **SIZES,
        **IMAGE,
        **LABELS,
        use_relative_position_bias=True,
        use_mean_pooling=True,
        layer_scale_init_value=0.1,
    )
    return Call(hf.BeitForImageClassification(config), "pixel_values", "logits")


def _dinov2() -> Call:
    sizes = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
    config = hf.Dinov2WithRegistersConfig(**sizes, **IMAGE, **LABELS, mlp_ratio=2, num_register_tokens=4)
    return Call(hf.Dinov2WithRegistersForImageClassification(config), "pixel_values", "logits")


def _dinov3() -> Call:
    config = hf.DINOv3ViTConfig(**SIZES, **IMAGE, num_register_tokens=4)
    return Call(hf.DINOv3ViTModel(config), "pixel_values", "pooler_output")


def _clip() -> Call:
    config = hf.CLIPVisionConfig(**SIZES, **IMAGE, projection_dim=16)
    return Call(hf.CLIPVisionModelWithProjection(config), "pixel_values", "image_embeds")


def _siglip() -> Call:
    config = hf.SiglipVisionConfig(**SIZES, **IMAGE)
    return Call(hf.SiglipVisionModel(config), "pixel_values", "pooler_output")


def _entry(name: str, make, architecture: str, prefix: int, **more) -> ZooModel:
    return ZooModel(
        name,
        "transformers",
        make,
        images(SIZE),
        tokens=PATCHES + prefix,
        blocks=3,
        architecture=architecture,
        **more,
    )


MODELS = [
    _entry("vit", _vit, "ViT", 1),
    _entry("vit_dense", _vit_dense, "ViT", 1, per_token=True, variant=True, note="one row per token"),
    _entry("deit", _deit, "DeiT (distilled)", 2),
    _entry("beit", _beit, "BEiT", 1),
    _entry("dinov2", _dinov2, "DINOv2 (registers)", 5),
    _entry("dinov3", _dinov3, "DINOv3 ViT", 5),
    _entry("clip_vision", _clip, "CLIP vision", 1),
    _entry("siglip_vision", _siglip, "SigLIP vision", 0),
]
