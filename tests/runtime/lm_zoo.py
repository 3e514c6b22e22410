"""Small causal language models with random weights, one of every architecture, by name.

Weights are drawn so that scores lie far apart: greedy ids then say whether the function is the same, not how sums
were rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

WORDS = 120
LIMIT = 64

_PLAIN = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LIMIT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_PLAIN, "num_key_value_heads": 2}
_OLD = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SEQ = {"vocab_size": WORDS, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 3}

DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GROUPED, head_dim=16)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_GROUPED, sliding_window=6)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_GROUPED, head_dim=16, sliding_window=6)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **_GROUPED, head_dim=16, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
        )
    ),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_GROUPED, original_max_position_embeddings=LIMIT)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(**_OLD, n_embd=32, n_layer=2, n_head=4, n_positions=LIMIT)
    ),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_PLAIN)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            **_OLD,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
            max_position_embeddings=LIMIT,
            word_embed_proj_dim=32,
        )
    ),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(**_OLD, hidden_size=32, n_layer=2, n_head=4)),
    "mpt": lambda: hf.MptForCausalLM(
        hf.MptConfig(**_OLD, d_model=32, n_layers=2, n_heads=4, max_seq_len=LIMIT, expansion_ratio=2)
    ),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(**_OLD, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False)
    ),
    "falcon-alibi": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(
            **_OLD,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            alibi=True,
            multi_query=False,
            parallel_attn=False,
            bias=True,
        )
    ),
    "stablelm": lambda: hf.StableLmForCausalLM(hf.StableLmConfig(**_GROUPED)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**_GROUPED)),
    "granite": lambda: hf.GraniteForCausalLM(
        hf.GraniteConfig(**_GROUPED, attention_multiplier=0.3, residual_multiplier=0.5, logits_scaling=2.0)
    ),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**_GROUPED)),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**_GROUPED)),
}

ENCODER_DECODERS: dict[str, Callable[[], Any]] = {
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(**_SEQ, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
    "bart": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(
            **_SEQ,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=LIMIT,
            forced_eos_token_id=2,
        )
    ),
    "whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            **_SEQ,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_mel_bins=16,
            max_source_positions=20,
            max_target_positions=LIMIT,
            begin_suppress_tokens=None,
        )
    ),
}


def make(name: str, seed: int = 0, positions: int = LIMIT) -> Any:
    """The model called `name`, in evaluation mode, without gradients. positions: of "llama"."""
    torch.manual_seed(seed)
    model = {**DECODERS, **ENCODER_DECODERS}[name]().eval().requires_grad_(False)
    if name == "llama":
        model.config.max_position_embeddings = positions
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
    if name in ("gemma2", "gemma3"):
        model.config.final_logit_softcapping = None if name == "gemma3" else 30.0
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
