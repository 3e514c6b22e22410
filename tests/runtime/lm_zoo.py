"""The small causal language models of the zoo (`tests/zoo/causal.py`), for decoding.

Weights are drawn so that scores lie far apart: greedy ids then say whether the function is the same, not how sums
were rounded.
"""

from __future__ import annotations

from typing import Any

import torch

from ..zoo.causal import CAUSAL, ENCODER_DECODERS

LIMIT = 64
"""Positions of a cache."""

DECODERS = tuple(name for name in CAUSAL if name not in ENCODER_DECODERS)


def make(name: str, seed: int = 0, positions: int | None = None) -> Any:
    """The model called `name`, in evaluation mode, without gradients. positions: of "llama", which has no table."""
    torch.manual_seed(seed)
    model: Any = CAUSAL[name]().eval().requires_grad_(False)
    if positions is not None:
        model.config.max_position_embeddings = positions
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
    return model


def theirs(model: Any, ids: list[int], count: int, **inputs: Any) -> list[int]:
    """transformers' own greedy ids after `ids`, the end-of-text id too."""
    given = torch.tensor([ids])
    if model.config.is_encoder_decoder:
        found = model.generate(
            **inputs, decoder_input_ids=given, max_new_tokens=count, do_sample=False, num_beams=1
        )
        if model.config.model_type == "whisper":
            return found[0].tolist()  # which leaves the prompt away itself
    else:
        mask = torch.ones_like(given)
        found = model.generate(
            given, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
        )
    return found[0, len(ids) :].tolist()
