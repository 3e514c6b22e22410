"""A small vision-language model of the ordinary build: transformers' Llava with a tiny CLIP tower and a tiny Llama.

The tower's patch features, without the class token, go through a projector to the places of the image tokens, and a
causal decoder goes on from there. The answer to a question is the likeliest next token after the prompt.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vlm_data import BOS, IMAGE, KINDS, PAD, PATCH, PATCHES, SIZE, VOCABULARY, pictures, questions

FOLDER = Path(__file__).parent / "models" / "shapes-vlm"

HELD_OUT = 1_000_003
"""Seeds from here on are for measuring, never for training."""

CONFIG: dict[str, Any] = {
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": PATCH,
        "hidden_act": "gelu",
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": len(VOCABULARY),
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.06,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": None,
    },
    "image_token_index": IMAGE,
    "image_seq_length": PATCHES,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": False,
}
"""As in Llava, the language model reads the tower's last layer but one, and the last one is computed for nothing."""


class VisionLanguageModel(nn.Module):
    """The logits of a Llava model, as a module of tensors: what a compiler is given."""

    def __init__(self, model: transformers.LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        """float [B, N, V]: logits of the next token everywhere.

        input_ids, attention_mask: int64 [B, N], PATCHES image tokens in each row. pixel_values: float [B, 3, SIZE,
        SIZE], one picture per row.
        """
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, use_cache=False
        ).logits


def build(config: dict[str, Any] | None = None) -> VisionLanguageModel:
    """A model with new weights, in eval mode. config: the fields of a LlavaConfig, CONFIG by default."""
    whole = transformers.LlavaConfig(**(config or CONFIG))
    return VisionLanguageModel(transformers.LlavaForConditionalGeneration(whole)).eval()


def load(folder: Path = FOLDER) -> VisionLanguageModel:
    """The trained model, float32, in eval mode. folder: config.json and model.safetensors, as `save` writes them."""
    made = build(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    made.model.load_state_dict(load_file(folder / "model.safetensors"))
    return made.float()


def save(made: VisionLanguageModel, folder: Path) -> None:
    """Writes the weights, in half precision, and the configuration; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in made.model.state_dict().items()}
    _replace(folder / "model.safetensors", lambda path: save_file(weights, path, {"format": "pt"}))
    text = json.dumps(
        {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", **CONFIG}, indent=2
    )
    _replace(folder / "config.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))


@torch.no_grad()
def accuracy(model: nn.Module, seed: int = HELD_OUT, count: int = 400, asked: int = 5) -> dict[str, float]:
    """Share of right answers to `asked` questions about each of `count` pictures, by kind and in all; the likeliest
    answer to every question of a kind ("blind") for comparison."""
    pixels, scenes = pictures(seed, count)
    found = questions(scenes, [seed, 1], asked)
    right = []
    for rows in np.array_split(np.arange(len(found.answers)), max(1, len(found.answers) // 100)):
        logits = model(
            torch.from_numpy(found.input_ids[rows]),
            torch.from_numpy(found.attention_mask[rows]),
            torch.from_numpy(pixels[found.picture[rows]]),
        )
        right.append(logits[:, -1].argmax(-1).numpy() == found.answers[rows])
    all_right = np.concatenate(right)
    shares = {name: float(all_right[found.kinds == kind].mean()) for kind, name in enumerate(KINDS)}
    blind = sum(np.bincount(found.answers[found.kinds == kind]).max() for kind in range(len(KINDS)))
    return {"all": float(all_right.mean()), **shares, "blind": float(blind / len(all_right))}


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    write(Path(name))
    os.chmod(name, 0o644)
    os.replace(name, path)


def example_inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask and pixel_values of that many questions, each about another picture."""
    drawn, scenes = pictures([batch, 99], batch)
    asked = questions(scenes, [batch, 99], 1)
    return torch.from_numpy(asked.input_ids), torch.from_numpy(asked.attention_mask), torch.from_numpy(drawn)
