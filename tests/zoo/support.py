"""Writes docs/support.md: what each family of passes does to every model of the zoo, in both hosts.

python -m tests.zoo.support
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import ZOO
from .model import ZooModel
from .outcome import HOSTS, Outcome, merged
from .text_support import HEAD as TEXT_HEAD
from .text_support import TEXTS, text_row
from .vlm import VLMS
from .vlm_support import HEAD as VLM_HEAD
from .vlm_support import vlm_row

FAST = ("vit", "dinov2", "bert", "clip_text", "timm_vit", "timm_vit_gap", "timm_deit3", "timm_swin")
"""Models that stand for the rest where all of them would take too long."""

HEAD = """# Supported architectures

This page is written by `make support`; a test compares it with what the passes do. Each row is a small random
configuration of the architecture, made by the library that people use, as a torch graph (`elision.optimize` of
the module) and as an ONNX file (`torch.onnx.export` of it).

The chain of numbers is the length of the token sequence in each attention: what was, then what is left. Where a
pass refuses, its sentence is given. Every row that merges is tested for batches of 1 and 3 with a dynamic batch,
float32 and bfloat16, unchanged output shapes, bounded drift, and bit-identity at `r=0`; rows with a padding mask
also for results that depend neither on padding nor on neighbours in the batch.

| name | architecture | library | torch graph | ONNX file |
| --- | --- | --- | --- | --- |
"""


def page() -> Path:
    return Path(__file__).resolve().parents[2] / "docs" / "support.md"


def row(entry: ZooModel, outcomes: Sequence[Outcome]) -> str:
    """One line of the table, in the order of HOSTS."""
    what = entry.architecture + (f", {entry.note}" if entry.note else "")
    cells = [f"`{entry.name}`", what, entry.source, *(_cell(outcome) for outcome in outcomes)]
    return "| " + " | ".join(cells) + " |"


def rows_of(text: str, heading: str = "") -> dict[str, str]:
    """The lines of the tables under a heading, or before the first one, by model name."""
    _, _, part = text.partition(f"{heading}\n") if heading else ("", "", text)
    lines = [line for line in part.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    return {line.split("`")[1]: line for line in lines}


def _cell(outcome: Outcome) -> str:
    if not outcome.merges:
        return f"refuses: {_escaped(outcome.sentence)}"
    how = "" if outcome.passes == "token-merge{r=2}" else f"`{outcome.passes}`: "
    return f"{how}merges, {_chain(outcome.before)} → {_chain(outcome.after)}"


def _chain(lengths: list[int]) -> str:
    return " ".join(str(length) for length in lengths)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").strip()


def main() -> None:
    import torch

    torch.set_num_threads(1)
    lines = []
    with tempfile.TemporaryDirectory() as name:
        for entry in ZOO.values():
            outcomes = [merged(entry, host, Path(name)) for host in HOSTS]
            lines.append(row(entry, outcomes))
            print(lines[-1], file=sys.stderr)
        more = [vlm_row(entry, Path(name)) for entry in VLMS.values()]
        texts = [text_row(entry, Path(name)) for entry in TEXTS.values()]
    target = page()
    target.parent.mkdir(exist_ok=True)
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    parts = [HEAD, *lines, VLM_HEAD, *more, TEXT_HEAD, *texts]
    temporary.write_text("".join(p if p.endswith("\n") else f"{p}\n" for p in parts), encoding="utf-8")
    temporary.replace(target)


if __name__ == "__main__":
    main()
