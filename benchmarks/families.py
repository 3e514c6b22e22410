"""Tables of docs/ out of the kept results: the families on the first page, and figures that a page of a family has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

Kept = dict[str, Any]


def _merging(vit: Kept) -> str:
    length = vit["tokens_per_block"]
    ratio = vit["comparison"]["ratio"]
    return f"ViT-B/16, batch 8: {ratio:.2f}x of Inductor, {length[0]} tokens falling to {length[-1]}"


def _dropping(drop: Kept) -> str:
    before, after = (max(tokens) for tokens in drop["tokens_per_block"])
    return f"prefill of {before:,} tokens as {after}: {min(row['ratio'] for row in drop['rows']):.1f}x"


def _window(windowed: Kept) -> str:
    large = windowed["large"]
    return f"{large['positions']:,} positions: {large['faster']:.0f}x of the full sampler at equal steps"


def _segments(words: Kept) -> str:
    last = max(words["correlation"], key=words["correlation"].__getitem__)
    return (
        f"words in MiniLM, {last}: {words['speed'][last]:.2f}x, correlation {words['correlation'][last]:.3f}"
    )


def _vocabulary(merged: Kept) -> str:
    rule = "first token, then threes, trained"
    return (
        f"MiniLM, technical text: {merged['speed'][rule]:.2f}x, correlation {merged['correlation'][rule]:.3f}"
    )


def _gates(trained: Kept) -> str:
    gate, without = trained["gates"][1], trained["without"]["loss"]
    return (
        f"a small byte model without {gate['soft']['deleted']:.0%} of its bytes: {gate['work']:.2f} of the work, "
        f"loss {gate['hard']['loss']:.3f} for {without:.3f}"
    )


def _caches(cost: Kept) -> str:
    return f"8 rows cost {cost['ratios']['elision']['8']:.2f} of one (SmolLM2-135M, 4 bits)"


def _bits(decode: Kept) -> str:
    return f"SmolLM2-135M: {decode['decode_ratio']:.2f}x of onnxruntime-genai's int4, token by token"


def _drafts(spoken: Kept) -> str:
    return f"{spoken['ratios']['all']['of plain']:.2f}x of plain decoding, {spoken['texts_that_differ']} texts differ"


def _kernels(share: Kept) -> str:
    times = share["total_ms"]
    return f"matching and merging: {times['ATen'] / times['C++ in torch']:.1f}x of ATen's ops"


FAMILIES: tuple[tuple[str, str, str, str, Callable[[Kept], str]], ...] = (
    (
        "Token merging",
        "token_merge.md",
        "similar tokens of an encoder become one, block by block",
        "vit_cpu",
        _merging,
    ),
    (
        "Token dropping",
        "token_drop.md",
        "image tokens that matter least never reach the text",
        "token_drop",
        _dropping,
    ),
    (
        "Merging by units",
        "segment_merge.md",
        "the tokens of an identifier or a word become one",
        "segment_words",
        _segments,
    ),
    (
        "Delete gates",
        "token_gate.md",
        "a trained gate deletes tokens inside an encoder",
        "train_gate",
        _gates,
    ),
    (
        "Dynamic vocabularies",
        "dynamic_vocab.md",
        "tokens of a word become one before the model",
        "dynamic_vocab",
        _vocabulary,
    ),
    (
        "Caches",
        "incremental.md",
        "only new rows are computed, against keys and values kept",
        "verify_cost",
        _caches,
    ),
    ("Windows", "diffusion.md", "a diffusion model computes a few positions a step", "windowed", _window),
    ("Few bits", "quantize.md", "weights of 4 or 8 bits", "decode", _bits),
    (
        "Speculation",
        "speculation.md",
        "several tokens are guessed and verified in one call",
        "speculation",
        _drafts,
    ),
    (
        "Kernels",
        "kernels.md",
        "what is left runs in the form that the target runs fastest",
        "match_share",
        _kernels,
    ),
)
"""Name, page, one line, the benchmark and what it says of it."""


def table() -> str:
    """docs/index.md: every family, with a figure."""
    rows = ["| family | what it does | measured |", "| --- | --- | --- |"]
    for name, page, line, benchmark, said in FAMILIES:
        rows.append(f"| [{name}]({page}) | {line} | {said(_kept(benchmark))} |")
    return "\n".join(rows)


def by_layer() -> str:
    """docs/segment_merge.md: words as units, by layer."""
    words = _kept("segment_words")
    layers = [name for name in words["speed"] if name.startswith("behind layer ")]
    rows = [
        ("behind layer", [name.removeprefix("behind layer ") for name in layers]),
        ("correlation", [f"{words['correlation'][name]:.3f}" for name in layers]),
        ("with `proportional=false`", [f"{words['correlation_without_sizes'][name]:.3f}" for name in layers]),
        ("faster", [f"{words['speed'][name]:.2f}x" for name in layers]),
    ]
    lines = [f"| {name} | {' | '.join(cells)} |" for name, cells in rows]
    return "\n".join([lines[0], "| --- " * (len(layers) + 1) + "|", *lines[1:]])


RULES = {
    "first token, then threes": "`CutWords(1, 3)`, the default",
    "first token, then the rest": "`CutWords(1, 0)`: the first, then the rest",
    "whole words": '`"words"`',
}
"""What the benchmark calls a rule, and how it is written."""


def by_rule() -> str:
    """docs/dynamic_vocab.md: what each rule saves and loses."""
    merged = _kept("dynamic_vocab")
    lines = [
        "| merged | tokens | correlation, trained | correlation, average | faster (trained, embeddings known) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for rule, written in RULES.items():
        trained, average = f"{rule}, trained", f"{rule}, average"
        fewer = merged["tokens"]["the model itself"] / merged["tokens"][trained]
        lines.append(
            f"| {written} | {fewer:.2f}x fewer | {merged['correlation'][trained]:.4f} | "
            f"{merged['correlation'][average]:.4f} | {merged['speed'][trained]:.2f}x |"
        )
    return "\n".join(lines)


def by_rate() -> str:
    """docs/token_gate.md: what each deletion rate costs and saves. The kept file is examples/train_gate.py's."""
    trained = _kept("train_gate")
    lines = [
        "| rate asked for | deleted | loss, soft | loss, hard | capacity | work of the graph |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| no gate, trained as long | | {trained['without']['loss']:.3f} | | | 1 |",
    ]
    for gate in trained["gates"]:
        soft, hard = gate["soft"], gate["hard"]
        lines.append(
            f"| {gate['target']:.0%} | {soft['deleted']:.0%} | {soft['loss']:.3f} | {hard['loss']:.3f} | "
            f"{gate['capacity']:.0%} | {gate['work']:.2f} |"
        )
    return "\n".join(lines)


TABLES: dict[tuple[str, str], Callable[[], str]] = {
    ("index.md", "families"): table,
    ("segment_merge.md", "layers"): by_layer,
    ("token_gate.md", "gates"): by_rate,
    ("dynamic_vocab.md", "rules"): by_rule,
}
"""By page and name: what stands there between two comments."""


def marks(name: str) -> tuple[str, str]:
    """The comments around a table."""
    return f"<!-- {name}: written by benchmarks/run.py -->", f"<!-- end of {name} -->"


def _kept(name: str) -> Kept:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
