"""Audio encoders from transformers."""

from __future__ import annotations

import torch
import transformers as hf
from torch import Tensor

from .model import Call, ZooModel

FRAMES = 64
SAMPLES = 800
STRIDES = ((10, 5), (4, 4), (2, 2))


def _whisper() -> Call:
    config = hf.WhisperConfig(
        d_model=32,
        encoder_layers=3,
        encoder_attention_heads=2,
        encoder_ffn_dim=64,
        num_mel_bins=16,
        max_source_positions=FRAMES // 2,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=64,
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    encoder = hf.WhisperModel(config).encoder
    return Call(encoder, "input_features", "last_hidden_state")


def _wav2vec2_config() -> hf.Wav2Vec2Config:
    return hf.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16, 16, 16),
        conv_stride=tuple(s for _, s in STRIDES),
        conv_kernel=tuple(k for k, _ in STRIDES),
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        classifier_proj_size=16,
        num_labels=5,
        vocab_size=32,
    )


def _wav2vec2() -> Call:
    model = hf.Wav2Vec2ForSequenceClassification(_wav2vec2_config())
    return Call(model, "input_values attention_mask", "logits")


def _wav2vec2_ctc() -> Call:
    return Call(hf.Wav2Vec2ForCTC(_wav2vec2_config()), "input_values attention_mask", "logits")


def mel(batch: int) -> dict[str, Tensor]:
    """[batch, 16, FRAMES]: slow contours over time."""
    samples = []
    for index in range(batch):
        generator = torch.Generator().manual_seed(index)
        coarse = torch.randn(1, 16, 8, generator=generator)
        samples.append(torch.nn.functional.interpolate(coarse, FRAMES, mode="linear", align_corners=True))
    return {"input_features": torch.cat(samples)}


def wave(batch: int) -> dict[str, Tensor]:
    """[batch, SAMPLES] of two tones and a right-padded mask; sample i lacks its last 80*i values."""
    time = torch.arange(SAMPLES) / SAMPLES
    values, masks = [], []
    for index in range(batch):
        tone = torch.sin(6.28 * (20 + 7 * index) * time) + 0.5 * torch.sin(6.28 * (55 + index) * time)
        count = max(SAMPLES // 2, SAMPLES - 80 * index)
        mask = (torch.arange(SAMPLES) < count).to(torch.int64)
        values.append(tone * mask)
        masks.append(mask)
    return {"input_values": torch.stack(values), "attention_mask": torch.stack(masks)}


MODELS = [
    ZooModel(
        "whisper",
        "transformers",
        _whisper,
        mel,
        tokens=FRAMES // 2,
        blocks=3,
        per_token=True,
        architecture="Whisper encoder",
    ),
    ZooModel(
        "wav2vec2",
        "transformers",
        _wav2vec2,
        wave,
        tokens=19,
        blocks=3,
        dynamic={"input_values": (0, 1), "attention_mask": (0, 1)},
        mask="attention_mask",
        strides=STRIDES,
        architecture="Wav2Vec2",
    ),
    ZooModel(
        "wav2vec2_ctc",
        "transformers",
        _wav2vec2_ctc,
        wave,
        tokens=19,
        blocks=3,
        dynamic={"input_values": (0, 1), "attention_mask": (0, 1)},
        mask="attention_mask",
        strides=STRIDES,
        per_token=True,
        architecture="Wav2Vec2",
        variant=True,
        note="one row per token",
    ),
]
