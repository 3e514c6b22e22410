"""A stand-in for a step graph, and a tiny model and tokenizer, for tests of what is around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from elision.passes.errors import ElisionError
from elision.runtime.lm_step import Largest, Rows, largest_of


class Recompute:
    """Remembers which id lies in which slot, and runs the whole model over the keys that a row sees."""

    def __init__(self, model: Any, capacity: int = 64) -> None:
        self.model, self.capacity = model.eval(), capacity
        self.vocabulary = int(model.config.vocab_size)
        self.largest_k = 4
        self.slots = np.full(capacity, -1)
        self.calls: list[int] = []

    @torch.no_grad()
    def step(self, rows: Rows, keep: Sequence[int] | None = None) -> np.ndarray:
        self.calls.append(len(rows))
        self.slots[rows.slots] = rows.ids
        scores = []
        for m in range(len(rows)) if keep is None else keep:
            start, count = rows.prefix[m]
            own = rows.ancestors[m][rows.ancestors[m] >= 0]
            assert own[-1] == rows.slots[m]
            keys = [*range(start, start + count), *own]
            assert rows.positions[m] == len(keys) - 1
            ids = self.slots[keys]
            assert (ids >= 0).all(), "a row sees a slot that nobody wrote"
            scores.append(self.model(torch.from_numpy(ids)[None]).logits[0, -1].numpy())
        return np.stack(scores)

    def largest(self, rows: Rows, keep: Sequence[int] | None = None) -> Largest:
        return largest_of(self.step(rows, keep), self.largest_k)

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        self.slots[target] = self.slots[source]

    def begin(self, inputs: dict[str, Any]) -> None:
        raise ElisionError("no encoder")


def tiny_llama(vocabulary: int = 120, positions: int = 64, seed: int = 0, layers: int = 2) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # scores far apart, so that greedy ids do not hang on rounding
        model.lm_head.weight.mul_(20)
    return model


def byte_tokenizer(vocabulary: int = 260) -> Any:
    """Ids 0 to 2 are special, id 3 + b is the byte b: characters outside ASCII take several ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    shown = dict(zip(range(256), _symbols()))
    assert sorted(shown.values()) == alphabet
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {shown[byte]: byte + 3 for byte in range(256)}
    words = {word: number for word, number in words.items() if number < vocabulary}
    plain = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def _symbols() -> list[str]:
    """How byte-level BPE writes the bytes 0 to 255 (GPT-2's table)."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols, spare = [], 256
    for byte in range(256):
        if byte in printed:
            symbols.append(chr(byte))
        else:
            symbols.append(chr(spare))
            spare += 1
    return symbols
