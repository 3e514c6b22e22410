"""A small random LLaVA in a folder, with a tokenizer and a processor, as a hub's checkpoints are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .lm_double import byte_tokenizer

MARK, SIDE, PATCH = "<image>", 24, 4
TOKENS = (SIDE // PATCH) ** 2
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{% for part in m.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def llava_folder(folder: Path) -> Any:
    """Writes it; returns the processor."""
    import transformers as hf

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [MARK]})
    placeholder = tokenizer.convert_tokens_to_ids(MARK)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=SIDE, patch_size=PATCH),
        text_config=hf.LlamaConfig(
            **sizes,
            num_hidden_layers=1,
            num_key_value_heads=2,
            vocab_size=264,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=placeholder,
        image_seq_length=TOKENS,
    )
    torch.manual_seed(3)
    model = hf.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.3 * torch.randn_like(weight))  # so that texts and pictures differ
    model.save_pretrained(folder)
    pixels = hf.CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_convert_rgb=True
    )
    processor = hf.LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)
    return processor


def photograph(file: Path, seed: int, size: tuple[int, int] = (40, 30)) -> Path:
    """A picture of noise in large squares."""
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    Image.fromarray(noise).resize(size).save(file)
    return file
