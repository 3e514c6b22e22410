"""Writes docs/composition.md: what every ordered pair of passes does, in both hosts.

python -m tests.zoo.composition
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import elision

from .composition_models import HOSTS, SUBJECTS, Subject, attempt

TEXTS: dict[str, str] = {
    "token-merge": "token-merge{r=2}",
    "token-drop": "token-drop{policy=uniform budget=0.5}",
    "segment-merge": "segment-merge{layer=1}",
    "token-gate": "token-gate{layer=1 capacity=0.6}",
    "dynamic-vocab": "dynamic-vocab",
    "image-ids": "image-ids",
    "extra-embeddings": "extra-embeddings",
    "skip-layers": "skip-layers{share=0.34}",
    "quantize": "quantize{bits=8 method=rtn}",
    "incremental": "incremental{capacity=96}",
    "window": "window{capacity=48}",
    "key-scores": "key-scores",
    "taps": "taps",
    "head": "head{k=4}",
    "keep-rows": "keep-rows",
    "fix-rows": "fix-rows",
    "lower": "lower",
}
"""The families, as each is tried."""

FAST = (
    ("token-merge", "quantize"),
    ("quantize", "token-merge"),
    ("token-drop", "token-merge"),
    ("quantize", "extra-embeddings"),
    ("segment-merge", "head"),
)
"""Cells that stand for the rest where all of them would take too long, of torch graphs."""

HEAD = """# Which passes go together

This page is written by `make composition`; a test compares it with what the passes do. Every pass is tried behind every
other one, on the first of these small random models to which both apply by themselves:

{models}

| mark | the pass of the column, behind that of the row |
| --- | --- |
| ✓ | works: all checks of the [manager](pipelines.md#what-the-manager-does-around-each-pass) hold |
| = | leaves the graph as it is, since nothing is left to do |
| ← | is refused, and works in the other order; the error says so |
| ✗ | is refused, in either order |
| – | is refused for a reason of its own, whatever stands before it |
| | no model of these takes both |

What a pass leaves in a graph is read off the graph itself, so a file that was written half way is treated alike. Which
order works is not looked up in this table: where a pass refuses, the manager tries the others on copies, and the error
names the pass that is in the way.
"""


@dataclass(frozen=True)
class Cell:
    """What the second pass does behind the first. correlation: of both with the model as it was, the least of all
    outputs that can be compared. sentence: where it is refused."""

    first: str
    second: str
    host: str
    subject: str = ""
    correlation: float | None = None
    same: bool = False
    sentence: str = ""

    @property
    def mark(self) -> str:
        if not self.subject:
            return ""
        if self.sentence:
            if not self.sentence.startswith(f"{self.second} after {self.first}:"):
                return "–"
            return "←" if f"put {self.second} before {self.first}" in self.sentence else "✗"
        return "=" if self.same else "✓"

    @property
    def line(self) -> str:
        """The cell in the list below the table."""
        if self.sentence:
            what = _numbered(self.sentence).replace("|", "\\|")
        elif self.correlation is None:
            what = "works"
        else:
            what = f"works, correlation {self.correlation:.2f}"
        return f"| `{self.first},{self.second}` | {self.subject} | {what} |"


def _numbered(sentence: str) -> str:
    """With torch's symbols numbered as they come: their own numbers differ from run to run."""
    symbols = list(dict.fromkeys(re.findall(r"\bs\d+\b", sentence)))
    return re.sub(r"\bs\d+\b", lambda found: f"s{symbols.index(found[0])}", sentence)


def page() -> Path:
    return Path(__file__).resolve().parents[2] / "docs" / "composition.md"


def subject_for(*passes: str) -> Subject | None:
    """The first model to which all of these apply by themselves."""
    return next((s for s in SUBJECTS.values() if set(passes) <= s.passes), None)


def cell(host: str, first: str, second: str, folder: Path) -> Cell:
    """Try one pair. Only Refused and NothingMatched are answers; every other error is a bug."""
    subject = subject_for(first, second)
    if subject is None:
        return Cell(first, second, host)
    try:
        report = attempt(subject, host, folder, f"{TEXTS[first]},{TEXTS[second]}")
    except (elision.Refused, elision.NothingMatched) as error:
        return Cell(first, second, host, subject.name, sentence=str(error))
    least = min((drift.correlation for drift in report.drift or []), default=None)
    return Cell(first, second, host, subject.name, least, not report.passes[1].changed)


def text(cells: Iterable[Cell]) -> str:
    """The page."""
    models = "\n".join(f"* **{s.name}**: {s.what}" for s in SUBJECTS.values())
    parts = [HEAD.format(models=models)]
    found = {(c.host, c.first, c.second): c for c in cells}
    for host in HOSTS:
        parts.append(f"\n## {'Torch graphs' if host == 'torch' else 'ONNX files'}\n")
        parts.append("| first | " + " | ".join(f"`{name}`" for name in TEXTS) + " |")
        parts.append("| --- " * (len(TEXTS) + 1) + "|")
        for first in TEXTS:
            marks = [found[host, first, second].mark for second in TEXTS]
            parts.append(f"| `{first}` | " + " | ".join(marks) + " |")
        parts.append("\n| pipeline | model | result |\n| --- | --- | --- |")
        listed = [c for c in found.values() if c.host == host and c.subject]
        parts += [c.line for c in listed]
    return "\n".join(parts) + "\n"


def lines_of(page_text: str, host: str) -> dict[tuple[str, str], str]:
    """The lines below the table of a host, by their two passes."""
    part = page_text.split("## ONNX files")[HOSTS.index(host)]
    lines = [line for line in part.splitlines() if line.startswith("| `") and "," in line.split("`")[1]]
    return {(pair[0], pair[1]): line for line in lines for pair in [line.split("`")[1].split(",")]}


def main() -> None:
    import torch

    torch.set_num_threads(1)
    cells = []
    with tempfile.TemporaryDirectory() as name:
        for host in HOSTS:
            for first in TEXTS:
                for second in TEXTS:
                    cells.append(cell(host, first, second, Path(name)))
                    print(host, cells[-1].line, file=sys.stderr)
    temporary = page().with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text(cells), encoding="utf-8")
    temporary.replace(page())


if __name__ == "__main__":
    main()
