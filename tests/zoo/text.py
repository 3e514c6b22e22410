"""Text encoders from transformers. Each takes token ids and a padding mask."""

from __future__ import annotations

import transformers as hf

from .model import Call, MeanPool, ZooModel, text

LENGTH = 24
WIDTH = 32
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
BERT_SIZES = {**SIZES, "vocab_size": 100, "max_position_embeddings": 64, "attn_implementation": "sdpa"}
NAMES = "input_ids attention_mask"


def _bert() -> Call:
    return Call(hf.BertForSequenceClassification(hf.BertConfig(**BERT_SIZES, num_labels=5)), NAMES, "logits")


def _bert_tokens() -> Call:
    return Call(hf.BertForTokenClassification(hf.BertConfig(**BERT_SIZES, num_labels=5)), NAMES, "logits")


def _bert_mean() -> MeanPool:
    return MeanPool(hf.BertModel(hf.BertConfig(**BERT_SIZES), add_pooling_layer=False))


def _roberta() -> Call:
    config = hf.RobertaConfig(**BERT_SIZES, num_labels=5, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return Call(hf.RobertaForSequenceClassification(config), NAMES, "logits")


def _distilbert() -> Call:
    config = hf.DistilBertConfig(
        vocab_size=100,
        max_position_embeddings=64,
        dim=WIDTH,
        n_layers=3,
        n_heads=2,
        hidden_dim=64,
        num_labels=5,
    )
    return Call(hf.DistilBertForSequenceClassification(config), NAMES, "logits")


def _electra() -> Call:
    config = hf.ElectraConfig(**BERT_SIZES, embedding_size=16, num_labels=5)
    return Call(hf.ElectraForSequenceClassification(config), NAMES, "logits")


def _modernbert() -> Call:
    config = hf.ModernBertConfig(
        **{**BERT_SIZES, "num_hidden_layers": 4},
        num_labels=5,
        local_attention=8,
        global_attn_every_n_layers=3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        reference_compile=False,
    )
    return Call(hf.ModernBertForSequenceClassification(config), NAMES, "logits")


def _t5() -> hf.T5EncoderModel:
    config = hf.T5Config(
        vocab_size=100, d_model=WIDTH, d_kv=16, d_ff=64, num_layers=3, num_heads=2, decoder_start_token_id=0
    )
    return hf.T5EncoderModel(config)


def _t5_tokens() -> Call:
    return Call(_t5(), NAMES, "last_hidden_state")


def _t5_mean() -> MeanPool:
    return MeanPool(_t5())


def _clip_text() -> Call:
    config = hf.CLIPTextConfig(
        **SIZES,
        vocab_size=100,
        max_position_embeddings=LENGTH,
        projection_dim=16,
        eos_token_id=99,
        bos_token_id=1,
    )
    return Call(hf.CLIPTextModelWithProjection(config), NAMES, "text_embeds")


def _siglip_text() -> Call:
    config = hf.SiglipTextConfig(
        **SIZES, vocab_size=100, max_position_embeddings=LENGTH, projection_size=WIDTH
    )
    return Call(hf.SiglipTextModel(config), NAMES, "pooler_output")


AXES = {"input_ids": (0, 1), "attention_mask": (0, 1)}


def _entry(
    name: str, make, architecture: str, *, blocks: int = 3, eos: int | None = None, runs: int = 2, **more
) -> ZooModel:
    return ZooModel(
        name,
        "transformers",
        make,
        text(100, LENGTH, eos=eos, runs=runs),
        tokens=LENGTH,
        blocks=blocks,
        dynamic=AXES,
        mask="attention_mask",
        architecture=architecture,
        **more,
    )


MODELS = [
    _entry("bert", _bert, "BERT"),
    _entry("bert_tokens", _bert_tokens, "BERT", per_token=True, variant=True, note="one label per token"),
    _entry("bert_mean", _bert_mean, "BERT", variant=True, note="masked mean over tokens"),
    _entry("roberta", _roberta, "RoBERTa"),
    _entry("distilbert", _distilbert, "DistilBERT"),
    _entry("electra", _electra, "ELECTRA"),
    _entry("modernbert", _modernbert, "ModernBERT", blocks=4),
    _entry("t5", _t5_tokens, "T5 encoder", per_token=True, runs=1, correlation=0.8),
    _entry(
        "t5_mean",
        _t5_mean,
        "T5 encoder",
        runs=1,
        correlation=0.8,
        variant=True,
        note="masked mean over tokens",
    ),
    _entry("clip_text", _clip_text, "CLIP text", eos=99),
    _entry("siglip_text", _siglip_text, "SigLIP text", whole_length=True, reads_padding=True),
]
