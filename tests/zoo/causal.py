"""Small random causal language models of transformers, two layers each, and encoder-decoders."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as hf

VOCABULARY = 99
POSITIONS = 128
_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_PLAIN = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": POSITIONS,
    **_SPECIAL,
}
_GROUPED = {**_PLAIN, "num_key_value_heads": 2}
_FALCON = {k: v for k, v in _PLAIN.items() if k not in ("intermediate_size", "max_position_embeddings")}
_BRANCHES = {
    f"{side}_{what}": number
    for side in ("encoder", "decoder")
    for what, number in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
}

CAUSAL: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GROUPED, head_dim=16)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_GROUPED, sliding_window=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**_GROUPED, head_dim=16, sliding_window=8, attn_logit_softcapping=2.0)
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **_GROUPED, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
        )
    ),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_GROUPED, sliding_window=None)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=POSITIONS, **_SPECIAL
        )
    ),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_PLAIN)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            word_embed_proj_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
            max_position_embeddings=POSITIONS,
        )
    ),
    "bloom": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **_SPECIAL)
    ),
    "mpt": lambda: hf.MptForCausalLM(
        hf.MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=POSITIONS)
    ),
    "falcon-alibi": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(**_FALCON, alibi=True, multi_query=False, parallel_attn=False, bias=True)
    ),
    "falcon-rotary": lambda: hf.FalconForCausalLM(hf.FalconConfig(**_FALCON, alibi=False, multi_query=True)),
    "falcon-grouped": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(**_FALCON, alibi=False, new_decoder_architecture=True, num_kv_heads=2)
    ),
    "stablelm": lambda: hf.StableLmForCausalLM(hf.StableLmConfig(**_GROUPED)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**_GROUPED)),
    "granite": lambda: hf.GraniteForCausalLM(
        hf.GraniteConfig(
            **_GROUPED,
            attention_multiplier=0.3,
            residual_multiplier=0.5,
            logits_scaling=2.0,
            embedding_multiplier=3.0,
        )
    ),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**_GROUPED)),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**_GROUPED)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=3,
            **_SPECIAL,
        )
    ),
    "bart": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            max_position_embeddings=POSITIONS,
            decoder_start_token_id=3,
            **_BRANCHES,
            **_SPECIAL,
        )
    ),
    "whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            num_mel_bins=16,
            max_source_positions=20,
            max_target_positions=POSITIONS,
            decoder_start_token_id=3,
            begin_suppress_tokens=None,
            **_BRANCHES,
            **_SPECIAL,
        )
    ),
}
ENCODER_DECODERS = ("t5", "bart", "whisper")


@cache
def causal_model(name: str) -> torch.nn.Module:
    """The model in evaluation mode, its matrices large enough that soft caps bend and softmax is not flat."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CAUSAL[name]().eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


def source_of(model: Any) -> torch.Tensor | None:
    """An input for the encoder of `model`, None for a model without one."""
    if not model.config.is_encoder_decoder:
        return None
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "input_ids":
        return torch.randint(3, VOCABULARY, (1, 5), generator=generator)
    return torch.randn(1, 16, 40, generator=generator)
