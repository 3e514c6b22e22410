"""Text and code models that segments, delete gates and dynamic vocabularies are tried on: encoders, encoders with a
decoder, and a prompt's pass."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from .model import Call, Inputs, MeanPool, ZooModel, text
from .text import AXES, BERT_SIZES, LENGTH, NAMES, SIZES, WIDTH

READ = 7
"""Tokens that the decoders have been given."""
ROBERTA: dict[str, Any] = {**BERT_SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

LLAMA: dict[str, Any] = {**SIZES, "num_key_value_heads": 1, "vocab_size": 100, "max_position_embeddings": 64}


def _codebert() -> Call:
    return Call(
        hf.RobertaModel(hf.RobertaConfig(**ROBERTA), add_pooling_layer=False), NAMES, "last_hidden_state"
    )


class GraphCode(nn.Module):
    """As GraphCodeBERT is called: the mask says of every pair of tokens whether one sees the other, and nodes of the
    data flow, whose position id is 0, start as the mean of the code tokens they may see."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = hf.RobertaModel(hf.RobertaConfig(**ROBERTA), add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        nodes, code = position_ids.eq(0), position_ids.ge(2)
        embedded = self.encoder.embeddings.word_embeddings(input_ids)
        of = nodes[:, :, None] & code[:, None, :] & attention_mask.bool()
        share = of.float() / (of.sum(-1, keepdim=True) + 1e-10)
        means = torch.einsum("abc,acd->abd", share, embedded)
        embedded = torch.where(nodes[:, :, None], means, embedded)
        mask = attention_mask.bool()[:, None]
        found = self.encoder(inputs_embeds=embedded, attention_mask=mask, position_ids=position_ids)
        return found.last_hidden_state[:, 0]


def graph_code(batch: int) -> dict[str, Tensor]:
    """Code of 18 tokens, less in later samples, and 6 nodes, each of which sees two of them; padding between."""
    ids = text(100, 18)(batch)
    mask = torch.zeros(batch, LENGTH, LENGTH, dtype=torch.int64)
    places = torch.ones(batch, LENGTH, dtype=torch.int64)
    nodes = torch.full((batch, 6), 3)
    for row, real in enumerate(ids["attention_mask"].sum(1).tolist()):
        mask[row, :real, :real] = 1
        places[row, :real] = torch.arange(2, real + 2)
        places[row, 18:] = 0
        for node in range(6):
            token = 18 + node
            seen = 1 + node % (real - 2)
            mask[row, token, token] = 1
            mask[row, token, seen : seen + 2] = mask[row, seen : seen + 2, token] = 1
            mask[row, token, 18 + (node + 1) % 6] = 1
    return {
        "input_ids": torch.cat([ids["input_ids"], nodes], 1),
        "attention_mask": mask,
        "position_ids": places,
    }


def _unixcoder() -> Call:
    return Call(hf.RobertaModel(hf.RobertaConfig(**ROBERTA)), NAMES, "last_hidden_state pooler_output")


def _xlmr() -> Call:
    config = hf.XLMRobertaConfig(**ROBERTA, num_labels=5)
    return Call(hf.XLMRobertaForSequenceClassification(config), NAMES, "logits")


def _deberta() -> Call:
    config = hf.DebertaV2Config(
        **{k: v for k, v in BERT_SIZES.items() if k != "attn_implementation"},
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        num_labels=5,
    )
    return Call(hf.DebertaV2ForSequenceClassification(config), NAMES, "logits")


def _minilm() -> MeanPool:
    """A sentence model: a BERT whose tokens are averaged."""
    return MeanPool(hf.BertModel(hf.BertConfig(**BERT_SIZES), add_pooling_layer=False))


def _encoder_decoder(**more: Any) -> Call:
    sizes: dict[str, Any] = {
        "vocab_size": 100,
        "d_model": WIDTH,
        "d_kv": 16,
        "d_ff": 64,
        "num_layers": 3,
        "num_heads": 2,
    }
    config = hf.T5Config(**{**sizes, "decoder_start_token_id": 0, **more})
    model = hf.T5ForConditionalGeneration(config)
    return Call(model, f"{NAMES} decoder_input_ids", "logits", use_cache=False)


GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def _t5() -> Call:
    return _encoder_decoder()


def _codet5p() -> Call:
    """The gated T5 of CodeT5+, whose tables are not shared with the head."""
    return _encoder_decoder(**GATED)


def _byt5() -> Call:
    """Bytes: a gated T5 whose encoder is deeper than its decoder."""
    return _encoder_decoder(vocab_size=384, num_decoder_layers=1, **GATED)


def _bart() -> Call:
    sides: dict[str, Any] = {
        f"{side}_{what}": number
        for side in ("encoder", "decoder")
        for what, number in (("layers", 3), ("attention_heads", 2), ("ffn_dim", 64))
    }
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = hf.BartConfig(vocab_size=100, d_model=WIDTH, max_position_embeddings=64, **sides, **special)
    model = hf.BartForConditionalGeneration(config)
    return Call(model, f"{NAMES} decoder_input_ids", "logits", use_cache=False)


def _llama() -> Call:
    config = hf.LlamaConfig(**LLAMA)
    return Call(hf.LlamaForCausalLM(config), "input_ids", "logits", use_cache=False)


def with_decoder(batch: int) -> dict[str, Tensor]:
    written = torch.arange(READ).expand(batch, READ) + 3
    return {**text(100, LENGTH)(batch), "decoder_input_ids": written.clone()}


def prompt(batch: int) -> dict[str, Tensor]:
    return {"input_ids": text(100, LENGTH, runs=1)(batch)["input_ids"] + 1}


def _entry(name: str, make, architecture: str, inputs: Inputs | None = None, **more) -> ZooModel:
    return ZooModel(
        name,
        "transformers",
        make,
        inputs or text(100, LENGTH),
        tokens=LENGTH,
        blocks=3,
        architecture=architecture,
        **{"dynamic": AXES, "mask": "attention_mask", **more},
    )


DECODED = {**AXES, "decoder_input_ids": (0, 1)}
CODE = [
    _entry("codebert", _codebert, "CodeBERT", per_token=True),
    _entry(
        "graphcodebert", GraphCode, "GraphCodeBERT", graph_code, dynamic={}, mask="", note="a mask of pairs"
    ),
    _entry("unixcoder", _unixcoder, "UniXcoder", per_token=True),
    _entry("xlmr", _xlmr, "XLM-R"),
    _entry("minilm", _minilm, "MiniLM", note="masked mean over tokens"),
    _entry("deberta_v2", _deberta, "DeBERTa-v2"),
    _entry("codet5", _t5, "T5, CodeT5", with_decoder, dynamic=DECODED),
    _entry("codet5p", _codet5p, "CodeT5+", with_decoder, dynamic=DECODED),
    _entry("byt5", _byt5, "ByT5", with_decoder, dynamic=DECODED),
    _entry("bart", _bart, "BART", with_decoder, dynamic=DECODED),
    _entry(
        "llama_prompt",
        _llama,
        "Llama, a prompt",
        prompt,
        dynamic={"input_ids": (0, 1)},
        mask="",
        per_token=True,
    ),
]
