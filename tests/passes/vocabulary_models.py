"""Small random models of every architecture that reads a text, for new ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.zoo.model import MeanPool, randomise

VOCABULARY, WIDTH, LENGTH = 100, 32, 14
SIZES: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 64, "max_position_embeddings": 64},
}


class Text(nn.Module):
    """One output of a model that reads a text."""

    def __init__(self, inner: nn.Module, output: str = "last_hidden_state", **constants: Any) -> None:
        super().__init__()
        self.inner, self.output, self.constants = inner, output, constants

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        made = self.inner(input_ids=input_ids, attention_mask=attention_mask, **self.constants)
        return getattr(made, self.output)


def _roberta(kind: Any, config: Any) -> nn.Module:
    made = config(**SIZES, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    return Text(kind(made, add_pooling_layer=False))


def _bert() -> nn.Module:
    return Text(hf.BertModel(hf.BertConfig(**SIZES), add_pooling_layer=False))


def _minilm() -> nn.Module:
    return MeanPool(hf.BertModel(hf.BertConfig(**SIZES), add_pooling_layer=False))


def _modernbert() -> nn.Module:
    more: dict[str, Any] = {"global_attn_every_n_layers": 2, "pad_token_id": 0, "reference_compile": False}
    config = hf.ModernBertConfig(**SIZES, local_attention=8, **more)
    return Text(hf.ModernBertModel(config))


def _deberta() -> nn.Module:
    more: dict[str, Any] = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
    config = hf.DebertaV2Config(**SIZES, type_vocab_size=0, **more)
    return Text(hf.DebertaV2Model(config))


def _t5() -> nn.Module:
    config = hf.T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    return Text(hf.T5EncoderModel(config))


def _llama() -> nn.Module:
    config = hf.LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True)
    return Text(hf.LlamaForCausalLM(config), "logits", use_cache=False)


def clip() -> nn.Module:
    """Its end of a text is the largest id."""
    config = hf.CLIPTextConfig(**SIZES, projection_dim=16, eos_token_id=2, bos_token_id=1)
    return Text(hf.CLIPTextModelWithProjection(config), "text_embeds")


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": _bert,
    "roberta": lambda: _roberta(hf.RobertaModel, hf.RobertaConfig),
    "xlm-r": lambda: _roberta(hf.XLMRobertaModel, hf.XLMRobertaConfig),
    "minilm": _minilm,
    "modernbert": _modernbert,
    "deberta-v2": _deberta,
    "t5": _t5,
    "llama": _llama,
}


def module(name: str) -> nn.Module:
    """The model, in eval mode, with weights that depend on nothing."""
    torch.manual_seed(0)
    made = MODELS[name]()
    randomise(made, 5)
    return made.eval()


def table_of(model: nn.Module) -> Tensor:
    """The model's own table of embeddings [V, C]."""
    return model.inner.get_input_embeddings().weight.detach()  # type: ignore[union-attr, operator]


def text(length: int = LENGTH, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Token ids between 3 and V - 1, and a mask: the last text is two tokens shorter, and padded with 1."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    ids[-1, -2:], mask[-1, -2:] = 1, 0
    return ids, mask


def embedded(model: nn.Module, ids: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    """What the model itself makes of the ids, those from V on embedded as `rows` [M, C]: the reference."""
    inner = model.inner
    embedding = inner.get_input_embeddings()  # type: ignore[union-attr, operator]
    joined = torch.nn.Embedding.from_pretrained(torch.cat([embedding.weight.detach(), rows]))
    joined.padding_idx = embedding.padding_idx
    if hasattr(embedding, "scalar_embed_scale"):
        raise AssertionError("this table is scaled")
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None  # type: ignore[union-attr, operator]
    kept = None if head is None else head.weight
    inner.set_input_embeddings(joined)  # type: ignore[union-attr, operator]
    try:
        if head is not None:
            head.weight = kept
        with torch.no_grad():
            return model(ids, mask)
    finally:
        inner.set_input_embeddings(embedding)  # type: ignore[union-attr, operator]
