"""Small random models of other people's libraries, for the tests of the FX view. Each builder returns
(module in eval mode, positional arguments, keyword arguments)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Case = tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]
MODELS: dict[str, Callable[[], Case]] = {}


def case(function: Callable[[], Case]) -> Callable[[], Case]:
    MODELS[function.__name__] = function
    return function


def build(name: str) -> Case:
    """The model `name` and its inputs, the same ones every time."""
    torch.manual_seed(0)
    module, args, kwargs = MODELS[name]()
    return module.eval(), args, kwargs


def image(batch: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)


def tokens(batch: int = 3, length: int = 9) -> dict[str, torch.Tensor]:
    """Ids and a padding mask in which the second sample is shorter."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1:2, 5:] = 0
    return {"input_ids": torch.randint(3, 50, (batch, length)), "attention_mask": mask}


# ---- timm --------------------------------------------------------------------------------------------
def _timm(name: str, **options: Any) -> torch.nn.Module:
    import timm

    return timm.create_model(name, num_classes=5, **options)


_VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}


@case
def timm_vit() -> Case:
    return _timm("vit_tiny_patch16_224", **_VIT), (image(),), {}


@case
def timm_deit3() -> Case:
    return _timm("deit3_small_patch16_224", **_VIT), (image(),), {}


@case
def timm_eva02() -> Case:
    return _timm("eva02_tiny_patch14_224", **_VIT), (image(),), {}


@case
def timm_beitv2() -> Case:
    return _timm("beitv2_base_patch16_224", **_VIT), (image(),), {}


@case
def timm_swin() -> Case:
    options = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16}
    return _timm("swin_tiny_patch4_window7_224", depths=(2, 2), num_heads=(2, 4), **options), (image(),), {}


@case
def timm_samvit() -> Case:
    options = {"img_size": 64, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
    return (
        _timm("samvit_base_patch16_224", window_size=3, global_attn_indexes=(1,), **options),
        (image(2, 64),),
        {},
    )


# ---- transformers ------------------------------------------------------------------------------------
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
_PATCHES = {"image_size": 32, "patch_size": 8}


def _hf(name: str, attention: str = "sdpa", **options: Any) -> torch.nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(**options)
    config._attn_implementation = attention
    kind = {"Siglip": "SiglipVisionModel", "CLIPVision": "CLIPVisionModel", "CLIPText": "CLIPTextModel"}
    return getattr(transformers, kind.get(name, f"{name}Model"))(config)


@case
def hf_vit() -> Case:
    return _hf("ViT", **_SMALL, **_PATCHES), (image(),), {}


@case
def hf_beit() -> Case:
    return _hf("Beit", **_SMALL, **_PATCHES, use_relative_position_bias=True), (image(),), {}


@case
def hf_dinov2_registers() -> Case:
    return _hf("Dinov2WithRegisters", **_SMALL, **_PATCHES, num_register_tokens=3), (image(),), {}


@case
def hf_dinov3() -> Case:
    return _hf("DINOv3ViT", **_SMALL, **_PATCHES, num_register_tokens=2), (image(),), {}


@case
def clip_vision() -> Case:
    return _hf("CLIPVision", **_SMALL, **_PATCHES), (image(),), {}


@case
def clip_text() -> Case:
    model = _hf("CLIPText", **_SMALL, vocab_size=50, max_position_embeddings=12, eos_token_id=2)
    return model, (), tokens()


@case
def siglip() -> Case:
    import transformers

    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**_SMALL, **_PATCHES))
    return model, (image(),), {}


@case
def bert() -> Case:
    return _hf("Bert", **_SMALL, vocab_size=50), (), tokens()


@case
def modernbert() -> Case:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    model = _hf("ModernBert", **_SMALL, **ids, vocab_size=50, local_attention=4, global_attn_every_n_layers=2)
    return model, (), tokens()


@case
def t5_encoder() -> Case:
    import transformers

    config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return transformers.T5EncoderModel(config), (), tokens()


@case
def whisper_encoder() -> Case:
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    heads = {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48}
    config = transformers.WhisperConfig(d_model=32, num_mel_bins=16, max_source_positions=12, **heads)
    return WhisperEncoder(config), (torch.randn(2, 16, 24),), {}


@case
def wav2vec2() -> Case:
    conv = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return _hf("Wav2Vec2", **_SMALL, **conv, **positions), (torch.randn(2, 200),), {}


# ---- diffusers ---------------------------------------------------------------------------------------
@case
def dit() -> Case:
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "num_layers": 2}
    model = DiTTransformer2DModel(**sizes, sample_size=8, norm_num_groups=4, num_embeds_ada_norm=10)
    return model, (torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.tensor([1, 2])), {}


@case
def pixart() -> Case:
    from diffusers import PixArtTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "num_layers": 2}
    model = PixArtTransformer2DModel(
        **sizes, sample_size=8, norm_num_groups=4, cross_attention_dim=32, caption_channels=24
    )
    added = {"resolution": None, "aspect_ratio": None}
    given = {"encoder_hidden_states": torch.randn(2, 7, 24), "timestep": torch.tensor([3, 7])}
    return model, (torch.randn(2, 4, 8, 8),), {**given, "added_cond_kwargs": added}


@case
def unet() -> Case:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return model, (torch.randn(2, 4, 8, 8), torch.tensor(3), torch.randn(2, 7, 16)), {}
