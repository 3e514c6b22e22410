"""Vision transformers from timm."""

from __future__ import annotations

from typing import Any

from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

from .model import ZooModel, images

SIZE = 32
PATCH = 8
PATCHES = (SIZE // PATCH) ** 2
BASE: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": PATCH,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "mlp_ratio": 2,
    "num_classes": 5,
}


def vit(**options: Any) -> VisionTransformer:
    """timm's VisionTransformer at the zoo's size, with `options` of its own."""
    return VisionTransformer(**{**BASE, **options})


def _deit3() -> VisionTransformer:
    return vit(no_embed_class=True, init_values=0.1)


def _eva02() -> Eva:
    return Eva(
        **BASE,
        qkv_fused=False,
        swiglu_mlp=True,
        scale_mlp=True,
        use_rot_pos_emb=True,
        ref_feat_shape=(4, 4),
        global_pool="avg",
    )


def _beitv2() -> Beit:
    return Beit(**BASE, init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True, global_pool="avg")


def _samvit() -> VisionTransformerSAM:
    return VisionTransformerSAM(
        img_size=SIZE,
        patch_size=4,
        embed_dim=32,
        depth=3,
        num_heads=2,
        mlp_ratio=2,
        num_classes=5,
        neck_chans=16,
        use_rel_pos=True,
        window_size=4,
        global_attn_indexes=(2,),
    )


def _swin() -> SwinTransformer:
    return SwinTransformer(
        img_size=SIZE,
        patch_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 2),
        window_size=4,
        mlp_ratio=2,
        num_classes=5,
    )


def _registers() -> nn.Module:
    return vit(reg_tokens=4, init_values=0.1, no_embed_class=True)


def _qk_norm() -> nn.Module:
    return vit(qk_norm=True, init_values=0.1)


def _distilled() -> VisionTransformerDistilled:
    return VisionTransformerDistilled(**BASE)


def _entry(name: str, make, architecture: str, tokens: int, *, blocks: int = 3, **more) -> ZooModel:
    return ZooModel(
        f"timm_{name}",
        "timm",
        make,
        images(SIZE, name="x"),
        tokens=tokens,
        blocks=blocks,
        architecture=architecture,
        **more,
    )


MODELS = [
    _entry("vit", vit, "vit", PATCHES + 1),
    _entry(
        "vit_gap",
        lambda: vit(class_token=False, global_pool="avg"),
        "vit",
        PATCHES,
        variant=True,
        note="mean pool, no class token",
    ),
    _entry(
        "vit_map",
        lambda: vit(class_token=False, global_pool="map"),
        "vit",
        PATCHES,
        variant=True,
        note="attention pool, no class token",
    ),
    _entry(
        "vit_avg",
        lambda: vit(global_pool="avg"),
        "vit",
        PATCHES + 1,
        variant=True,
        note="mean pool beside a class token",
    ),
    _entry("vit_qk_norm", _qk_norm, "vit", PATCHES + 1, variant=True, note="QK-norm and LayerScale"),
    _entry("vit_registers", _registers, "vit", PATCHES + 5, variant=True, note="registers and LayerScale"),
    _entry("deit3", _deit3, "deit3", PATCHES + 1),
    _entry("deit_distilled", _distilled, "deit (distilled)", PATCHES + 2),
    _entry("eva02", _eva02, "eva02", PATCHES + 1),
    _entry("beitv2", _beitv2, "beitv2", PATCHES + 1),
    _entry("samvit", _samvit, "samvit", 64, unfused_onnx=True),
    _entry("swin", _swin, "swin", 64, blocks=4),
]
