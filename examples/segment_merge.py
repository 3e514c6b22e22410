"""Trains a small encoder of code on a real task and merges the tokens of every identifier behind one of its layers.

The task: of which module of Python's standard library is this function? A model of a million weights or fewer learns
it on functions without their docstrings, over byte-level BPE; then `segment-merge` is applied behind layer 0, 2, 4 and
the last, and each graph is trained on for a short while, as the model without it is. The table says what is computed
and how many held-out functions are named right, before and after.

    python examples/segment_merge.py [--out table.md] [--page docs/segment_merge.md] [--tiny]

All seeds are fixed. It took 46 minutes on one thread of a busy machine; --tiny only shows that it runs."""

from __future__ import annotations

import argparse
import ast
import copy
import random
import sys
import sysconfig
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn

import elision

SKIPPED = {"test", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "__phello__"}
BEGIN, END = "<!-- begin results -->", "<!-- end results -->"


@dataclass(frozen=True)
class Sizes:
    """What a run takes: of the model, the data and the training."""

    classes: int = 20
    functions: int = 400  # of a class, at most
    length: int = 96
    width: int = 96
    layers: int = 6
    vocabulary: int = 1200
    epochs: int = 20
    more: int = 2  # epochs that every graph is trained on
    batch: int = 32


TINY = Sizes(
    classes=4, functions=24, length=48, width=32, layers=6, vocabulary=500, epochs=1, more=1, batch=16
)


@dataclass(frozen=True)
class Data:
    """ids, mask, segments int64 [n, length] and labels [n]."""

    ids: Tensor
    mask: Tensor
    segments: Tensor
    labels: Tensor

    def part(self, index: Tensor) -> Data:
        return Data(self.ids[index], self.mask[index], self.segments[index], self.labels[index])


def functions(file: Path) -> list[str]:
    """The source of every function in a file, as the parser sees it, without its docstring."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        text = ast.unparse(node)
        if text.count("\n") >= 3:
            found.append(text)
    return found


def standard_library(sizes: Sizes) -> tuple[list[str], list[str], list[int]]:
    """Names of the modules with the most functions; functions; and which module each is of."""
    root = Path(sysconfig.get_paths()["stdlib"])
    by_module: dict[str, list[str]] = {}
    for name in sorted(sys.stdlib_module_names - SKIPPED):
        files = sorted((root / name).rglob("*.py")) if (root / name).is_dir() else [root / f"{name}.py"]
        texts = [text for file in files if file.exists() for text in functions(file)]
        by_module[name] = list(dict.fromkeys(texts))
    names = sorted(by_module, key=lambda name: (-len(by_module[name]), name))[: sizes.classes]
    rng = random.Random(0)
    texts, labels = [], []
    for label, name in enumerate(names):
        chosen = by_module[name]
        rng.shuffle(chosen)
        texts += chosen[: sizes.functions]
        labels += [label] * len(chosen[: sizes.functions])
    return names, texts, labels


def prepare(sizes: Sizes) -> tuple[list[str], Data, Data]:
    """The modules' names, the functions to train on, and every fifth, held out."""
    names, texts, labels = standard_library(sizes)
    order = random.Random(1).sample(range(len(texts)), len(texts))
    texts, labels = [texts[i] for i in order], [labels[i] for i in order]
    held = torch.arange(len(texts)) % 5 == 0
    bpe = ByteLevelBPETokenizer()
    trained_on = [text for text, out in zip(texts, held.tolist()) if not out]
    bpe.train_from_iterator(
        trained_on, vocab_size=sizes.vocabulary, special_tokens=["<pad>", "<s>", "</s>", "<unk>"]
    )
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    encoding = fast(
        texts, padding="max_length", truncation=True, max_length=sizes.length - 1, return_tensors="pt"
    )
    segments = torch.from_numpy(elision.segments_of(encoding, texts, "identifiers"))
    first = torch.ones(len(texts), 1, dtype=torch.int64)  # a class token, which is a unit by itself
    data = Data(
        torch.cat([first, encoding["input_ids"]], 1),
        torch.cat([first, encoding["attention_mask"]], 1),
        torch.cat([0 * first, torch.where(segments >= 0, segments + 1, -1)], 1),
        torch.tensor(labels),
    )
    return names, data.part(~held), data.part(held)


class Classifier(nn.Module):
    """Logits of a RoBERTa over its first token."""

    def __init__(self, sizes: Sizes, classes: int) -> None:
        super().__init__()
        config = hf.RobertaConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=4,
            intermediate_size=2 * sizes.width,
            max_position_embeddings=sizes.length + 2,
            num_labels=classes,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.inner = hf.RobertaForSequenceClassification(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask).logits


def inputs(data: Data, merged: bool) -> tuple[Tensor, ...]:
    return (data.ids, data.mask, data.segments) if merged else (data.ids, data.mask)


def train(module: nn.Module, data: Data, sizes: Sizes, epochs: int, rate: float, *, merged: bool) -> None:
    """AdamW with a rate that rises for a tenth of the steps and falls to 0."""
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0.01)
    per_epoch = len(data.labels) // sizes.batch
    steps = epochs * per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    for _ in range(epochs):
        order = torch.randperm(len(data.labels), generator=generator)
        for step in range(per_epoch):
            batch = data.part(order[step * sizes.batch : (step + 1) * sizes.batch])
            loss = nn.functional.cross_entropy(module(*inputs(batch, merged)), batch.labels)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimiser.step()
            schedule.step()


@torch.no_grad()
def accuracy(module: nn.Module, data: Data, *, merged: bool) -> float:
    """The share of `data` that is named right."""
    right = 0
    for index in torch.arange(len(data.labels)).split(64):
        batch = data.part(index)
        right += int((module(*inputs(batch, merged)).argmax(1) == batch.labels).sum())
    return right / len(data.labels)


def slots_needed(data: Data) -> int:
    """Slots that 19 of 20 functions fit into."""
    units = elision.count_units(data.segments.numpy())
    return int(np.quantile(units, 0.95))


def compile_merged(model: Classifier, data: Data, layer: int, strategy: str, slots: int) -> elision.Result:
    batch = torch.export.Dim("batch", min=1, max=256)
    passes = f"segment-merge{{layer={layer} strategy={strategy} capacity={slots}}}"
    example = (data.ids[:4], data.mask[:4])
    return elision.optimize(model, passes, example, dynamic_shapes=({0: batch}, {0: batch}), force=True)


def run(sizes: Sizes) -> list[str]:
    """The results as a table in markdown."""
    torch.manual_seed(0)
    names, train_set, held_out = prepare(sizes)
    print(
        f"{len(train_set.labels)} functions of {len(names)} modules, {len(held_out.labels)} held out",
        flush=True,
    )
    base = Classifier(sizes, len(names))
    weights = sum(p.numel() for p in base.parameters())
    train(base, train_set, sizes, sizes.epochs, 2e-3, merged=False)
    first = accuracy(base, held_out, merged=False)
    print(f"{weights} weights, {first:.1%} right without merging", flush=True)
    slots = slots_needed(train_set)
    head = [
        f"{len(names)} modules, {len(train_set.labels)} functions to learn from and {len(held_out.labels)} held out; "
        f"{sizes.layers} layers of width {sizes.width}, {weights / 1e6:.2f} million weights, {sizes.length} tokens, "
        f"of which {slots} slots stay; `python examples/segment_merge.py`, seeds fixed.",
        "",
        "| tokens become one | strategy | MFLOP a function | right at once | right after training on |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows = []
    plain = copy.deepcopy(base)
    train(plain, train_set, sizes, sizes.more, 5e-4, merged=False)
    after = accuracy(plain, held_out, merged=False)
    for layer in (0, 2, 4, sizes.layers):
        for strategy in ("average", "learned"):
            started = time.perf_counter()
            model = copy.deepcopy(base)
            result = compile_merged(model, train_set, layer, strategy, slots)
            before, flops = (c.flops / 4e6 for c in (result.report.cost_before, result.report.cost_after))
            if not rows:
                rows.append(f"| never | | {before:.1f} | {first:.1%} | {after:.1%} |")
                print(rows[-1], flush=True)
            module = result.module
            at_once = accuracy(module, held_out, merged=True)
            train(module, train_set, sizes, sizes.more, 5e-4, merged=True)
            trained = accuracy(module, held_out, merged=True)
            where = "behind the embeddings" if layer == 0 else f"behind layer {layer}"
            rows.append(
                f"| {where} | {strategy} | {flops:.1f} ({flops / before - 1:+.0%}) | {at_once:.1%} | {trained:.1%} |"
            )
            print(f"{rows[-1]}  {time.perf_counter() - started:.0f} s", flush=True)
    return head + rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the table here")
    parser.add_argument("--page", type=Path, help=f"put it between {BEGIN} and {END} of this page")
    parser.add_argument(
        "--tiny", action="store_true", help="a minute's run that shows nothing but that it runs"
    )
    given = parser.parse_args()
    torch.set_num_threads(2)
    table = "\n".join(run(TINY if given.tiny else Sizes()))
    if given.out is not None:
        given.out.write_text(table + "\n", encoding="utf-8")
    if given.page is not None:
        page = given.page.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN, 1)
        given.page.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
